"""Merging: one site's stored weight with its adapter in it, and what rounding took away.

Owns the formulas and the figures. Knows no files. Place in a training run: none; ``export`` calls it site by site.
LoRA: W + s B A. DoRA (arXiv:2402.09353, as PEFT computes it): each row of that brought to its magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.weights import SiteWeights
from training.tools.refusals import ExportRefused

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""The largest relative error of rounding one number to each type."""


@dataclass(frozen=True, slots=True)
class SiteFigure:
    """How true one stored weight is."""

    site: str
    error: float
    """|stored - merged| / |merged|: rounding, and nothing else."""
    limit: float
    delta: float
    """|merged - base| / |base|."""
    kept: float
    """Cosine of the stored change with the adapter's change: 1 when rounding has left all of it."""

    @property
    def is_true(self) -> bool:
        return self.error <= self.limit


def merged_weight(weight: Tensor, adapter: SiteWeights) -> Tensor:
    """The weight [out, in] float32 of base and adapter together; ``weight`` in any float type, left as it is."""
    merged = torch.addmm(weight.float(), adapter.b.to(weight.device), adapter.a.to(weight.device))
    if adapter.magnitude is not None:
        norms = torch.linalg.vector_norm(merged, dim=1)
        merged *= (adapter.magnitude.to(weight.device) / norms)[:, None]
    return merged


def rounded(site: str, merged: Tensor, dtype: torch.dtype) -> Tensor:
    """``merged`` in the stored type. Raises ExportRefused when that cannot hold it."""
    stored = merged.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise ExportRefused(
            f"{site}: base and adapter together do not fit {str(dtype).removeprefix('torch.')}: "
            "export with --dtype bfloat16 or float32, or look at the adapter with lorikeet adapters inspect"
        )
    return stored


def figure(site: str, base: Tensor, merged: Tensor, stored: Tensor) -> SiteFigure:
    """All [out, in]: the base's weight, what it must become in float32, and what is on the disk."""
    plain, kept = base.float(), stored.float()
    wanted = merged - plain
    return SiteFigure(
        site=site,
        error=_ratio(_norm(kept - merged), _norm(merged)),
        limit=ROUNDING[stored.dtype] * 1.01,  # the sums of fp32 round too
        delta=_ratio(_norm(wanted), _norm(plain)),
        kept=_cosine(kept - plain, wanted),
    )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0 else float("inf"))


def _cosine(one: Tensor, other: Tensor) -> float:
    norms = _norm(one) * _norm(other)
    return float((one * other).sum()) / norms if norms else (1.0 if _norm(other) == 0 else 0.0)
