"""Receiving: one file of an upload, from the socket to the disk, a piece at a time.

Owns backpressure (nothing more is read while a piece is written), the byte cap while bytes come, the checksum, and that
a file is whole or not there. Knows no route. Place in a request's way: none; it prepares what is registered later.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adapters.copying import storage_errors
from adapters.errors import InsufficientStorage
from server.errors import WireError, invalid_request
from server.uploads import Upload, Uploads

PIECE_BYTES = 1 << 20
"""Written at once, on a thread; the most of a file that is in memory."""
SILENCE_S = 30.0
"""A client that sends nothing for so long is cut: it holds one of few places."""
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_INCOMING = ".incoming-"


@dataclass(frozen=True, slots=True)
class Expected:
    """What the client says of the file before it comes."""

    num_bytes: int | None
    sha256: str | None

    @classmethod
    def of(cls, content_length: str | None, sha256: str | None) -> Expected:
        """Raises WireError 400."""
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise invalid_request("`sha256` must be 64 hex digits", "sha256")
        length = int(content_length) if content_length is not None and content_length.isdigit() else None
        return cls(length, None if sha256 is None else sha256.lower())


@dataclass(frozen=True, slots=True)
class Received:
    num_bytes: int
    sha256: str
    is_new: bool
    """False if it took the place of a file of that name."""


async def receive(
    uploads: Uploads, upload: Upload, name: str, chunks: AsyncIterator[bytes], expected: Expected
) -> Received:
    """Write a file of the upload. Raises WireError (400, 413), InsufficientStorage; then nothing has changed."""
    if expected.num_bytes is not None:
        _require_room(upload, name, expected.num_bytes, uploads.max_bytes)
        _require_space(expected.num_bytes, upload.folder)
    with uploads.using(upload):
        descriptor, incoming = _make_file(upload.folder)
        writer = _Writer(os.fdopen(descriptor, "wb"))
        try:
            async for piece in _pieces(chunks):
                upload.num_coming_bytes += len(piece)
                writer.num_bytes += len(piece)
                _require_room(upload, name, 0, uploads.max_bytes)
                await asyncio.to_thread(writer.write, piece)
            received = Received(writer.num_bytes, writer.finish(), name not in upload.files)
            _require_sum(received, expected)
            with storage_errors():
                os.replace(incoming, upload.folder / name)
            upload.files[name] = received.num_bytes
            return received
        finally:
            upload.num_coming_bytes -= writer.num_bytes
            writer.close()
            with suppress(OSError):
                incoming.unlink(missing_ok=True)


class _Writer:
    """A file and the sum of what went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sum = hashlib.sha256()
        self.num_bytes = 0

    def write(self, piece: bytes) -> None:
        """On a thread."""
        with storage_errors():
            self._file.write(piece)
        self._sum.update(piece)

    def finish(self) -> str:
        with storage_errors():
            self._file.close()
        return self._sum.hexdigest()

    def close(self) -> None:
        with suppress(OSError):  # what could not be written has been reported
            self._file.close()


def _make_file(folder: Path) -> tuple[int, Path]:
    with storage_errors():
        descriptor, path = tempfile.mkstemp(prefix=_INCOMING, dir=folder)
    return descriptor, Path(path)


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces of about ``PIECE_BYTES``. Raises WireError 400 after a long silence."""
    buffer = bytearray()
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            raise invalid_request(f"no byte of the file came for {SILENCE_S:g} s; send it again") from error
        if chunk is None:
            break
        buffer += chunk
        if len(buffer) >= PIECE_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


def _require_room(upload: Upload, name: str, num_bytes: int, max_bytes: int) -> None:
    """For so many bytes more than are there and coming, without the file whose place they take."""
    left = max_bytes - upload.num_bytes + upload.files.get(name, 0)
    if num_bytes > left:
        raise WireError(
            413,
            "body_too_large",
            f"the files of an upload may have {max_bytes:,} bytes in all, this server's max_adapter_size",
        )


def _require_space(num_bytes: int, folder: Path) -> None:
    """A file that cannot fit is refused before it is read. Registering copies it: twice its size is needed."""
    with storage_errors():
        free = shutil.disk_usage(folder).free
    if 2 * num_bytes > free:
        raise InsufficientStorage(
            f"the file has {num_bytes} bytes and needs twice as many until it is registered; the adapter store's disk "
            f"has {free} free: remove adapters first"
        )


def _require_sum(received: Received, expected: Expected) -> None:
    if expected.num_bytes is not None and received.num_bytes != expected.num_bytes:
        raise invalid_request(
            f"the file ended after {received.num_bytes} of {expected.num_bytes} bytes; send it again"
        )
    if expected.sha256 is not None and received.sha256 != expected.sha256:
        raise WireError(
            400,
            "invalid_request",
            f"the file came with the SHA-256 {received.sha256}, another than was announced; send it again",
            param="sha256",
        )
