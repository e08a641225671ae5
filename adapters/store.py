"""PackageStore: packages on disk, each in a folder named by its digest, copied once and never changed.

Owns the bytes: how many may be here (``StoreSize``), a private copy, its name given in one rename, holds, and deletion.
Does not know what is in a package or who refers to it; the registry says what to keep.

Several servers may share one store. Whoever adds holds ``.lock`` shared until the package is referred to; whoever
deletes holds it alone; whoever uses a package holds its folder shared. The kernel drops all of these with the process,
so a killed server blocks nobody, and what it left behind is recognised as left behind.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.copying import copy_package, storage_errors, sync_folder
from adapters.errors import AdapterRejected, RejectReason, SourceRejected
from adapters.package import WEIGHTS_NAME, file_sha256, open_package_file, package_digest
from adapters.store_size import StoreSize

_log = logging.getLogger("lorikeet.adapters.store")

_INCOMING = ".incoming-"
_LEAVING = ".leaving-"
_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY})


class Hold:
    """Keeps one package's bytes from being deleted by any server that shares the store."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        os.close(self._descriptor)


class PackageStore:
    """Thread-safe: it keeps no state but the folder."""

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        """``max_bytes`` of all packages together; None leaves it to the disk."""
        with storage_errors():
            root.mkdir(parents=True, exist_ok=True)
            (root / ".lock").touch(mode=0o644)
            self.size = StoreSize(root, max_bytes)
        self._root = root

    def path(self, digest: str) -> Path:
        return self._root / digest

    def digests(self) -> set[str]:
        return {entry.name for entry in os.scandir(self._root) if not entry.name.startswith(".")}

    def add(self, folder: Path, expected_sha256: str | None = None, max_bytes: int | None = None) -> str:
        """Copy a package in and return its digest. Checks its bytes against ``expected_sha256``, nothing else."""
        with self.staged(folder, max_bytes) as copy:
            digest = package_digest(copy)
            check_sha256(copy, digest, expected_sha256)
            self.keep(copy, digest)
        return digest

    @contextmanager
    def staged(
        self, folder: Path, max_bytes: int | None = None, within: Path | None = None
    ) -> Iterator[Path]:
        """A private copy of a package, to be checked and then kept; gone at the end if it was not kept.

        Until the end no other server deletes unreferenced packages, so what is kept may be referred to in peace.
        Raises AdapterRejected (missing_file, unsafe_format, too_large), SourceRejected, InsufficientStorage.
        """
        with open(self._root / ".lock", "rb") as lock:
            _wait_lock(lock.fileno())
            with storage_errors():
                copy = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self._root))
            try:
                with storage_errors():
                    copy_package(folder, copy, max_bytes, within)
                yield copy
            finally:
                shutil.rmtree(copy, ignore_errors=True)

    def keep(self, copy: Path, digest: str) -> None:
        """Give a staged copy its name, durably. A package that is there already stays, if its bytes are sound.

        Raises InsufficientStorage where the store's limit leaves it no room.
        """
        with storage_errors():
            final = self.path(digest)
            if final.is_dir():
                if _is_sound(final, digest):
                    return
                _log.warning("store.repaired digest=%s", digest)
                self._discard(final)
            with self.size.admitting(copy):
                try:
                    copy.rename(final)
                except OSError as error:
                    if error.errno not in _TAKEN:
                        raise  # else another thread kept the same content a moment ago
            sync_folder(self._root)

    def hold(self, digest: str) -> Hold:
        """Raises FileNotFoundError if there is no such package."""
        path = self.path(digest)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _try_lock(descriptor, fcntl.LOCK_SH)
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise FileNotFoundError(digest)
        except BaseException:
            os.close(descriptor)
            raise
        return Hold(descriptor)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether nobody is adding; while inside, nobody can."""
        with open(self._root / ".lock", "rb") as lock:
            yield _try_lock(lock.fileno(), fcntl.LOCK_EX)

    def remove(self, digest: str) -> bool:
        """Delete a package; call it inside ``alone``. False if there is none or another server holds it."""
        try:
            descriptor = os.open(self.path(digest), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if not _try_lock(descriptor, fcntl.LOCK_EX):
                return False
            with storage_errors():
                self._discard(self.path(digest))
            return True
        finally:
            os.close(descriptor)

    def sweep(self, referenced: Collection[str]) -> None:
        """Delete what killed servers left: unfinished copies and packages that nothing refers to. Inside ``alone``."""
        for entry in list(os.scandir(self._root)):
            if entry.name.startswith((_INCOMING, _LEAVING)):
                shutil.rmtree(entry.path, ignore_errors=True)
                _log.info("store.swept name=%s", entry.name)
        for digest in self.digests() - set(referenced):
            if self.remove(digest):
                _log.info("store.swept digest=%s", digest)

    def _discard(self, folder: Path) -> None:
        """Out of sight in one rename, then deleted at leisure."""
        leaving = Path(tempfile.mkdtemp(prefix=_LEAVING, dir=self._root))
        folder.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def check_sha256(folder: Path, digest: str, expected: str | None) -> None:
    """Raise AdapterRejected (digest_mismatch) unless ``expected`` is the package's digest or its tensor file's."""
    if expected is None or expected.lower() == digest:
        return
    with open_package_file(folder, WEIGHTS_NAME) as file:
        found = file_sha256(file)
    if expected.lower() != found:
        raise AdapterRejected(
            RejectReason.DIGEST_MISMATCH,
            f"the package is not the expected one: its digest is {digest}, that of {WEIGHTS_NAME} {found}",
            (digest, found),
        )


def check_stored(folder: Path, digest: str, what: str) -> None:
    """Whether stored bytes are still what they were. Raises SourceRejected, AdapterRejected (digest_mismatch)."""
    try:
        found = package_digest(folder)
    except OSError as error:
        raise SourceRejected(
            f"the stored bytes of adapter {what} cannot be read: {error.strerror}"
        ) from error
    if found != digest:
        raise AdapterRejected(
            RejectReason.DIGEST_MISMATCH,
            f"the stored bytes of adapter {what} have changed on disk; register it again",
            (digest,),
        )


def _is_sound(folder: Path, digest: str) -> bool:
    try:
        return package_digest(folder) == digest
    except (OSError, SourceRejected):
        return False


def _wait_lock(descriptor: int) -> None:
    with suppress(OSError):  # a file system without locks: then nobody is ever alone, and nothing is swept
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
