"""Stages: the stretches of one run, and which step of the run belongs to which.

A run counts its optimizer steps through, whatever its stages; each stage has a whole schedule of its own, a warmup and
a fall to the end, because a part that begins to learn late needs its warmup then, and one that goes on has a new
companion. What an optimizer remembers of a part stays with it from stage to stage; parts that rest get no gradient, no
decay and no step. A recipe without stages is one stage of all its parts.

Owns: how long each stage is, each part's rate at each step, and where epochs end. Does not know: rows, tensors,
optimizers. Place in a training run: made before the first step, read at every one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from training.loop.schedule import Shape, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from training.recipe.recipe import Part, Recipe, Stage

DEFAULT_EPOCHS: Final = 3.0


class StageError(ValueError):
    """Stages that the adapter or the data cannot go through."""


@dataclass(frozen=True, slots=True)
class Span:
    """One stage on the run's count of steps."""

    index: int
    parts: tuple[Part, ...]
    """What learns."""
    peaks: Mapping[Part, float]
    """Each such part's highest rate."""
    first_step: int
    """Optimizer steps of the run before it."""
    num_steps: int
    first_epoch: int
    """Passes over the data begun before it."""
    shape: Shape

    @property
    def end(self) -> int:
        """The first step after it."""
        return self.first_step + self.num_steps

    def rate(self, part: Part, step: int) -> float:
        """Of ``part`` at the run's ``step``, from 0; 0.0 for a part that rests."""
        peak = self.peaks.get(part)
        return 0.0 if peak is None else peak * self.shape.share(step - self.first_step, peak)


@dataclass(frozen=True, slots=True)
class Timeline:
    """All stages of a run, one after another."""

    spans: tuple[Span, ...]
    steps_per_epoch: int

    @property
    def num_steps(self) -> int:
        return self.spans[-1].end

    def span_at(self, step: int) -> Span:
        """The stage of ``step``, from 0; the last one for the run's end."""
        return next((span for span in self.spans if step < span.end), self.spans[-1])

    def epoch_at(self, step: int) -> tuple[int, int]:
        """The pass over the data that ``step`` is of, counted through the run, and which of its steps it is."""
        span = self.span_at(step)
        epochs, step_of_epoch = divmod(step - span.first_step, self.steps_per_epoch)
        return span.first_epoch + epochs, step_of_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether a pass over the data, or a stage, is over after ``step``."""
        span = self.span_at(step)
        done = step + 1 - span.first_step
        return done % self.steps_per_epoch == 0 or done == span.num_steps

    def first_peak(self, part: Part) -> float:
        """The part's highest rate in the first stage in which it learns."""
        return next(span.peaks[part] for span in self.spans if part in span.peaks)


def plan_stages(recipe: Recipe, parts: Sequence[Part], steps_per_epoch: int) -> Timeline:
    """The run's stages for an adapter with ``parts``. Raises StageError."""
    spans: list[Span] = []
    for index, stage in enumerate(_stages(recipe, parts)):
        _check(index, stage, parts)
        before = spans[-1] if spans else None
        num_steps = _num_steps(stage, steps_per_epoch)
        spans.append(
            Span(
                index, stage.parts, {part: recipe.rate_of(part, stage) for part in stage.parts},
                first_step=before.end if before else 0,
                num_steps=num_steps,
                first_epoch=_epochs_begun(before, steps_per_epoch) if before else 0,
                shape=shape_of(recipe, num_steps),
            )
        )  # fmt: skip
    _check_all_learn(spans, parts)
    return Timeline(tuple(spans), steps_per_epoch)


def _stages(recipe: Recipe, parts: Sequence[Part]) -> tuple[Stage, ...]:
    from training.recipe.recipe import Stage

    if recipe.stages:
        return recipe.stages
    epochs = recipe.epochs
    if epochs is None and recipe.max_steps is None:
        epochs = DEFAULT_EPOCHS
    return (Stage(tuple(parts), epochs=epochs, max_steps=recipe.max_steps),)


def _check(index: int, stage: Stage, parts: Sequence[Part]) -> None:
    place = f"stage {index + 1}"
    strangers = [part for part in (*stage.parts, *stage.rates) if part not in parts]
    if strangers or not stage.parts:
        named = f"trains {', '.join(strangers)}" if strangers else "trains nothing"
        raise StageError(f"{place} {named}; this adapter has {', '.join(parts)}: name parts that it has")
    if (stage.epochs is None) == (stage.max_steps is None):
        raise StageError(
            f"{place} needs one of epochs and max_steps, not {'both' if stage.epochs else 'neither'}"
        )


def _check_all_learn(spans: Sequence[Span], parts: Sequence[Part]) -> None:
    idle = [part for part in parts if not any(part in span.parts for span in spans)]
    if idle:
        raise StageError(
            f"the adapter sits on {', '.join(idle)}, which no stage trains: name it in a stage, or leave it out of"
            " preset or targets"
        )


def _num_steps(stage: Stage, steps_per_epoch: int) -> int:
    if stage.max_steps is not None:
        return stage.max_steps
    return max(1, math.ceil((stage.epochs or 0.0) * steps_per_epoch - 1e-9))


def _epochs_begun(span: Span, steps_per_epoch: int) -> int:
    return span.first_epoch + math.ceil(span.num_steps / steps_per_epoch)
