"""The plot of a sweep: bars of every experiment, and lines over the grid's first numeric key.

Owns: the drawing, on matplotlib's Agg canvas without its global state. Does not know: which experiment is best.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from training.evaluation.catalogue import measure
from training.sweep.table import SweepRow, SweepTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BEST, _PASSES, _BELOW, _FAILED = "#137333", "#8ab4f8", "#dadce0", "#a50e0e"
_ROW_INCHES: Final = 0.34


def draw_sweep(table: SweepTable, path: Path) -> None:
    """Write the PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _lines(table)
    figure = Figure(
        figsize=(11 if lines else 7, max(3.0, 1.4 + _ROW_INCHES * len(table.rows))), layout="constrained"
    )
    canvas = FigureCanvasAgg(figure)
    _draw_bars(figure.add_subplot(1, 2 if lines else 1, 1), table)
    if lines:
        _draw_lines(figure.add_subplot(1, 2, 2), table, lines)
    draft = path.with_name(f".{path.name}.draft")
    canvas.print_figure(str(draft), format="png", dpi=110)
    draft.replace(path)


def _draw_bars(axes: Axes, table: SweepTable) -> None:
    names = [row.experiment.name for row in table.rows]
    scores = [row.score(table.best_by) for row in table.rows]
    axes.barh(
        range(len(names)),
        [score or 0.0 for score in scores],
        color=[_color(table, row) for row in table.rows],
    )
    for place, (row, score) in enumerate(zip(table.rows, scores, strict=True)):
        label = measure(table.best_by).shown(score) + (" best" if row is table.best else "")
        failed = f"failed: {row.outcome}"[:40] if isinstance(row.outcome, str) else label
        axes.text(
            score or 0.0,
            place,
            f" {failed}",
            va="center",
            fontsize=8,
            color=_FAILED if row.result is None else "black",
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel(_label(table))
    axes.set_title("green: best; grey: below the gate", fontsize=9)


def _color(table: SweepTable, row: SweepRow) -> str:
    if row is table.best:
        return _BEST
    return _PASSES if row.result and row.result.passed else _BELOW


def _draw_lines(axes: Axes, table: SweepTable, lines: Mapping[str, list[tuple[float, float]]]) -> None:
    for label, points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", label=label or None)
    axes.set_xlabel(_numeric_key(table))
    axes.set_ylabel(_label(table))
    if len(lines) > 1:
        axes.legend(fontsize=8)


def _lines(table: SweepTable) -> dict[str, list[tuple[float, float]]]:
    """For each setting of the other keys, points (value of the numeric key, score)."""
    key = _numeric_key(table)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows if key else ():
        x, y = row.experiment.changes.get(key), row.score(table.best_by)
        if isinstance(x, (int, float)) and y is not None:
            others = ", ".join(
                f"{name} {value}" for name, value in row.experiment.changes.items() if name != key
            )
            lines.setdefault(others, []).append((float(x), y))
    return lines


def _numeric_key(table: SweepTable) -> str:
    """The first key of the grid that has two numbers or more; empty if there is none."""
    keys = dict.fromkeys(key for row in table.rows for key in row.experiment.changes)
    for key in keys:
        values = {
            row.experiment.changes.get(key)
            for row in table.rows
            if _is_number(row.experiment.changes.get(key))
        }
        if len(values) > 1:
            return key
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _label(table: SweepTable) -> str:
    found = measure(table.best_by)
    return f"{found.title} ({found.unit})"
