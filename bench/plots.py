"""Plots of results with matplotlib: throughput and latency as bars, a rate sweep as curves. PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.results import Cell, label_of

COLOURS = ("#2b7a78", "#e07a5f", "#3d5a80", "#f2cc8f", "#81b29a", "#9b5de5")
mpl.rcParams["svg.hashsalt"] = "lorikeet"  # the same figures give the same file


def throughput_plot(cells: Sequence[Cell], device: str, paths: Sequence[Path]) -> bool:
    """Output tokens a second by workload and server, with the lowest and highest repeat. False if there are none."""
    return _bars(cells, "output_tokens_per_s", "output tokens/s", device, paths)


def latency_plot(cells: Sequence[Cell], device: str, paths: Sequence[Path]) -> bool:
    """99th percentile of the first token, the same way."""
    return _bars(cells, "first_token_ms_p99", "first token, p99, ms", device, paths)


def _bars(cells: Sequence[Cell], figure: str, title: str, device: str, paths: Sequence[Path]) -> bool:
    found = [cell for cell in cells if figure in _mapping(cell, "median")]
    if not found:
        return False
    workloads = list(dict.fromkeys(str(cell["workload"]) for cell in found))
    labels = list(dict.fromkeys(label_of(cell) for cell in found))
    sheet = Figure(figsize=(max(6.0, 0.5 * len(workloads) * len(labels) + 3), 4.2), layout="constrained")
    axes = sheet.add_subplot()
    width = 0.8 / len(labels)
    for place, label in enumerate(labels):
        own = {str(cell["workload"]): cell for cell in found if label_of(cell) == label}
        spots = [spot for spot, workload in enumerate(workloads) if workload in own]
        chosen = [own[workloads[spot]] for spot in spots]
        middle = [_mapping(cell, "median")[figure] for cell in chosen]
        ends = [_ends(cell, figure) for cell in chosen]
        below = [max(0.0, mid - low) for mid, (low, _) in zip(middle, ends, strict=True)]
        above = [max(0.0, high - mid) for mid, (_, high) in zip(middle, ends, strict=True)]
        axes.bar(
            [spot + (place - (len(labels) - 1) / 2) * width for spot in spots],
            middle,
            width,
            yerr=[below, above],
            capsize=2,
            label=label,
            color=COLOURS[place % len(COLOURS)],
        )
    axes.set_xticks(range(len(workloads)), workloads, rotation=20, ha="right")
    axes.set_ylabel(title)
    _finish(sheet, axes_title=device, paths=paths)
    return True


def sweep_plot(cells: Sequence[Cell], device: str, paths: Sequence[Path]) -> bool:
    """Goodput over the offered rate, with the knee. False if no rates were swept."""
    found = [cell for cell in cells if isinstance(cell.get("sweep"), list)]
    if not found:
        return False
    sheet = Figure(figsize=(6, 4.2), layout="constrained")
    axes = sheet.add_subplot()
    for place, cell in enumerate(found):
        steps = cell["sweep"]
        rates = [step["rate"] for step in steps] if isinstance(steps, list) else []
        shares = [step["figures"]["goodput_share"] for step in steps] if isinstance(steps, list) else []
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(rates, shares, marker="o", color=colour, label=f"{label_of(cell)} {cell['workload']}")
        if isinstance(knee := cell.get("knee"), float):
            axes.axvline(knee, color=colour, linestyle=":")
    axes.set_xlabel("calls/s offered")
    axes.set_ylabel("share within the SLO")
    axes.set_ylim(0, 1.05)
    _finish(sheet, axes_title=device, paths=paths)
    return True


def _finish(sheet: Figure, *, axes_title: str, paths: Sequence[Path]) -> None:
    sheet.axes[0].legend(frameon=False, fontsize=8)
    save_sheet(sheet, axes_title=axes_title, paths=paths)


def save_sheet(sheet: Figure, *, axes_title: str, paths: Sequence[Path]) -> None:
    """The house's look, and every file; the same figures give the same SVG."""
    axes = sheet.axes[0]
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(axes_title, fontsize=9, loc="left")
    for path in paths:
        sheet.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _ends(cell: Cell, figure: str) -> tuple[float, float]:
    """The lowest and highest of the repeats."""
    runs = cell.get("runs")
    values = [run[figure] for run in runs if figure in run] if isinstance(runs, list) else []
    middle = _mapping(cell, "median")[figure]
    return min(values, default=middle), max(values, default=middle)


def _mapping(cell: Cell, key: str) -> dict[str, float]:
    found = cell.get(key)
    return found if isinstance(found, dict) else {}
