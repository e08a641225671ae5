"""Registry: which adapters exist, what their names mean, and who is using them.

Owns adapters as a whole; the sole truth on them. ``names`` keeps what names mean, ``store`` the bytes, ``leases`` who
uses what; this file keeps the three agreeing, also when the process is killed between any two lines: bytes come before
the name that means them, and go after it and after the last lease. Knows no device; the residency decides what is
loaded, and ``load`` reads it. All methods may be called from any thread; ``resolve`` never waits for the disk.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.catalogue import NameRecord, VersionRecord
from adapters.errors import AdapterRejected, InvalidAdapterName, RejectReason, SourceRejected
from adapters.leases import Lease, LeaseBook
from adapters.names import Names, everybody
from adapters.package import package_digest
from adapters.ref import BASE, AdapterRef
from adapters.sites import SiteTable
from adapters.store import PackageStore, check_sha256
from adapters.validation import Limits, PackageReport, check_package

if TYPE_CHECKING:
    from adapters.weights import AdapterWeights

_log = logging.getLogger("lorikeet.adapters.registry")

_NAME = re.compile(r"(?:[A-Za-z0-9._-]{1,96}/)?[A-Za-z0-9._-]{1,96}")
_ONLY_DOTS = re.compile(r"(?:.*/)?\.+|\.+/.*")


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One version of one adapter, as listings show it."""

    ref: AdapterRef
    report: PackageReport
    source: str
    created_s: float
    """Unix time of this version's registration."""
    is_pinned: bool
    is_enabled: bool
    """False after an explicit unload, until somebody loads it again."""
    num_leases: int
    last_used_s: float | None
    """Unix time of the last lease in this process; None when there was none."""


