"""The numbers of a package, looked at before they are trusted: finite, with an effect, and named by digest.

Owns one pass over the tensors, site by site, on the CPU and without torch. Knows nothing of devices or the base's
weights: whether DoRA's magnitudes change anything is left to the probe that runs the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from adapters.errors import AdapterRejected, RejectReason
from adapters.keys import Role
from adapters.placement import Placement
from adapters.safetensors_header import TensorInfo

Bits = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Content:
    """What the tensors of a package amount to. Placements that add exactly nothing are left out."""

    placements: tuple[Placement, ...]
    language_digest: str
    vision_digest: str


def examine(file: BinaryIO, placements: Sequence[Placement]) -> Content:
    """Read every tensor once. Raises AdapterRejected: non_finite, no_effect, bad_tensor_file (cut short meanwhile)."""
    effective: list[Placement] = []
    halves = {True: hashlib.sha256(), False: hashlib.sha256()}
    is_proved = False
    for placement in sorted(placements, key=lambda placement: placement.site.name):
        bits = {role: read_bits(file, info) for role, info in placement.tensors}
        _check_finite(placement, bits)
        if not _may_act(placement, bits):
            continue
        is_proved = is_proved or placement.magnitude is not None or _product_is_nonzero(placement, bits)
        effective.append(placement)
        _update(halves[placement.site.part == "language"], placement, bits)
    if not is_proved:
        raise AdapterRejected(
            RejectReason.NO_EFFECT,
            "the adapter changes nothing: B @ A is zero at every site; was it saved before training?",
        )
    acting = {placement.site.name for placement in effective}
    return Content(
        placements=tuple(placement for placement in placements if placement.site.name in acting),
        language_digest=_digest(halves[True], effective, is_language=True),
        vision_digest=_digest(halves[False], effective, is_language=False),
    )


def read_bits(file: BinaryIO, info: TensorInfo) -> Bits:
    """One tensor's raw bits, in its shape. Never a memory map: a file cut short must not kill the process."""
    file.seek(info.begin)
    data = file.read(info.num_bytes)
    if len(data) != info.num_bytes:
        raise AdapterRejected(
            RejectReason.BAD_TENSOR_FILE, "adapter_model.safetensors was cut short while it was read"
        )
    bits: Bits = np.frombuffer(data, np.uint32) if info.dtype == "F32" else np.frombuffer(data, np.uint16)
    return bits.reshape(info.shape)


def to_float32(bits: Bits, dtype: str) -> NDArray[np.float32]:
    """The values, exactly; a copy only where the type is not F32."""
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
_UNSIGNED = {"F32": 0x7FFFFFFF, "F16": 0x7FFF, "BF16": 0x7FFF}


def is_zero(bits: Bits, dtype: str) -> bool:
    return not np.any(bits & bits.dtype.type(_UNSIGNED[dtype]))


def _largest(bits: Bits, dtype: str) -> float:
    """The largest absolute value: without their sign, the bits of floats are in the floats' own order."""
    largest = np.max(bits & bits.dtype.type(_UNSIGNED[dtype]), keepdims=True)
    return float(to_float32(largest, dtype).reshape(()))


def _check_finite(placement: Placement, bits: dict[Role, Bits]) -> None:
    for role, info in placement.tensors:
        exponent = bits[role].dtype.type(_EXPONENT[info.dtype])
        if np.any((bits[role] & exponent) == exponent):
            raise _non_finite(placement, role, "holds NaN or infinity; the training run diverged")
    scaled = _largest(bits[Role.B], placement.b.dtype) * abs(placement.scale)
    if scaled > float(np.finfo(np.float32).max):
        raise _non_finite(placement, Role.B, f"overflows when scaled by {placement.scale:g}; lower alpha")


def _non_finite(placement: Placement, role: Role, what: str) -> AdapterRejected:
    name = f"{placement.site.name}.{role}"
    return AdapterRejected(RejectReason.NON_FINITE, f"{name} {what}", (name,))


def _may_act(placement: Placement, bits: dict[Role, Bits]) -> bool:
    if placement.magnitude is not None:
        return True
    is_null = is_zero(bits[Role.A], placement.a.dtype) or is_zero(bits[Role.B], placement.b.dtype)
    return placement.scale != 0 and not is_null


def _product_is_nonzero(placement: Placement, bits: dict[Role, Bits]) -> bool:
    """Whether B @ A has any entry but zero, without making it: |BA|^2 = sum((B'B) * (AA')), in R x R."""
    a = to_float32(bits[Role.A], placement.a.dtype).astype(np.float64)
    b = to_float32(bits[Role.B], placement.b.dtype).astype(np.float64)
    return bool(np.sum((b.T @ b) * (a @ a.T)) > 0)


def _update(digest: hashlib._Hash, placement: Placement, bits: dict[Role, Bits]) -> None:
    digest.update(f"{placement.site.name} {placement.scale.hex()}\n".encode())
    for role, info in placement.tensors:
        digest.update(f"{role} {info.dtype} {info.shape}\n".encode())
        digest.update(np.ascontiguousarray(bits[role]).data)


def _digest(digest: hashlib._Hash, effective: Sequence[Placement], *, is_language: bool) -> str:
    """Empty when that half of the model is untouched: such adapters share its results with the base."""
    has_any = any((placement.site.part == "language") is is_language for placement in effective)
    return digest.hexdigest() if has_any else ""
