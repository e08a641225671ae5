"""check_package: every reason to refuse a package, before any device memory is touched.

Owns the order of the checks, from cheap to dear: files, configuration, base, the tensor file's header, names and
shapes, and at last the numbers. Reads data, never code: no pickle, no regular expression of the package's, no import.
Only the probe that runs the model comes after it, in the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from adapters.base_contract import check_base
from adapters.content import Content, examine
from adapters.errors import AdapterRejected, RejectReason, SourceRejected
from adapters.manifest import AdapterManifest, Kind, parse_manifest
from adapters.package import (
    CONFIG_NAME,
    PROFILE_NAME,
    WEIGHTS_NAME,
    file_sha256,
    missing_file,
    open_package_file,
    package_digest,
)
from adapters.placement import Placement, place
from adapters.profile import MAX_PROFILE_BYTES, Json, PackageProfile, read_profile
from adapters.safetensors_header import read_header
from adapters.sites import PARTS, Part, SiteTable

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps on one package; sizes in bytes."""

    max_rank: int = 64
    max_package_bytes: int = 2048 * MIB
    """Rank 64 on all linears of the 7B takes 0.7 GiB in fp32; beyond 2 GiB it is not a LoRA."""
    max_config_bytes: int = MIB
    """PEFT writes about 1 KiB; target lists that name every module reach some 100 KiB."""
    max_profile_bytes: int = MAX_PROFILE_BYTES
    """``lorikeet.json`` carries a recipe, and probe prompts with logits."""
    max_header_bytes: int = 4 * MIB
    """An adapter on all linears of the 3B with DoRA has 1,242 tensors and a header of 250 KiB; the format's own
    reader would parse 100 MB."""


@dataclass(frozen=True, slots=True)
class PackageReport:
    """What a checked package is. Sites at which it adds exactly nothing do not count."""

    kind: Kind
    digest: str
    vision_digest: str
    """Of the weights in the vision tower and merger, with their scales; empty when there are none."""
    language_digest: str
    """Of the weights in the language model, with their scales; empty when there are none."""
    num_bytes: int
    """Of the tensors, as stored."""
    rank: int
    """The largest."""
    targets: tuple[str, ...]
    """Leaf names, e.g. ``q_proj``, in the base's order."""
    parts: tuple[Part, ...]
    num_sites: int
    defaults: str = "{}"
    """JSON object: what ``lorikeet.json`` says a request is to be served with where it says nothing itself."""


ReadDefaults = Callable[[Json], str]
"""``profile`` of ``lorikeet.json`` -> the JSON object of its serving defaults. Raises AdapterRejected (bad_config)."""


def no_defaults(profile: Json) -> str:
    """For whoever serves no requests."""
    return "{}"


def check_package(
    folder: Path,
    sites: SiteTable,
    limits: Limits,
    base_names: Collection[str],
    *,
    base_fingerprint: str = "",
    within: Path | None = None,
    read_defaults: ReadDefaults = no_defaults,
) -> PackageReport:
    """Check all of a package against a base. Links in it may not lead out of ``within`` (the folder, if not given).

    Raises AdapterRejected with its reason, or SourceRejected when the folder itself cannot be read.
    """
    if not folder.is_dir():
        raise SourceRejected("the source is not a folder that can be read")
    try:
        manifest = read_manifest(folder, limits, within)
        profile = read_profile(folder, within, limits.max_profile_bytes) or PackageProfile()
        check_base(manifest.base_name, profile.base.fingerprint, base_names, base_fingerprint)
        with _open(folder, WEIGHTS_NAME, limits.max_package_bytes, within) as file:
            placements = place_package(file, manifest, sites, limits)
            content = examine(file, placements)
            _check_weights(file, profile.weights_sha256)
        return _report(manifest, package_digest(folder, within), content, read_defaults(profile.profile))
    except OSError as error:
        raise SourceRejected(f"the package cannot be read: {error.strerror}") from None


def read_manifest(folder: Path, limits: Limits, within: Path | None = None) -> AdapterManifest:
    with _open(folder, CONFIG_NAME, limits.max_config_bytes, within) as file:
        return parse_manifest(file.read())


def place_package(
    file: BinaryIO, manifest: AdapterManifest, sites: SiteTable, limits: Limits
) -> tuple[Placement, ...]:
    """The placements of an opened tensor file, from its header alone."""
    num_bytes = os.fstat(file.fileno()).st_size
    return place(manifest, read_header(file, num_bytes, limits.max_header_bytes), sites, limits.max_rank)


def _open(folder: Path, name: str, max_bytes: int, within: Path | None) -> BufferedReader:
    try:
        file = open_package_file(folder, name, within)
    except FileNotFoundError:
        raise missing_file(folder, name) from None
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes > max_bytes:
        file.close()
        raise AdapterRejected(
            RejectReason.TOO_LARGE,
            f"{name} has {num_bytes} bytes; this server allows {max_bytes}: is it an adapter?",
        )
    return file


def _check_weights(file: BufferedReader, recorded: str) -> None:
    """What ``lorikeet.json`` tells is of these weights, or of none."""
    if not recorded:
        return
    file.seek(0)
    found = file_sha256(file)
    if found != recorded:
        raise AdapterRejected(
            RejectReason.DIGEST_MISMATCH,
            f"{PROFILE_NAME} was written for other weights: the package's files were mixed up, or the weights were "
            f"changed afterwards; package them again, or remove {PROFILE_NAME}",
            (found, recorded),
        )


def _report(manifest: AdapterManifest, digest: str, content: Content, defaults: str) -> PackageReport:
    placed = content.placements
    return PackageReport(
        kind=manifest.kind,
        digest=digest,
        vision_digest=content.vision_digest,
        language_digest=content.language_digest,
        num_bytes=sum(info.num_bytes for placement in placed for _, info in placement.tensors),
        rank=max(placement.rank for placement in placed),
        targets=tuple(dict.fromkeys(placement.site.leaf for placement in placed)),
        parts=tuple(part for part in PARTS if any(placement.site.part == part for placement in placed)),
        num_sites=len(placed),
        defaults=defaults,
    )
