"""Rates over a stage: how a learning rate rises to its peak and falls again.

Owns: the shapes, by transformers' names and equal to transformers' own but for the rise: theirs begins at 0, so that a
run's first step learns nothing, and a run of one step nothing at all. Does not know: stages, parts, optimizers.
Place in a training run: under `stages.py`, asked for each step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from training.recipe.recipe import Recipe, Scheduler

POLYNOMIAL_END: Final = 1e-7
"""Rate at which transformers' ``polynomial`` ends, with power 1; as a share of the peak it is this over the rate."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A rate as a share of its peak, over ``num_steps`` steps of which the first ``warmup`` rise."""

    kind: Scheduler
    num_steps: int
    warmup: int

    def share(self, step: int, peak: float) -> float:
        """At ``step``, from 0, of a rate whose peak is ``peak``. ``constant`` has no warmup."""
        if self.kind == "constant":
            return 1.0
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return self._after(step, peak)

    def _after(self, step: int, peak: float) -> float:
        past = (step - self.warmup) / max(1, self.num_steps - self.warmup)
        if self.kind == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * past)))
        if self.kind == "linear":
            return max(0.0, 1.0 - past)
        if self.kind == "polynomial":
            end = min(1.0, POLYNOMIAL_END / peak)
            return max(end, (1.0 - end) * (1.0 - past) + end)
        if self.kind == "inverse_sqrt":
            scale = self.warmup or 10_000  # transformers' default timescale where there is no warmup
            return 1.0 / math.sqrt((step + scale - self.warmup) / scale)
        return 1.0


def shape_of(recipe: Recipe, num_steps: int) -> Shape:
    """The recipe's schedule over one stage. ``warmup_steps`` counts in each stage, the ratio is of its steps."""
    steps = recipe.warmup_steps
    warmup = math.ceil(num_steps * recipe.warmup_ratio) if steps is None else min(steps, num_steps)
    return Shape(recipe.scheduler, num_steps, warmup)
