"""AdapterWeights: one adapter as numbers, ready for a slot.

Owns the last step from file to memory: every key layout normalised to sites, the scale folded into B once, in fp32.
Does not check numbers again, which ``validation`` has done, and knows no device: the mover copies what this returns
into slots.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from adapters.errors import AdapterRejected, RejectReason, SourceRejected
from adapters.package import WEIGHTS_NAME, open_package_file, package_digest
from adapters.placement import Placement
from adapters.profile import Proof, read_profile
from adapters.safetensors_header import TensorInfo
from adapters.sites import SiteTable
from adapters.validation import Limits, place_package, read_manifest

_ACCEPTED = Limits(*[sys.maxsize] * 5)
"""Its sizes were judged when it was accepted, by the limits of that day."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """What one adapter adds at one site: ``y += (x @ a.T) @ b.T``; DoRA then rescales by its magnitude."""

    a: Tensor  # [R, in] float32
    b: Tensor  # [out, R] float32, scale folded in
    magnitude: Tensor | None  # [out] float32; DoRA only

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.a, self.b, self.magnitude) if tensor is not None)


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """All sites that one adapter changes; ``num_bytes`` is what it takes on the host, in fp32."""

    sites: Mapping[str, SiteWeights]
    num_bytes: int
    max_rank: int
    digest: str
    proof: Proof | None = None
    """What its ``lorikeet.json`` lets a server check; None where it has none."""
    num_parts: int = 1
    """How many adapters were composed into it."""


def load_weights(folder: Path, sites: SiteTable, *, digest: str = "") -> AdapterWeights:
    """The weights of a package that ``check_package`` has accepted against the same sites.

    Names, shapes and offsets are taken through the same code as the check. ``digest`` saves hashing where the caller
    knows it. Raises AdapterRejected or SourceRejected if the package is gone or is not what was accepted.
    """
    try:
        manifest = read_manifest(folder, _ACCEPTED)
        profile = read_profile(folder)
        with open_package_file(folder, WEIGHTS_NAME) as file:
            placements = place_package(file, manifest, sites, _ACCEPTED)
            loaded = {placement.site.name: _load_site(file, placement) for placement in placements}
    except FileNotFoundError:
        raise AdapterRejected(RejectReason.MISSING_FILE, "the package is no longer in the store") from None
    except OSError as error:
        raise SourceRejected(f"the package cannot be read: {error.strerror}") from None
    acting = {name: weights for name, weights in loaded.items() if weights is not None}
    if not acting:
        raise AdapterRejected(
            RejectReason.NO_EFFECT, "the adapter changes nothing: B @ A is zero at every site"
        )
    return AdapterWeights(
        sites=acting,
        num_bytes=sum(weights.num_bytes for weights in acting.values()),
        max_rank=max(weights.a.shape[0] for weights in acting.values()),
        digest=digest or package_digest(folder),
        proof=None if profile is None else profile.proof,
    )


def _load_site(file: BufferedReader, placement: Placement) -> SiteWeights | None:
    """None where the adapter adds exactly nothing, e.g. at sites that were frozen in training."""
    a, b = _read(file, placement.a), _read(file, placement.b)
    if placement.magnitude is None and (placement.scale == 0 or not _has_any(a) or not _has_any(b)):
        return None
    magnitude = None if placement.magnitude is None else _read(file, placement.magnitude).float()
    return SiteWeights(a.float(), b.float().mul_(placement.scale), magnitude)


def _read(file: BufferedReader, info: TensorInfo) -> Tensor:
    """One tensor as stored. Read, never mapped: a file cut short must not kill the process."""
    file.seek(info.begin)
    data = bytearray(info.num_bytes)
    if file.readinto(data) != info.num_bytes:
        raise AdapterRejected(
            RejectReason.BAD_TENSOR_FILE, "adapter_model.safetensors was cut short while it was read"
        )
    return torch.frombuffer(data, dtype=_DTYPES[info.dtype]).reshape(info.shape)


def _has_any(tensor: Tensor) -> bool:
    """The first row nearly always settles it."""
    return bool(tensor[0].any()) or bool(tensor.any())
