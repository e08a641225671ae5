"""Moments: what follows each optimizer step: an evaluation, a checkpoint, the end.

transformers' loop asks its callbacks; this one answers from the recipe, all of it counted in optimizer steps.

Owns: when. Does not know: how. Place in a training run: between the loop and `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from training.loop.stages import Timeline
    from training.recipe.recipe import Recipe


class Moments(TrainerCallback):
    """Sets transformers' flags after each step."""

    def __init__(
        self,
        recipe: Recipe,
        timeline: Timeline,
        *,
        can_evaluate: bool,
        step_done: Callable[[], None],
        is_stop_wanted: Callable[[], bool],
    ) -> None:
        """``step_done`` is told after each step; ``is_stop_wanted`` is asked, on all processes the same."""
        self._recipe = recipe
        self._timeline = timeline
        self._can_evaluate = can_evaluate
        self._step_done = step_done
        self._is_stop_wanted = is_stop_wanted

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._step_done()
        step = state.global_step
        is_last = step == self._timeline.num_steps
        is_stopped = self._is_stop_wanted()
        epoch, step_of_epoch = self._timeline.epoch_at(step - 1)
        state.epoch = epoch + (step_of_epoch + 1) / self._timeline.steps_per_epoch
        control.should_evaluate = self.evaluates_after(step)
        control.should_save = is_last or is_stopped or step % self._recipe.save_steps == 0
        control.should_training_stop = is_last or is_stopped

    def evaluates_after(self, step: int) -> bool:
        """Whether the held-out rows are looked at after ``step`` steps; always at the end."""
        if not self._can_evaluate:
            return False
        every = self._recipe.eval_steps
        due = self._timeline.ends_epoch(step - 1) if every is None else step % every == 0
        return due or step == self._timeline.num_steps
