"""Plain adapters: what the tools for finished adapters read, and the one form that they write.

Owns: reading a package that our server would accept into factors, and writing factors as plain LoRA (or DoRA) in
today's names, any rsLoRA scale and any pattern written out as an alpha for each module. Does not know foreign forms.
Place in a training run: none; import, shrink and the check of an export write through it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from adapters.keys import Role, parse_key
from adapters.manifest import AdapterManifest
from adapters.package import CONFIG_NAME, WEIGHTS_NAME, open_package_file
from adapters.safetensors_header import read_header
from adapters.sites import Part, Site
from adapters.validation import Limits, PackageReport, check_package, read_manifest
from adapters.weights import AdapterWeights, load_weights

ANY_SIZE = Limits(max_rank=2**31, max_package_bytes=2**40)
"""A person's own file on a person's own machine: whether a server takes it is that server's to say."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainSite:
    """What is written for one module: ``y += alpha / R * (x @ a.T) @ b.T``; DoRA then rescales."""

    a: Tensor  # [R, in]
    b: Tensor  # [out, R]
    alpha: float
    magnitude: Tensor | None = None  # [out]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, eq=False)
class ReadAdapter:
    """A package that holds: its numbers, and what was found when it was checked."""

    weights: AdapterWeights
    sites: Mapping[str, Site]
    report: PackageReport
    manifest: AdapterManifest

    def as_plain(self) -> dict[str, PlainSite]:
        """The same numbers, every scale folded into B."""
        return {
            name: PlainSite(site.a, site.b, float(site.a.shape[0]), site.magnitude)
            for name, site in self.weights.sites.items()
        }


def read_adapter(folder: Path, sites: Mapping[str, Site] | None = None) -> ReadAdapter:
    """Check and read a package. Without a base's ``sites`` its own shapes stand for them.

    Raises AdapterRejected or SourceRejected.
    """
    table = sites_of(folder) if sites is None else sites
    report = check_package(folder, table, ANY_SIZE, ())
    weights = load_weights(folder, table, digest=report.digest)
    return ReadAdapter(weights, table, report, read_manifest(folder, ANY_SIZE))


def sites_of(folder: Path) -> dict[str, Site]:
    """The sites that a package's own tensors tell of. Tensors of no known name tell of none."""
    try:
        with open_package_file(folder, WEIGHTS_NAME) as file:
            tensors = read_header(file, os.fstat(file.fileno()).st_size, ANY_SIZE.max_header_bytes)
    except FileNotFoundError:
        return {}  # check_package says what is there instead
    widths: dict[str, dict[Role, int]] = {}
    for name, info in tensors.items():
        key = parse_key(name)
        if key is not None and key.role is not Role.MAGNITUDE and len(info.shape) == 2:
            widths.setdefault(key.site, {})[key.role] = info.shape[1 if key.role is Role.A else 0]
    return {
        name: Site(name, found[Role.A], found[Role.B], part_of(name))
        for name, found in widths.items()
        if len(found) == 2
    }


def part_of(site: str) -> Part:
    if site.startswith("model.visual.merger."):
        return "merger"
    return "vision" if site.startswith("model.visual.") else "language"


def write_plain(
    folder: Path,
    sites: Mapping[str, PlainSite],
    base_name: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into an existing folder, for stock PEFT.

    ``dtype`` None keeps each tensor's own. Raises ValueError when there is no site.
    """
    config = plain_config(sites, base_name)
    save_file(
        {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in _tensors(sites).items()},
        folder / WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))
    if not (folder / CONFIG_NAME).is_file():
        raise OSError(f"PEFT wrote no {CONFIG_NAME}")


def plain_config(sites: Mapping[str, PlainSite], base_name: str) -> LoraConfig:
    """The commonest rank and alpha for all, and a pattern, with whole module names, for each that differs."""
    if not sites:
        raise ValueError("an adapter without a module cannot be written")
    rank = Counter(site.rank for site in sites.values()).most_common(1)[0][0]
    alpha = Counter(site.alpha for site in sites.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=_whole(alpha),
        rank_pattern={name: site.rank for name, site in sites.items() if site.rank != rank},
        alpha_pattern={name: _whole(site.alpha) for name, site in sites.items() if site.alpha != alpha},
        target_modules=list(sites),
        use_dora=any(site.magnitude is not None for site in sites.values()),
        base_model_name_or_path=base_name or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def _whole(alpha: float) -> int:
    """PEFT declares alpha as int and takes any number; a whole one is written without its ``.0``."""
    return int(alpha) if alpha == int(alpha) else alpha  # type: ignore[return-value]


def _tensors(sites: Mapping[str, PlainSite]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = site.a
        tensors[f"base_model.model.{name}.lora_B.weight"] = site.b
        if site.magnitude is not None:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = site.magnitude
    return tensors
