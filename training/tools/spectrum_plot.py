"""The picture of a spectrum: how the values fall, and where in the model the change is, for each part.

Owns the drawing. Place in a training run: none; ``inspect --plot`` writes it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adapters.sites import PARTS
from training.tools.spectrum import SiteSpectrum, Spectrum, grid_of


def plot_spectrum(spectrum: Spectrum, path: Path) -> None:
    """Write a PNG: for each part the decay, the effective rank and the size of the change by layer and module."""
    parts = [part for part in PARTS if spectrum.of(part)]
    figure = Figure(figsize=(15, 3.8 * len(parts)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(parts), 3, squeeze=False)
    for row, part in zip(axes, parts, strict=True):
        sites = spectrum.of(part)
        _decay(row[0], part, sites)
        _map(figure, row[1], f"{part}: effective rank", sites, [each.effective_rank for each in sites])
        has_base = all(each.of_base is not None for each in sites)
        sizes = [(100 * (each.of_base or 0)) if has_base else each.norm for each in sites]
        title = "change, % of the base's weight" if has_base else "norm of the change"
        _map(figure, row[2], f"{part}: {title}", sites, sizes)
    # by hand: the automatic layouts draw everything twice over
    figure.subplots_adjust(
        left=0.05, right=0.98, bottom=0.2 / len(parts), top=1 - 0.2 / len(parts), wspace=0.35, hspace=0.4
    )
    figure.suptitle(f"{spectrum.adapter}: {spectrum.kind}, {len(spectrum.sites)} linears")
    figure.savefig(path, format="png", dpi=110)


def _decay(axes: Axes, part: str, sites: tuple[SiteSpectrum, ...]) -> None:
    for each in sites:
        values = np.asarray(each.values)
        if values[0] > 0:
            axes.semilogy(range(1, len(values) + 1), np.maximum(values / values[0], 1e-9), alpha=0.35, lw=1)
    axes.set_ylim(1e-4, 1.5)
    axes.set_title(f"{part}: singular values, largest = 1")
    axes.set_xlabel("number")


def _map(
    figure: Figure, axes: Axes, title: str, sites: tuple[SiteSpectrum, ...], values: list[float]
) -> None:
    by_name = dict(zip((each.name for each in sites), values, strict=True))
    grid = grid_of(sites, lambda each: by_name[each.name])
    layers = sorted({layer for found in grid.values() for layer in found})
    table = np.array([[found.get(layer, np.nan) for layer in layers] for found in grid.values()])
    image = axes.imshow(table, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(grid)), list(grid))
    ticks = range(0, len(layers), max(1, len(layers) // 8))
    axes.set_xticks(ticks, [str(layers[tick]) for tick in ticks])
    axes.set_xlabel("layer")
    axes.set_title(title)
    figure.colorbar(image, ax=axes)
