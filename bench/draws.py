"""Seeded draws: arrivals, popularity and lengths. Pure.

Owns the distributions that workloads are made of. They are drawn with `random.Random`, whose streams Python keeps from
version to version, so that a workload's digest means the same calls everywhere.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Literal


def gamma_arrivals(rate: float, cv: float, num: int, rng: random.Random) -> tuple[float, ...]:
    """Seconds at which ``num`` calls arrive: ``rate`` a second, gaps Gamma with the coefficient of variation ``cv``.

    cv 1 is a Poisson process; 4 and 8 are bursts with silences between.
    """
    if rate <= 0 or cv <= 0:
        raise ValueError(f"rate and cv must be over 0, not {rate} and {cv}")
    shape, scale = 1 / cv**2, cv**2 / rate
    return tuple(itertools.accumulate(rng.gammavariate(shape, scale) for _ in range(num)))


def zipf_choices(num_adapters: int, exponent: float, num: int, rng: random.Random) -> tuple[int, ...]:
    """Adapter numbers, the k-th as likely as k ** -exponent; 0 draws them alike."""
    if num_adapters < 1 or exponent < 0:
        raise ValueError(
            f"needs at least one adapter and an exponent from 0, not {num_adapters} and {exponent}"
        )
    weights = [(place + 1) ** -exponent for place in range(num_adapters)]
    return tuple(rng.choices(range(num_adapters), weights, k=num))


def power_choices(num_adapters: int, alpha: float, num: int, rng: random.Random) -> tuple[int, ...]:
    """Adapter numbers as S-LoRA's trace generator draws them: floor(n * U ** (1 / alpha)); 1 draws them alike."""
    if num_adapters < 1 or alpha <= 0:
        raise ValueError(f"needs at least one adapter and alpha over 0, not {num_adapters} and {alpha}")
    return tuple(min(num_adapters - 1, int(num_adapters * rng.random() ** (1 / alpha))) for _ in range(num))


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many words or tokens: from ``low`` to ``high``, evenly, or around a median with a long tail, cut at both."""

    low: int
    high: int
    kind: Literal["uniform", "lognormal"] = "uniform"
    sigma: float = 0.6
    """Of the logarithm; for lognormal. The median is the geometric mean of both ends."""

    def draw(self, num: int, rng: random.Random) -> tuple[int, ...]:
        if not 0 < self.low <= self.high:
            raise ValueError(f"lengths go from at least 1 upwards, not from {self.low} to {self.high}")
        if self.kind == "uniform":
            return tuple(rng.randint(self.low, self.high) for _ in range(num))
        median = (self.low * self.high) ** 0.5
        return tuple(self._cut(median * rng.lognormvariate(0.0, self.sigma)) for _ in range(num))

    def _cut(self, length: float) -> int:
        return max(self.low, min(self.high, round(length)))
