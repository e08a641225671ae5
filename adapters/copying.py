"""Copying a package: bounded, durable, and only the files that count.

Owns the border to the disk: how bytes get from a source into a private folder, and what the disk's errors are called.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from adapters.errors import AdapterRejected, InsufficientStorage, RejectReason, SourceRejected
from adapters.package import COPIED_NAMES, REQUIRED_NAMES, missing_file, open_package_file

_COPY_BYTES = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CLOSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


@contextmanager
def storage_errors() -> Iterator[None]:
    """Foreign errors of the disk, translated where they enter."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise InsufficientStorage(
                "the adapter store's disk is full; free space or remove adapters"
            ) from error
        if error.errno in _CLOSED:
            raise InsufficientStorage(
                "the adapter store cannot be written; check its folder's permissions"
            ) from error
        raise SourceRejected(f"the package cannot be copied: {error.strerror}") from error


def copy_package(folder: Path, target: Path, max_bytes: int | None, within: Path | None) -> None:
    """Copy the files that count, durably. Links may not lead out of ``within`` (the folder, if not given).

    Raises AdapterRejected (missing_file, unsafe_format, too_large), SourceRejected, InsufficientStorage.
    """
    sources = _open_sources(folder, within)
    try:
        sizes = {name: os.fstat(source.fileno()).st_size for name, source in sources.items()}
        check_size(sum(sizes.values()), max_bytes)
        check_space(sum(sizes.values()), target)
        for name, source in sources.items():
            _copy_file(source, target / name, sizes[name])
    finally:
        _close(sources)
    sync_folder(target)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_sources(folder: Path, within: Path | None) -> dict[str, BufferedReader]:
    if not folder.is_dir():
        raise SourceRejected("the source is not a folder that can be read")
    sources: dict[str, BufferedReader] = {}
    try:
        for name in COPIED_NAMES:
            try:
                sources[name] = open_package_file(folder, name, within)
            except FileNotFoundError:
                if name in REQUIRED_NAMES:
                    raise missing_file(folder, name) from None
    except BaseException:
        _close(sources)
        raise
    return sources


def _close(sources: dict[str, BufferedReader]) -> None:
    for source in sources.values():
        source.close()


def check_size(num_bytes: int, max_bytes: int | None) -> None:
    """Raises AdapterRejected (too_large)."""
    if max_bytes is not None and num_bytes > max_bytes:
        raise AdapterRejected(
            RejectReason.TOO_LARGE, f"the package has {num_bytes} bytes; this server allows {max_bytes}"
        )


def check_space(num_bytes: int, target: Path) -> None:
    """Raises InsufficientStorage if the disk of the folder ``target`` cannot take as many bytes."""
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise InsufficientStorage(
            f"the package has {num_bytes} bytes and the adapter store's disk {free} free; remove adapters first"
        )


def _copy_file(source: BufferedReader, target: Path, num_bytes: int) -> None:
    """Exactly as many bytes as the file had when it was measured: a source that grows meanwhile gains nothing."""
    with open(target, "xb") as file:
        while num_bytes > 0 and (chunk := source.read(min(_COPY_BYTES, num_bytes))):
            file.write(chunk)
            num_bytes -= len(chunk)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o444)
