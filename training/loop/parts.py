"""LoopParts: what one run is made of, and the model in the wrapper that transformers' Trainer leaves alone.

Place in a training run: put together by `trainer.py`, used by `loop.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from training.loop.checkpoints import Checkpoints, Identity
    from training.loop.course import Course
    from training.loop.feed import StepFeed
    from training.loop.interrupt import StopRequest
    from training.loop.observer import EvalHook
    from training.loop.ranks import Ranks
    from training.loop.stages import Timeline
    from training.loop.validation import Validation
    from training.model.model import AdaptedBase, SummedLoss
    from training.recipe.recipe import Recipe


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
