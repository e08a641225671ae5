"""Every reason to refuse a package, checked before any device memory is touched."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.sites import Part, SiteTable

Kind = Literal["lora", "rslora", "dora"]
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps on one package. Sizes in bytes."""

    max_rank: int = 64
    max_package_bytes: int = 2048 * MIB
    max_config_bytes: int = MIB
    max_header_bytes: int = 4 * MIB


@dataclass(frozen=True, slots=True)
class PackageReport:
    """What a checked package is."""

    kind: Kind
    digest: str
    vision_digest: str
    language_digest: str
    num_bytes: int
    rank: int
    targets: tuple[str, ...]
    parts: tuple[Part, ...]
    num_sites: int


def check_package(
    folder: Path, sites: SiteTable, limits: Limits, base_names: Collection[str]
) -> PackageReport:
    raise NotImplementedError
