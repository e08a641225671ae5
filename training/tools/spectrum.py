"""Spectrum: what an adapter's change looks like inside, module by module. The work of ``inspect``.

Owns: singular values of each delta and the figures drawn from them: how many directions matter, and how large the
change is beside the base's weight. The delta itself is never made. Of DoRA the figures are of s B A, the change of
direction before each row is brought to its magnitude.
Place in a training run: none; it helps to choose the rank of the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from adapters.sites import PARTS, Part, Site
from training.tools.base_files import BaseFiles, find_base
from training.tools.low_rank import entropy_rank, rank_for_energy, singular_values
from training.tools.plain import part_of, read_adapter

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class SiteSpectrum:
    """One module."""

    name: str
    leaf: str
    part: Part
    layer: int | None
    """None for the merger."""
    rank: int
    values: tuple[float, ...]
    """Singular values of the delta, descending."""
    effective_rank: float
    """exp of the energies' entropy."""
    rank_90: int
    """Directions that hold 90 % of the squared norm."""
    rank_99: int
    norm: float
    """Frobenius norm of the delta."""
    of_base: float | None
    """The norm, over the norm of the base's weight; None where that is not at hand."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A whole adapter."""

    adapter: str
    kind: str
    base: str
    sites: tuple[SiteSpectrum, ...]

    @property
    def norm(self) -> float:
        return math.sqrt(sum(each.norm**2 for each in self.sites))

    def of(self, part: Part) -> tuple[SiteSpectrum, ...]:
        return tuple(each for each in self.sites if each.part == part)

    def by_layer(self) -> dict[tuple[Part, int | None], tuple[SiteSpectrum, ...]]:
        groups: dict[tuple[Part, int | None], list[SiteSpectrum]] = {}
        for each in self.sites:
            groups.setdefault((each.part, each.layer), []).append(each)
        return {key: tuple(found) for key, found in groups.items()}

    def as_dict(self) -> dict[str, object]:
        return {
            "adapter": self.adapter,
            "kind": self.kind,
            "base": self.base,
            "norm": self.norm,
            "sites": [{name: getattr(each, name) for name in each.__slots__} for each in self.sites],
        }

    @property
    def text(self) -> str:
        lines = [
            f"{self.adapter}: {self.kind}, {len(self.sites)} linears, norm of the change {self.norm:.4g}"
        ]
        lines += _table([_row(part, self.of(part)) for part in PARTS if self.of(part)])
        lines += ["", "by layer:"]
        lines += _table([_row(_layer_name(*key), found) for key, found in self.by_layer().items()])
        lines += ["", "by module:"]
        lines += _table([_row(each.name, (each,)) for each in self.sites])
        lines += ["", self._advice()]
        if self.kind == "dora":
            lines.append("DoRA: the figures are of s B A, before rows are brought to their magnitudes")
        return "\n".join(lines)

    def _advice(self) -> str:
        needed = max(each.rank_99 for each in self.sites)
        rank = max(each.rank for each in self.sites)
        middle = int(median(each.rank_99 for each in self.sites))
        if needed < rank:
            return f"rank {needed} of {rank} holds 99 % of every change: lorikeet adapters shrink --rank {needed}"
        return f"half of the linears need rank {middle} or less of {rank} for 99 %: see shrink --energy 0.99"


def inspect(
    adapter: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    on_progress: Progress = lambda phase, done, total: None,
) -> Spectrum:
    """The spectrum of a package; with the base's weights where they are at hand.

    Raises AdapterRejected, and BaseNotAtHand for a base that was named and cannot be read.
    """
    named = read_adapter(adapter).manifest.base_name
    with find_base(named, base, revision) as found:
        read = read_adapter(adapter, found.sites)
        sites: list[SiteSpectrum] = []
        for number, (name, weights) in enumerate(read.weights.sites.items(), 1):
            values = singular_values(weights.a, weights.b)
            sites.append(_site(read.sites[name], weights.a.shape[0], values, _base_norm(found.files, name)))
            on_progress("decompose", number, len(read.weights.sites))
        return Spectrum(adapter.name, read.report.kind, found.name, tuple(sites))


def _site(site: Site, rank: int, values: Tensor, base_norm: float | None) -> SiteSpectrum:
    size = float(torch.linalg.vector_norm(values))
    return SiteSpectrum(
        name=site.name,
        leaf=site.leaf,
        part=part_of(site.name),
        layer=next((int(token) for token in site.name.split(".")[:-1] if token.isdigit()), None),
        rank=rank,
        values=tuple(values.tolist()),
        effective_rank=entropy_rank(values),
        rank_90=rank_for_energy(values, 0.90),
        rank_99=rank_for_energy(values, 0.99),
        norm=size,
        of_base=None if not base_norm else size / base_norm,
    )


def _base_norm(files: BaseFiles | None, name: str) -> float | None:
    """|W| of a 16-bit base; None where it is away or in 4 bits."""
    stored = None if files is None or files.is_quantised else files.weights.get(name)
    if files is None or stored is None:
        return None
    return float(torch.linalg.vector_norm(files.read(stored).float()))


_HEADER = ("", "linears", "rank", "effective", "90 %", "99 %", "norm", "of base")


def _layer_name(part: Part, layer: int | None) -> str:
    return part if layer is None else f"{part} {layer}"


def _row(name: str, found: Sequence[SiteSpectrum]) -> tuple[str, ...]:
    shares = [each.of_base for each in found if each.of_base is not None]
    return (
        name,
        str(len(found)),
        str(max(each.rank for each in found)),
        f"{fmean(each.effective_rank for each in found):.1f}",
        f"{fmean(each.rank_90 for each in found):.1f}",
        f"{fmean(each.rank_99 for each in found):.1f}",
        f"{math.sqrt(sum(each.norm**2 for each in found)):.4g}",
        f"{100 * fmean(shares):.2f} %" if shares else "-",
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width: means of ranks and shares over the linears of a row, the whole norm."""
    table = [_HEADER, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADER))]
    return [
        "  "
        + "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in table
    ]


def grid_of(
    sites: Sequence[SiteSpectrum], value: Callable[[SiteSpectrum], float]
) -> Mapping[str, dict[int, float]]:
    """Leaf name -> layer -> value; the merger's modules stand in layer 0."""
    grid: dict[str, dict[int, float]] = {}
    for each in sites:
        grid.setdefault(each.leaf, {})[each.layer or 0] = value(each)
    return grid
