"""Plots of claims and floors: measurements as multiples of targets, cells as shares of their floor's speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.plots import COLOURS, save_sheet
from bench.results import Cell, claims_of, label_of

MET, MISSED = COLOURS[0], COLOURS[1]


def claims_plot(cells: Sequence[Cell], device: str, paths: Sequence[Path]) -> bool:
    """How many times better than its target each claim is, from its worst to its best pair. False if there are none."""
    claims = [claim for claim in claims_of(cells) if claim["target"]]
    if not claims:
        return False
    sheet = Figure(figsize=(9, 0.34 * len(claims) + 1.2), layout="constrained")
    axes = sheet.add_subplot()
    for place, claim in enumerate(claims):
        middle, *ends = (_margin(claim, key) for key in ("measured", "lowest", "highest"))
        below, above = middle - min(ends), max(ends) - middle
        colour = MET if claim["is_met"] else MISSED
        axes.barh(place, middle - 1, 0.7, left=1, xerr=[[below], [above]], capsize=2, color=colour)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(claims)), [f"{claim['item']}  {claim['name']}" for claim in claims], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.set_xlabel("times better than the target (1 is met)")
    save_sheet(sheet, axes_title=device, paths=paths)
    return True


def _margin(claim: Mapping[str, object], key: str) -> float:
    """Over 1 is met, whichever way the claim goes; a measurement of 0 where less is better counts as a hundredth."""
    value, target = float(str(claim[key])), float(str(claim["target"]))
    return value / target if claim["sense"] == "at least" else target / max(value, 0.01 * target)


def floors_plot(cells: Sequence[Cell], device: str, paths: Sequence[Path]) -> bool:
    """The share of the floor's speed that each cell reached. False if none has a floor."""
    found = [(cell, floor) for cell in cells if isinstance(floor := cell.get("floor"), dict)]
    if not found:
        return False
    sheet = Figure(figsize=(8, 0.4 * len(found) + 1.2), layout="constrained")
    axes = sheet.add_subplot()
    axes.barh(range(len(found)), [100 * floor["share"] for _, floor in found], 0.7, color=COLOURS[0])
    axes.set_yticks(
        range(len(found)), [f"{cell['workload']}, {label_of(cell)}" for cell, _ in found], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the speed that this machine's bytes and operations allow")
    save_sheet(sheet, axes_title=device, paths=paths)
    return True
