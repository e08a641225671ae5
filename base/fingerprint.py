"""What names a base's content. Place in a request's way: none; once, at load."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from base.checkpoint import Checkpoint
from base.config import BaseConfig

_WHOLE_DIGEST_BYTES: Final = 256 << 20
_SAMPLE_BYTES: Final = 1 << 20
_NUM_SAMPLES: Final = 64


def fingerprint(checkpoint: Checkpoint, base: BaseConfig) -> str:
    """Hex SHA-256 over config.json, how it is loaded, and the identity of each weight file.

    A file's identity is its name, size, safetensors header and content; of files over 256 MiB, 64 samples of 1 MiB.
    """
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    digest.update(f"{base.quantization} {base.dtype}".encode())
    for path in checkpoint.weight_files:
        digest.update(path.name.encode())
        for piece in _identity(path):
            digest.update(piece)
    return digest.hexdigest()


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length)


def _identity(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield f"{size} ".encode()
    yield _header(path)
    is_whole = size <= _WHOLE_DIGEST_BYTES
    stride = _SAMPLE_BYTES if is_whole else size // _NUM_SAMPLES
    with path.open("rb") as file:
        for offset in range(0, size, stride):
            file.seek(offset)
            yield file.read(_SAMPLE_BYTES)
