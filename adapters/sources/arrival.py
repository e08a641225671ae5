"""Arrival: a package's files on their way in: which are taken, how large they may be, and how long it may take.

Owns what hub and object stores have in common: sizes are judged before the first byte, the bytes are counted as they
come, and a deadline ends it. Knows no protocol.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adapters.copying import check_size, check_space, storage_errors
from adapters.errors import AdapterRejected, FetchFailed, RejectReason
from adapters.package import COPIED_NAMES, REQUIRED_NAMES, WEIGHTS_NAME, missing_among

MAX_SIDE_FILE_BYTES = 4 << 20
"""Of each file beside the tensors: none that any tool writes comes near."""
CHUNK_BYTES = 1 << 20


class Deadline:
    """A moment by which a fetch must be over."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._at_s = time.monotonic() + timeout_s

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._at_s - time.monotonic())

    def check(self) -> None:
        """Raises FetchFailed once the time is up."""
        if self.remaining_s <= 0:
            raise FetchFailed(
                f"the package was not here after {self._timeout_s:g} s; try again, or raise fetch_timeout_s"
            )


def choose_files(sizes: Mapping[str, int], max_bytes: int, target: Path) -> dict[str, int]:
    """The files of a package that are fetched, with their sizes, from all that is there.

    Raises AdapterRejected (missing_file, unsafe_format, too_large), InsufficientStorage.
    """
    for name in REQUIRED_NAMES:
        if name not in sizes:
            raise missing_among(list(sizes), name)
    chosen = {name: sizes[name] for name in COPIED_NAMES if name in sizes}
    for name, num_bytes in chosen.items():
        if name != WEIGHTS_NAME and num_bytes > MAX_SIDE_FILE_BYTES:
            raise AdapterRejected(
                RejectReason.TOO_LARGE,
                f"{name} has {num_bytes} bytes; at most {MAX_SIDE_FILE_BYTES} are read",
            )
    check_size(sum(chosen.values()), max_bytes)
    check_space(sum(chosen.values()), target)
    return chosen


def receive(
    chunks: Iterable[bytes], target: Path, num_bytes: int, deadline: Deadline, sha256: str | None = None
) -> None:
    """Write a file as it comes: exactly ``num_bytes``, of that digest if one is known.

    Raises FetchFailed if it comes longer, shorter, other or too late, InsufficientStorage.
    """
    digest, num_come = hashlib.sha256(), 0
    with _new_file(target) as file:
        for chunk in chunks:
            deadline.check()
            num_come += len(chunk)
            if num_come > num_bytes:
                break
            digest.update(chunk)
            with storage_errors():  # the disk's alone: an error of ``chunks`` is the source's
                file.write(chunk)
    if num_come != num_bytes:
        raise FetchFailed(
            f"{target.name} came with other than the {num_bytes} bytes that were announced: it was cut off, or "
            "changed meanwhile; try again"
        )
    if sha256 is not None and digest.hexdigest() != sha256:
        raise FetchFailed(f"{target.name} came damaged: its SHA-256 is not the announced one; try again")


@contextmanager
def _new_file(target: Path) -> Iterator[BinaryIO]:
    with storage_errors():
        file = target.open("xb", buffering=CHUNK_BYTES)  # closed below, where the disk may be full at last
    try:
        yield file
    finally:
        with storage_errors():
            file.close()
