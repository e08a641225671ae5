"""whole_folder: a folder that is either there with all of its files, or not there.

Owns the temporary neighbour, the flush to disk and the rename. Does not know what is written. Place in a training run:
none; the tools for finished adapters write through it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.durable import sync
from training.tools.refusals import FolderRefused


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``, renamed to it when the block ends well and removed when it does not.

    Raises FolderRefused before the block when ``target`` holds anything, and after it when nothing was written.
    """
    check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise FolderRefused(target, f"{error.strerror}; name another folder") from error
    try:
        yield partial
        _settle(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well


def check_free(target: Path) -> None:
    """Raise FolderRefused when something is there. An empty folder counts as nothing."""
    if target.is_dir() and not target.is_symlink():
        if any(target.iterdir()):
            raise FolderRefused(target, "it holds files already; name another folder, or remove it")
    elif os.path.lexists(target):
        raise FolderRefused(target, "it is a file or a link; name another folder")


def _settle(partial: Path, target: Path) -> None:
    files = [path for path in partial.rglob("*") if path.is_file()]
    if not files:
        raise FolderRefused(target, "nothing was written to it")
    for path in files:
        sync(path)
    sync(partial)
    partial.chmod(0o777 & ~_umask())  # mkdtemp made it private
    partial.rename(target)
    sync(target.parent)


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
