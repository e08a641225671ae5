"""The header of a safetensors file, read by hand and distrusted.

Owns the file format: eight bytes of length, a JSON header, one buffer. Every offset is proved to lie in the file, to
match its shape and to touch its neighbours, before anybody reads a tensor. Knows no adapters.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from adapters.errors import AdapterRejected, RejectReason
from adapters.strict_json import parse_object

ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
"""The types in which adapters are published; the format knows more, and they are refused by name."""

MAX_DIMENSIONS = 8
"""LoRA tensors have two; the cap bounds the arithmetic on shapes of a hostile header."""

_OTHER_FORMATS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive or a torch pickle"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: ``num_bytes`` from ``begin``, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


def read_header(file: BinaryIO, num_bytes: int, max_header_bytes: int) -> dict[str, TensorInfo]:
    """All tensors of a safetensors file of ``num_bytes``, by name.

    Raises AdapterRejected: unsafe_format when the content is another format's, bad_dtype for a type that is not
    served, bad_tensor_file for everything else.
    """
    head = file.read(8)
    _check_magic(head)
    header_bytes = int.from_bytes(head, "little")
    if len(head) < 8 or header_bytes > num_bytes - 8:
        raise _bad(
            f"its header would end at byte {8 + header_bytes}, past the end at {num_bytes}; it is cut short"
        )
    if header_bytes > max_header_bytes:
        raise _bad(f"its header has {header_bytes} bytes; this server allows {max_header_bytes}")
    try:
        header = parse_object(file.read(header_bytes))
    except (ValueError, RecursionError) as error:
        raise _bad(f"its header cannot be read: {error}") from None
    _check_metadata(header.pop("__metadata__", None))
    tensors = {name: _tensor(name, entry, 8 + header_bytes) for name, entry in header.items()}
    _check_cover(tensors, 8 + header_bytes, num_bytes)
    return tensors


def _bad(message: str, *details: str) -> AdapterRejected:
    return AdapterRejected(
        RejectReason.BAD_TENSOR_FILE,
        f"adapter_model.safetensors: {message}; export or download it again",
        details,
    )


def _check_magic(head: bytes) -> None:
    for magic, what in _OTHER_FORMATS:
        if head.startswith(magic):
            raise AdapterRejected(
                RejectReason.UNSAFE_FORMAT,
                f"adapter_model.safetensors is {what} under another name; only safetensors files are read: "
                "export the adapter with safe serialization",
            )


def _check_metadata(metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad("its metadata is not a map of text")


def _tensor(name: str, entry: object, buffer_begin: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad("a header entry is not dtype, shape and data_offsets", f"{name[:200]!a}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise AdapterRejected(
            RejectReason.BAD_DTYPE,
            f"tensor {name[:200]!a} has type {ascii(dtype)[:32]}; this server reads {', '.join(ITEM_BYTES)}: cast it",
            (f"{name[:200]!a}",),
        )
    shape = _whole_numbers(name, entry["shape"], MAX_DIMENSIONS)
    offsets = _whole_numbers(name, entry["data_offsets"], 2)
    num_bytes = ITEM_BYTES[dtype] * math.prod(shape)
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise _bad(
            f"a tensor's offsets do not match its shape, which takes {num_bytes} bytes", f"{name[:200]!a}"
        )
    return TensorInfo(dtype, shape, buffer_begin + offsets[0], num_bytes)


def _whole_numbers(name: str, value: object, limit: int) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > limit
        or not all(
            isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63
            for number in value
        )
    ):
        raise _bad("a tensor's shape or offsets are not short lists of whole numbers", f"{name[:200]!a}")
    return tuple(value)


def _check_cover(tensors: Mapping[str, TensorInfo], begin: int, end: int) -> None:
    """Tensors must cover the buffer exactly: no gap that hides data, no overlap, nothing after the last."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].num_bytes)):
        if tensor.begin != begin:
            raise _bad(
                f"its tensors overlap or leave a gap at byte {min(begin, tensor.begin)}", f"{name[:200]!a}"
            )
        begin += tensor.num_bytes
    if begin != end:
        raise _bad(f"its tensors end at byte {begin}, the file at {end}")
