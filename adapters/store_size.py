"""StoreSize: the bytes of all packages in a store, and their limit.

Owns the tier DISK's count. A package never changes, so each is measured once; what other servers add and delete is seen
by looking at the folder. Counts the files' bytes of named packages: copies that are still being checked are bounded by
the disk alone.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.errors import InsufficientStorage
from adapters.package import COPIED_NAMES

_LOCK = ".room"
_TICK_NS = 1_000_000_000
"""More than any file system's clock needs to move on."""


class StoreSize:
    """Thread-safe."""

    def __init__(self, root: Path, max_bytes: int | None) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # guards what follows
        self._sizes: dict[str, int] = {}
        self._num_bytes = 0
        self._seen_ns = -1
        if max_bytes is not None:
            (root / _LOCK).touch(mode=0o644)

    @property
    def num_bytes(self) -> int:
        """As it was when last looked at; at once."""
        return self._num_bytes

    def measure(self) -> int:
        """Look, if the folder has changed: a scan of its names, and the files' sizes of what is new."""
        with self._lock:
            changed_ns = os.stat(self._root).st_mtime_ns
            if changed_ns != self._seen_ns:
                # a change in the clock's tick of this look would go unseen: what changed just now is looked at again
                is_settled = time.time_ns() - changed_ns > _TICK_NS
                names = {entry.name for entry in os.scandir(self._root) if not entry.name.startswith(".")}
                known = {name: self._sizes[name] for name in names & self._sizes.keys()}
                self._sizes = known | {
                    name: package_bytes(self._root / name) for name in names - known.keys()
                }
                self._num_bytes = sum(self._sizes.values())
                self._seen_ns = changed_ns if is_settled else -1
            return self._num_bytes

    def has_room(self, num_bytes: int) -> bool:
        return self._max_bytes is None or self.measure() + num_bytes <= self._max_bytes

    @contextmanager
    def admitting(self, copy: Path) -> Iterator[None]:
        """While inside, the package may get its name: no other server that shares the store gives one meanwhile.

        Raises InsufficientStorage, naming the limit, if it does not fit.
        """
        if self._max_bytes is None:
            yield
            return
        with open(self._root / _LOCK, "rb") as lock:
            with suppress(
                OSError
            ):  # a file system without locks: two servers may pass the limit by a package
                fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            num_bytes = package_bytes(copy)
            held = self.measure()
            if held + num_bytes > self._max_bytes:
                raise InsufficientStorage(
                    f"the adapter store holds {held} bytes and the package has {num_bytes}; adapter_store_size allows "
                    f"{self._max_bytes}: remove adapters or raise it"
                )
            yield


def package_bytes(folder: Path) -> int:
    """Bytes of the files that count, as far as they are there; links count as what they lead to."""
    num_bytes = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in COPIED_NAMES:
                with suppress(OSError):
                    num_bytes += entry.stat().st_size
    return num_bytes
