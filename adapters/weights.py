"""AdapterWeights: one adapter as numbers, ready for a slot.

Owns the last step from file to memory: every key layout normalised to sites, the scale folded into B once, in fp32.
Does not check what ``validation`` has checked, and knows no device: the mover copies what this returns into slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adapters.sites import SiteTable


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """What one adapter adds at one site: ``y += (x @ a.T) @ b.T``; DoRA then rescales by its magnitude."""

    a: Tensor  # [R, in] float32
    b: Tensor  # [out, R] float32, scale folded in
    magnitude: Tensor | None  # [out] float32; DoRA only


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """All sites that one adapter touches. ``num_bytes`` is what it takes on the host, in fp32."""

    sites: Mapping[str, SiteWeights]
    num_bytes: int
    max_rank: int
    digest: str


def load_weights(folder: Path, sites: SiteTable) -> AdapterWeights:
    """The weights of a package that ``check_package`` has accepted against the same sites."""
    raise NotImplementedError
