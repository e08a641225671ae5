"""Reporters: tensorboard, wandb and mlflow, through transformers' callbacks.

Owns: that what is asked for is there before anything is loaded, and the names under which numbers appear. Does not
know: how they are sent. Place in a training run: asked at its start, told by the loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from training.loop.observer import EvalReport, StepReport

_PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
"""Reporter -> packages of which one must be there."""


class ReporterMissing(Exception):
    """The recipe reports to what is not installed, or not known."""


def check_reporters(names: Sequence[str]) -> None:
    """Raises ReporterMissing."""
    for name in names:
        packages = _PACKAGES.get(name)
        if packages is None:
            raise ReporterMissing(f"report_to names {name!r}; there are {', '.join(_PACKAGES)}")
        if not any(find_spec(package) is not None for package in packages):
            raise ReporterMissing(
                f"report_to names {name}, which is not installed here: pip install {packages[0]}, or leave it out"
            )


def step_numbers(report: StepReport) -> dict[str, float]:
    """As transformers' callbacks take them."""
    return {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "tokens_per_s": report.tokens_per_s,
        "memory_gib": report.memory_bytes / 2**30,
        "stage": float(report.stage),
        **{f"lr_{part}": rate for part, rate in report.lr.items()},
    }


def eval_numbers(report: EvalReport) -> dict[str, float]:
    """As transformers' callbacks take them."""
    loss = {} if report.loss is None else {"eval_loss": report.loss}
    return {**loss, **{f"eval_{name}": score for name, score in report.scores.items()}}
