"""Ranks: the processes that make each step together, and what they tell one another.

Owns: sums, and values of the first process made everybody's. Alone, each is the value itself. Does not know: what the
numbers are. Place in a training run: inside each step and evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def summed(self, numbers: Tensor) -> Tensor:
        """Over all processes; on each the same."""
        if self.count > 1:
            torch.distributed.all_reduce(numbers)
        return numbers

    def everyones(self, value: T) -> list[T]:
        """Each process's, by its index. Slow: for small values, seldom."""
        if self.count == 1:
            return [value]
        found: list[T | None] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return [one for one in found if one is not None]

    def firsts(self, value: T) -> T:
        """The first process's, which may take its time."""
        if self.count == 1:
            return value
        box: list[T] = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def share(self, things: Sequence[T]) -> tuple[T, ...]:
        """This process's of ``things``, dealt out in turn."""
        return tuple(things[self.index :: self.count])


def ranks_now() -> Ranks:
    """As the run was launched."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return Ranks()
