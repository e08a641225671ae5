"""exchange: one folder in another's place, in one step, so that a reader finds the old one or the new one, whole.

Owns the system call. Does not know what is in them. Place in a training run: a package that replaces an earlier one.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2  # linux/fs.h
_LACKING: Final = frozenset({errno.ENOSYS, errno.EINVAL})


def exchange(one: Path, other: Path) -> None:
    """Swap the names of two paths of one file system. Where the system cannot in one step (not Linux, some network
    file systems) it takes two renames, between which ``other`` is missing, never partial. Raises OSError."""
    if not _exchanged_at_once(one, other):
        aside = one.with_name(one.name + ".old")
        other.rename(aside)
        one.rename(other)
        aside.rename(one)


def _exchanged_at_once(one: Path, other: Path) -> bool:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), str(other))
