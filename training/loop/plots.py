"""The loss of a run as a picture: each step's, its smoothed course, the held-out rows', and where stages begin.

Owns: the drawing. Does not know: how the loss came about. Place in a training run: after its last step, from its log.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from training.loop.runlog import read_log

PLOT: Final = "loss.png"
_STEP, _COURSE, _HELD_OUT, _RULE = "#b8c7d9", "#1f5a99", "#c4501b", "#888888"


def plot_loss(log: Path, picture: Path) -> Path | None:
    """Draw ``log`` into the PNG ``picture``, whole or not at all; None when the log tells of no step."""
    events = list(read_log(log))
    steps = [event for event in events if event["event"] == "step"]
    if not steps:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.11, top=0.93)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    at, losses = _numbers(steps, "step"), _numbers(steps, "loss")
    axes.plot(at, losses, color=_STEP, linewidth=1, label="each step")
    axes.plot(at, _smoothed(losses), color=_COURSE, linewidth=1.8, label="smoothed")
    held_out = [event for event in events if event["event"] == "eval" and event.get("loss") is not None]
    if held_out:
        axes.plot(
            _numbers(held_out, "step"), _numbers(held_out, "loss"), color=_HELD_OUT, marker="o", markersize=4,
            linewidth=1.2, label="held-out rows",
        )  # fmt: skip
    for before, after in pairwise(steps):
        if before["stage"] != after["stage"]:
            axes.axvline(float(str(before["step"])) + 0.5, color=_RULE, linewidth=0.8, linestyle=":")
    axes.set(xlabel="optimizer step", ylabel="cross entropy per label", title="Loss")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.25)
    axes.legend(frameon=False)
    draft = picture.with_name(f".{picture.name}.draft")
    figure.savefig(draft, format="png")
    draft.replace(picture)
    return picture


def _numbers(events: Sequence[dict[str, object]], key: str) -> list[float]:
    return [float(str(event[key])) for event in events]


def _smoothed(losses: Sequence[float]) -> list[float]:
    """An exponential mean over about a twentieth of the run, its beginning not drawn to zero."""
    keep = 1 - 1 / max(2.0, len(losses) / 20)
    course: list[float] = []
    mean = weight = 0.0
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        course.append(mean / weight)
    return course
