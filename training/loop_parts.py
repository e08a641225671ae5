"""LoopParts: what one run is made of, and the model in the wrapper that transformers' Trainer leaves alone.

Place in a training run: put together by `trainer.py`, used by `loop.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from training.checkpoints import Checkpoints, Identity
    from training.course import Course
    from training.feed import StepFeed
    from training.interrupt import StopRequest
    from training.model import AdaptedBase, SummedLoss
    from training.observer import EvalHook
    from training.ranks import Ranks
    from training.recipe import Recipe
    from training.stages import Timeline
    from training.validation import Validation


@dataclass(frozen=True, slots=True, eq=False)
class LoopParts:
    """What one run is made of."""

    model: AdaptedBase
    recipe: Recipe
    timeline: Timeline
    feed: StepFeed
    course: Course
    checkpoints: Checkpoints
    identity: Identity
    ranks: Ranks
    stop: StopRequest
    validation: Validation | None
    eval_hook: EvalHook | None


class Whole(nn.Module):
    """The model as it is, in a wrapper: what tells Trainer that nothing needs to be moved, cast or sharded."""

    def __init__(self, model: AdaptedBase) -> None:
        super().__init__()
        self.module = model

    def forward(self, batch: object) -> SummedLoss:
        result: SummedLoss = self.module(batch)
        return result
