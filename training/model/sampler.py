"""LengthGroupedBatches: which examples go through the model together, and in which order, in every epoch.

A step sees micro_batch * accumulation examples, in ``accumulation`` micro-batches; those of an epoch are the same
whatever the number of processes, which take turns at them. An epoch is cut into equal steps (so that the last is no
remnant), each step into equal micro-batches. Examples of like length go together; steps mix lengths. Only where
micro_batch is 1 and steps do not come out even, a few examples come twice in an epoch.

Deterministic in (seed, epoch). Does not know: pictures, devices. Place in a training run: above the loader.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from torch.utils.data import Sampler

POOL_STEPS: Final = 8
"""Steps' worth of examples that are sorted by length together: enough to be alike, few enough to stay random."""


class LengthGroupedBatches(Sampler[list[int]]):
    """Lists of indices into ``Examples``; those of epoch n are n * len(lengths) higher, as Examples reads them."""

    def __init__(self, lengths: Sequence[int], micro_batch: int, accumulation: int, seed: int) -> None:
        """Raises ValueError without any example."""
        if not lengths:
            raise ValueError("there is no example to draw")
        self._lengths = tuple(lengths)
        self._seed = seed
        num_examples = len(self._lengths)
        self.num_steps: Final = -(-num_examples // (micro_batch * accumulation))
        """Of an epoch."""
        self.batches_per_step: Final = min(accumulation, num_examples)
        self.epoch = 0

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return self.num_steps * self.batches_per_step

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration draws."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        base = self.epoch * len(self._lengths)
        for batch in self.batches_of(self.epoch):
            yield [base + index for index in batch]

    def batches_of(self, epoch: int) -> list[list[int]]:
        """The epoch's micro-batches in order, as indices below len(lengths)."""
        chance = random.Random(f"{self._seed} {epoch}")  # text is seeded by its SHA-512: the same everywhere
        order = list(range(len(self._lengths)))
        chance.shuffle(order)
        order += order[: max(0, len(self) - len(order))]
        batches: list[list[int]] = []
        for first in range(0, self.num_steps, POOL_STEPS):
            last = min(first + POOL_STEPS, self.num_steps)
            pool = order[len(order) * first // self.num_steps : len(order) * last // self.num_steps]
            batches += self._grouped(pool, (last - first) * self.batches_per_step, chance)
        return batches

    def _grouped(self, pool: list[int], num_batches: int, chance: random.Random) -> list[list[int]]:
        """Like lengths together, in batches of sizes at most one apart, in any order."""
        pool.sort(key=lambda index: self._lengths[index])
        cuts = [len(pool) * number // num_batches for number in range(num_batches + 1)]
        batches = [pool[begin:end] for begin, end in pairwise(cuts)]
        chance.shuffle(batches)
        return batches
