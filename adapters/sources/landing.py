"""Landing: folders in which packages from elsewhere lie until the registry has copied what it wants of them.

Owns one root and what is below it: a private folder for each fetch, held by a lock of the process that fetches, gone
when the fetch is over; what a killed server left is recognised by its free lock. Knows nothing of where packages come
from.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from adapters.copying import storage_errors
from adapters.folder_lock import lock_folder

_PREFIX = "fetch-"


@dataclass(frozen=True, slots=True)
class Berth:
    """One fetch's folder. ``clear`` it once, from any thread."""

    folder: Path
    lock: int

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.lock)


class Landing:
    """Thread-safe: it keeps no state but the folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def clear_orphans(self) -> int:
        """Delete what servers that are gone have left; how many. It spares what another server fetches now."""
        num_cleared = 0
        for folder in sorted(self._root.glob(f"{_PREFIX}*")) if self._root.is_dir() else []:
            lock = lock_folder(folder, "alone")
            if lock is not None:
                Berth(folder, lock).clear()
                num_cleared += 1
        return num_cleared

    def open(self) -> Berth:
        """A new empty folder that only this user can read. Raises InsufficientStorage."""
        with storage_errors():
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._root))
            return Berth(folder, _lock(folder))


def _lock(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor
