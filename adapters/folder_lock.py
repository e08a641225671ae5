"""Locks on folders: that somebody lives in one, which the system forgets with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Literal

Hold = Literal["shared", "alone"]


def lock_folder(folder: Path, hold: Hold) -> int | None:
    """A descriptor that holds the lock until it is closed; None if the folder is gone or another holds it otherwise.

    Who lives in a folder holds it ``shared``; who would clear it tries ``alone``. Never waits.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if hold == "shared" else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
