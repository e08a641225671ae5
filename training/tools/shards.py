"""Shards: the safetensors files of a checkpoint, written in a stream.

Owns: how tensors are shared out among files, and the format as it is written. A file's header is known from the names
and shapes before the first tensor is, so that one tensor at a time is held. Does not know what the tensors are.
Place in a training run: none; ``export`` writes by it.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint, by its header alone."""

    name: str
    file: Path
    dtype: str
    """As safetensors spells it: ``BF16``."""
    shape: tuple[int, ...]


def plan_shards(
    tensors: Iterable[Stored], dtype: torch.dtype | None, max_bytes: int
) -> tuple[tuple[Stored, ...], ...]:
    """Tensors in their order, cut into files of at most ``max_bytes``; a larger tensor has a file to itself."""
    shards: list[list[Stored]] = [[]]
    size = 0
    for stored in tensors:
        num_bytes = num_bytes_of(stored, dtype)
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(stored)
        size += num_bytes
    return tuple(tuple(shard) for shard in shards)


def num_bytes_of(stored: Stored, dtype: torch.dtype | None) -> int:
    return int(math.prod(stored.shape)) * written_dtype(stored, dtype).itemsize


def written_dtype(stored: Stored, dtype: torch.dtype | None) -> torch.dtype:
    """Whole numbers keep their type whatever the weights become."""
    own = DTYPES[stored.dtype]
    return dtype if dtype is not None and own.is_floating_point else own


def write_shard(
    path: Path, shard: Sequence[Stored], dtype: torch.dtype | None, tensors: Iterator[Tensor]
) -> None:
    """One safetensors file; ``tensors`` come one at a time, in the shard's order, already in the written type."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for stored in shard:
        end = begin + num_bytes_of(stored, dtype)
        header[stored.name] = {
            "dtype": _NAMES[written_dtype(stored, dtype)],
            "shape": list(stored.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            tensor.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
