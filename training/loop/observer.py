"""What the loop tells of itself: a step, an evaluation, and how it ended.

Owns: the values, and who may listen. Does not know: who does. Place in a training run: between `trainer.py` and
whoever shows its progress.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from training.data.faults import Origin

Ended = Literal["finished", "interrupted", "early_stopping"]
EvalHook = Callable[[int], Mapping[str, float]]
"""Called between steps with the number of steps done, on the first process only; its scores go into the log."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step, as all processes together made it."""

    step: int
    """From 1."""
    num_steps: int
    """Of the whole run."""
    stage: int
    """From 0."""
    loss: float
    """Mean cross entropy per label."""
    lr: Mapping[str, float]
    """Part -> rate of this step; with LoRA+ also ``part.B``."""
    grad_norm: float
    """Before clipping."""
    num_labels: int
    num_tokens: int
    tokens_per_s: float
    """Of the last steps, evaluations and checkpoints not counted."""
    memory_bytes: int
    """CUDA: the peak so far. Otherwise what the process holds now."""
    seconds_left: float


@dataclass(frozen=True, slots=True)
class EvalReport:
    """One evaluation between steps."""

    step: int
    """Steps done."""
    loss: float | None
    """Mean cross entropy per label over all held-out rows; None without any."""
    scores: Mapping[str, float]
    """What the hook found."""
    is_best: bool
    """Whether no earlier evaluation had so low a loss."""
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """What a whole run came to, earlier sessions of it included."""

    num_steps: int
    num_tokens: int
    seconds: float
    """In the steps themselves."""
    tokens_per_s: float
    peak_bytes: int
    last_loss: float
    best_step: int | None
    """With the lowest held-out loss; what the model holds now if early stopping was asked for."""
    ended: Ended


class TrainObserver(Protocol):
    """Who is told, on every process; called between steps."""

    def on_step(self, report: StepReport) -> None: ...

    def on_eval(self, report: EvalReport) -> None: ...

    def on_note(self, text: str) -> None: ...


class NonFiniteLoss(Exception):
    """A loss or a gradient that is no number. Nothing was learnt from the step, and nothing saved."""

    def __init__(self, step: int, loss: float, grad_norm: float, origins: Sequence[Origin]) -> None:
        """``step`` from 1; ``origins`` of the rows that it can have come from."""
        self.step, self.loss, self.grad_norm, self.origins = step, loss, grad_norm, tuple(origins)
        some = ", ".join(str(origin) for origin in self.origins[:8])
        more = f" and {len(self.origins) - 8} more" if len(self.origins) > 8 else ""
        super().__init__(
            f"step {step}: the loss is {loss} and the gradient's norm {grad_norm}, from the rows {some}{more}; the"
            " step was not taken: look at these rows, lower lr, or set max_grad_norm"
        )
