"""Course: what is known of a run as it goes on, and to whom it is told.

Owns: the counts that a checkpoint remembers, the clock, the log, and what an observer hears. Does not know: tensors,
transformers. Place in a training run: beside the loop, from its first step to its end.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Final

from training.loop.observer import EvalReport, NonFiniteLoss, StepReport, TrainOutcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.loop.checkpoints import RunState
    from training.loop.observer import Ended, TrainObserver
    from training.loop.runlog import RunLog
    from training.loop.stages import Timeline
    from training.loop.step import StepResult
    from training.recipe.recipe import Recipe

_RECENT_STEPS: Final = 20


class Pace:
    """How fast steps are; what lies between them is counted apart."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = self._mark = clock()
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS)
        self._num_steps = 0
        self._in_steps = 0.0

    def begin(self) -> None:
        """A step begins now."""
        self._mark = self._clock()

    def lap(self, num_tokens: int) -> float:
        """A step of so many tokens ends now, and the next begins. Its seconds."""
        now = self._clock()
        seconds = now - self._mark
        self._mark = now
        self._recent.append((num_tokens, seconds))
        self._num_steps += 1
        self._in_steps += seconds
        return seconds

    @property
    def tokens_per_s(self) -> float:
        """Of the last steps."""
        seconds = sum(each for _, each in self._recent)
        return sum(count for count, _ in self._recent) / seconds if seconds > 0 else 0.0

    def seconds_for(self, num_steps: int) -> float:
        """How long so many more steps will take, with what has lain between steps so far."""
        if not self._num_steps:
            return 0.0
        step = sum(each for _, each in self._recent) / len(self._recent)
        between = (self._mark - self._began - self._in_steps) / self._num_steps
        return num_steps * (step + max(0.0, between))


class Course:
    """One run. Every process has one; only the first one's writes a log."""

    def __init__(
        self,
        recipe: Recipe,
        timeline: Timeline,
        observer: TrainObserver,
        memory: Callable[[], int],
        state: RunState,
        log: RunLog | None,
    ) -> None:
        """``memory`` says how many bytes are held."""
        self._recipe = recipe
        self._timeline = timeline
        self._observer = observer
        self._memory = memory
        self._log = log
        self.state = state
        self.pace: Final = Pace()

    def step_done(self, result: StepResult, rates: Mapping[str, float]) -> StepReport:
        """One more step was taken, at ``rates``."""
        seconds = self.pace.lap(result.num_tokens)
        before = self.state
        held = self._memory()
        self.state = replace(
            before,
            step=before.step + 1,
            num_tokens=before.num_tokens + result.num_tokens,
            seconds=before.seconds + seconds,
            peak_bytes=max(before.peak_bytes, held),
            last_loss=result.loss,
        )
        report = StepReport(
            step=self.state.step,
            num_steps=self._timeline.num_steps,
            stage=self._timeline.span_at(before.step).index,
            loss=result.loss,
            lr=dict(rates),
            grad_norm=result.grad_norm,
            num_labels=result.num_labels,
            num_tokens=result.num_tokens,
            tokens_per_s=self.pace.tokens_per_s,
            memory_bytes=held,
            seconds_left=self.pace.seconds_for(self._timeline.num_steps - self.state.step),
        )
        self._write_step(report, result)
        self._observer.on_step(report)
        return report

    def _write_step(self, report: StepReport, result: StepResult) -> None:
        """A line each ``log_steps``; its loss is of the labels of all steps since the last line."""
        total = self.state.line_total + result.loss * result.num_labels
        num_labels = self.state.line_labels + result.num_labels
        step = report.step
        if step % self._recipe.log_steps and step != report.num_steps:
            self.state = replace(self.state, line_total=total, line_labels=num_labels)
            return
        loss = result.loss if num_labels == result.num_labels else total / num_labels
        self.state = replace(self.state, line_total=0.0, line_labels=0)
        if self._log is not None:
            epoch, step_of_epoch = self._timeline.epoch_at(step - 1)
            done = round(epoch + (step_of_epoch + 1) / self._timeline.steps_per_epoch, 4)
            self._log.write("step", {**asdict(report), "loss": loss, "epoch": done})

    def eval_done(self, loss: float | None, scores: Mapping[str, float], seconds: float) -> EvalReport:
        """The evaluation after the steps done so far."""
        state = self.state
        is_best = (
            loss is not None and math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        )
        if is_best:
            self.state = replace(state, best_step=state.step, best_loss=loss, num_worse=0)
        elif loss is not None:
            self.state = replace(state, num_worse=state.num_worse + 1)
        report = EvalReport(state.step, loss, dict(scores), is_best, seconds)
        if self._log is not None:
            self._log.write("eval", asdict(report))
        self._observer.on_eval(report)
        return report

    @property
    def has_stalled(self) -> bool:
        """Whether early stopping was asked for and is due."""
        patience = self._recipe.early_stopping
        return patience is not None and self.state.num_worse >= patience

    def broke(self, error: NonFiniteLoss) -> None:
        """The run ends by a loss that is no number."""
        if self._log is not None:
            rows = [str(origin) for origin in error.origins]
            facts = {
                "step": error.step,
                "loss": str(error.loss),
                "grad_norm": str(error.grad_norm),
                "rows": rows,
            }
            self._log.write("non_finite", facts)
            self._log.sync()

    def note(self, text: str) -> None:
        self._observer.on_note(text)

    def saved(self, ended: Ended | None) -> RunState:
        """The state for a checkpoint, its log on the disk."""
        log_bytes = self._log.sync() if self._log is not None else 0
        final = None if ended == "interrupted" else ended
        self.state = replace(self.state, log_bytes=log_bytes, ended=final)
        return self.state

    def outcome(self, ended: Ended) -> TrainOutcome:
        return outcome_of(self.state, ended)


def outcome_of(state: RunState, ended: Ended) -> TrainOutcome:
    """What a run has come to."""
    return TrainOutcome(
        num_steps=state.step,
        num_tokens=state.num_tokens,
        seconds=state.seconds,
        tokens_per_s=state.num_tokens / state.seconds if state.seconds > 0 else 0.0,
        peak_bytes=state.peak_bytes,
        last_loss=state.last_loss,
        best_step=state.best_step,
        ended=ended,
    )