class Registry:
    def __init__(
        self,
        root: Path,
        sites: SiteTable,
        limits: Limits,
        base_names: Collection[str],
        *,
        base_fingerprint: str = "",
    ) -> None:
        """Open or create ``root/registry.sqlite`` and ``root/packages/``, and clear away what a killed server left.

        ``base_names`` are all names of the served base, its hub id among them if it has one.
        """
        self._sites = sites
        self._limits = limits
        self._base_names = tuple(base_names)
        self._base_fingerprint = base_fingerprint
        self._reserved = {name.casefold() for name in (*base_names, BASE.name)}
        self._store = PackageStore(root / "packages")
        self._leases = LeaseBook(self._store, self._delete_later)
        self._collecting = threading.Lock()
        self._garbage: set[str] = set()
        self._sound: set[str] = set()
        self._reapers: list[threading.Thread] = []
        with self._store.alone() as is_alone:
            self._names = Names(root / "registry.sqlite")
            self._compare_with_store(is_alone)

    def register(
        self,
        name: str,
        folder: Path,
        *,
        source: str = "",
        expected_sha256: str | None = None,
        pin: bool = False,
        within: Path | None = None,
    ) -> tuple[AdapterEntry, bool]:
        """Copy a package in, check the copy, and make it what ``name`` means. False when it meant that already.

        Content that the name had before gets its old version number back. Links in the package may not lead out of
        ``within`` (the folder, if not given). Raises InvalidAdapterName, AdapterRejected, SourceRejected,
        InsufficientStorage; then nothing has changed.
        """
        self._check_name(name)
        with self._store.staged(folder, self._limits.max_package_bytes, within) as copy:
            report = check_package(
                copy, self._sites, self._limits, self._base_names, base_fingerprint=self._base_fingerprint
            )
            check_sha256(copy, report.digest, expected_sha256)
            self._store.keep(copy, report.digest)
            self._sound.add(report.digest)
            is_created = self._names.insert(name, report, source=source, pin=pin)
            entry = self.entry(name)
        self._delete_garbage()
        _log.info("adapter.registered ref=%s digest=%s is_created=%s", entry.ref, report.digest, is_created)
        return entry, is_created

    def resolve(self, name: str, *, is_visible: Callable[[str], bool] = everybody) -> AdapterRef:
        """The version that ``name``, ``name@3`` or ``name@sha256:<prefix>`` means; ``base`` and base ids mean BASE.

        Raises AdapterNotFound with near names, of those for which ``is_visible``.
        """
        if name.casefold() in self._reserved:
            return BASE
        return self._names.find(name, is_visible)[1].ref

    def entry(self, name: str) -> AdapterEntry:
        """As ``resolve``, with all that is known of it; not for the base. Raises AdapterNotFound."""
        return self._entry(*self._names.find(name))

    def entries(self) -> list[AdapterEntry]:
        """Every name, in order, with the version that it means."""
        return [self._entry(record, record.head) for record in self._names.all()]

    def versions(self, name: str) -> list[AdapterEntry]:
        """Every version of a name, oldest first. Raises AdapterNotFound."""
        record, _ = self._names.find(name)
        return [self._entry(record, version) for version in record.versions]

    def remove(self, name: str) -> AdapterEntry:
        """Forget a name with all its versions, or with ``name@3`` that version alone; returns what it was.

        Its bytes go when the last lease does. Raises AdapterNotFound, InsufficientStorage.
        """
        record, version = self._names.find(name)
        entry = self._entry(record, version)
        gone = (version,) if "@" in name else record.versions
        self._names.remove(record.name, version.ref.version if "@" in name else None)
        self._delete_garbage(*(version.ref.digest for version in gone))
        _log.info("adapter.removed ref=%s", entry.ref)
        return entry

    def set_pinned(self, name: str, is_pinned: bool) -> None:
        self._names.set_pinned(self._names.find(name)[0].name, is_pinned)

    def set_enabled(self, name: str, is_enabled: bool) -> None:
        self._names.set_enabled(self._names.find(name)[0].name, is_enabled)

    def lease(self, ref: AdapterRef) -> Lease:
        """Keep a version's bytes until the lease is released. Raises AdapterNotFound if it has been removed."""
        return self._leases.take(ref, is_live=ref.is_base or self._names.is_live(ref))

    def load(self, ref: AdapterRef) -> AdapterWeights:
        """Read a version's weights; for mover threads. Raises AdapterNotFound, AdapterRejected, SourceRejected."""
        from adapters.weights import load_weights  # torch takes seconds to import and is needed here alone

        with self.lease(ref):
            folder = self._store.path(ref.digest)
            if ref.digest not in self._sound:
                self._check_bytes(folder, ref)
            return load_weights(folder, self._sites, digest=ref.digest)

    def close(self) -> None:
        """End every lease, finish deletions, close the ledger. The registry is of no use afterwards."""
        for reaper in self._reapers:
            reaper.join()
        self._leases.close()
        self._delete_garbage()
        self._names.close()

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name) or _ONLY_DOTS.fullmatch(name):
            raise InvalidAdapterName(
                name, "use 1 to 96 letters, digits, '.', '_' and '-', and at most one 'org/' before them"
            )
        if name.casefold() in self._reserved:
            raise InvalidAdapterName(name, "it names the base")

    def _entry(self, record: NameRecord, version: VersionRecord) -> AdapterEntry:
        num_leases, last_used_s = self._leases.usage(version.ref)
        return AdapterEntry(
            ref=version.ref,
            report=version.report,
            source=version.source,
            created_s=version.created_s,
            is_pinned=record.is_pinned,
            is_enabled=record.is_enabled,
            num_leases=num_leases,
            last_used_s=last_used_s,
        )

    def _compare_with_store(self, is_alone: bool) -> None:
        meant = {version.ref.digest for record in self._names.all() for version in record.versions}
        if is_alone:
            self._store.sweep(meant)
        missing = sorted(meant - self._store.digests())
        if missing:
            _log.error("registry.packages_missing count=%d first=%s", len(missing), ",".join(missing[:3]))

    def _check_bytes(self, folder: Path, ref: AdapterRef) -> None:
        """Once for each package that this process did not check itself: the disk may have rotted meanwhile."""
        try:
            digest = package_digest(folder)
        except OSError as error:
            raise SourceRejected(
                f"the stored bytes of adapter {ref} cannot be read: {error.strerror}"
            ) from error
        if digest != ref.digest:
            raise AdapterRejected(
                RejectReason.DIGEST_MISMATCH,
                f"the stored bytes of adapter {ref} have changed on disk; register it again",
                (ref.digest,),
            )
        self._sound.add(ref.digest)

    def _delete_later(self, digest: str) -> None:
        """A package's last lease has gone, perhaps on the engine's thread: if no name means it, another deletes it."""
        if self._names.is_meant(digest):
            return
        reaper = threading.Thread(
            target=self._delete_garbage, args=(digest,), name="registry-reaper", daemon=True
        )
        self._reapers = [thread for thread in self._reapers if thread.is_alive()] + [reaper]
        reaper.start()

    def _delete_garbage(self, *digests: str) -> None:
        """Delete packages that nothing means and nobody leases; while others add, they wait for the next time."""
        with self._collecting:
            self._garbage.update(digests)
            if not self._garbage:
                return
            with self._store.alone() as is_alone:
                if not is_alone:
                    return
                for digest in [digest for digest in self._garbage if not self._leases.is_held(digest)]:
                    self._garbage.discard(digest)
                    if not self._names.is_meant_on_disk(digest):
                        self._sound.discard(digest)
                        self._leases.forget(digest)
                        self._store.remove(digest)
