"""Flight: a step that was started on the device and whose tokens nobody has read; and who starts one.

Place in a request's way: between steps 8 and 9, where the engine goes one step ahead (``ahead``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.step import Chunk, StepPlan

Choose = Callable[[Tensor], Tensor]
"""Logits [S, V] float32 -> [S] int64 tokens, NO_TOKEN where they are not finite; on the device, without waiting."""


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    chunks: tuple[Chunk, ...]
    is_ahead: bool
    """Its inputs were the tokens of another flight."""
    wait: Callable[[], list[int]]
    """Blocks until the device is done: each chunk's token, or NO_TOKEN. Raises whatever the device does."""


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """What a replay left; valid until the next one."""

    logits: Tensor  # [S, V] float32
    chosen: Tensor  # [S] int64: the likeliest token, or NO_TOKEN


class Launcher(Protocol):
    """Who replays steps that are recorded. Raises ValueError if a row is routed to an empty slot."""

    def fits(self, plan: StepPlan) -> bool:
        """Whether it has a recording for it."""
        ...

    def run(self, plan: StepPlan) -> Replayed | None:
        """Compute the plan; None where it does not fit."""
        ...

    def launch(self, plan: StepPlan, after: Flight | None, choose: Choose | None) -> Flight | None:
        """Start the plan and do not wait; None where it does not fit.

        after: the latest launched, of whose rows the plan's are; its tokens are the inputs. choose: who chooses the
        tokens where they are not simply the likeliest.
        """
        ...
