"""Registry: which adapters exist, what their names mean, and who is using them.

Owns adapters as a whole; the sole truth on them. ``names`` keeps what names mean, ``pointers`` moves it, ``conduct``
says how they are served, ``store`` keeps the bytes, ``leases`` who uses what, ``garbage`` what may go; this file keeps
them agreeing, also when the process is killed between any two lines: bytes come before the name that means them, and
go after it and after the last lease.
Knows no device; the residency decides what is loaded, and ``load`` reads it. All methods may be called from any thread;
``resolve`` never waits for the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.catalogue import NameRecord, VersionRecord
from adapters.conduct import Conduct
from adapters.entry import AdapterEntry, Staged, entry_of
from adapters.garbage import Garbage
from adapters.leases import Lease, LeaseBook
from adapters.ledger import Inserted
from adapters.names import Names, everybody
from adapters.pointers import Pointers
from adapters.ref import BASE, AdapterRef
from adapters.sites import SiteTable
from adapters.spelling import Spelling
from adapters.store import PackageStore, check_sha256, check_stored
from adapters.store_size import package_bytes
from adapters.validation import Limits, ReadDefaults, check_package, no_defaults

if TYPE_CHECKING:
    from adapters.weights import AdapterWeights

_log = logging.getLogger("lorikeet.adapters.registry")


@dataclass(frozen=True, slots=True)
class _Offer:
    """A package that somebody wants to be registered."""

    name: str
    folder: Path
    source: str
    expected_sha256: str | None
    within: Path | None


class Registry:
    def __init__(
        self,
        root: Path,
        sites: SiteTable,
        limits: Limits,
        base_names: Collection[str],
        *,
        base_fingerprint: str = "",
        read_defaults: ReadDefaults = no_defaults,
        max_store_bytes: int | None = None,
        on_deleted: Callable[[], None] = lambda: None,
    ) -> None:
        """Open or create ``root/registry.sqlite`` and ``root/packages/``, and clear away what a killed server left.

        ``base_names`` are all names of the served base, its hub id among them if it has one.
        ``read_defaults`` checks what a package says that its requests are served with. ``max_store_bytes`` is the
        limit of all packages; ``on_deleted`` is called from any thread when one that nothing means is deleted.
        """
        self._sites = sites
        self._limits = limits
        self._base_names = tuple(base_names)
        self._base_fingerprint = base_fingerprint
        self._read_defaults = read_defaults
        self._spelling = Spelling(base_names)
        self._store = PackageStore(root / "packages", max_store_bytes)
        self._leases = LeaseBook(self._store, lambda digest: self._garbage.collect_later(digest))
        self._on_deleted = on_deleted
        self._sound: set[str] = set()
        with self._store.alone() as is_alone:
            self._names = Names(root / "registry.sqlite")
            self._garbage = Garbage(self._store, self._names, self._leases, self._note_deleted)
            self.pointers = Pointers(self._names, self._leases, self._spelling)
            self.conduct = Conduct(self._names)
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
        ``within`` (the folder, if not given). Raises InvalidAdapterName, AdapterExists (it is an alias),
        AdapterRejected, SourceRejected, InsufficientStorage; then nothing has changed.
        """
        offer = _Offer(name, folder, source, expected_sha256, within)
        entry, inserted = self._take_in(offer, pin=pin, promote=True)
        ref, is_created = entry.ref, inserted.has_moved
        _log.info("adapter.registered ref=%s digest=%s is_created=%s", ref, ref.digest, is_created)
        return entry, inserted.has_moved

    def stage(
        self,
        name: str,
        folder: Path,
        *,
        source: str = "",
        expected_sha256: str | None = None,
        within: Path | None = None,
    ) -> Staged:
        """As ``register``, but what ``name`` means stays: ``promote`` makes it this version, once it is proven."""
        offer = _Offer(name, folder, source, expected_sha256, within)
        entry, inserted = self._take_in(offer, pin=False, promote=False)
        _log.info("adapter.staged ref=%s digest=%s is_new=%s", entry.ref, entry.ref.digest, inserted.is_new)
        return Staged(entry, inserted.is_new)

    def _take_in(self, offer: _Offer, *, pin: bool, promote: bool) -> tuple[AdapterEntry, Inserted]:
        self._spelling.check_name(offer.name)
        self._garbage.make_room(package_bytes(offer.folder))
        with self._store.staged(offer.folder, self._limits.max_package_bytes, offer.within) as copy:
            report = check_package(
                copy,
                self._sites,
                self._limits,
                self._base_names,
                base_fingerprint=self._base_fingerprint,
                read_defaults=self._read_defaults,
            )
            check_sha256(copy, report.digest, offer.expected_sha256)
            self._store.keep(copy, report.digest)
            self._sound.add(report.digest)
            inserted = self._names.insert(offer.name, report, source=offer.source, pin=pin, promote=promote)
            entry = self.entry(f"{offer.name}@{inserted.number}")
        self._garbage.collect()
        return entry, inserted

    # ---- what names mean ---------------------------------------------------------------------------------------

    def resolve(self, name: str, *, is_visible: Callable[[str], bool] = everybody) -> AdapterRef:
        """The version that ``name``, ``name@3``, ``name@sha256:<prefix>`` or an alias means; base ids mean BASE.

        Raises AdapterNotFound with near names, of those for which ``is_visible``.
        """
        if self._spelling.is_base(name):
            return BASE
        return self._names.find(name, is_visible)[1].ref

    def entry(self, name: str) -> AdapterEntry:
        """As ``resolve``, with all that is known of it; not for the base. Raises AdapterNotFound."""
        return self._entry(*self._names.find(name))

    def entries(self, *, has_candidates: bool = False) -> list[AdapterEntry]:
        """Every name, in order, with the version that it means; with candidates, the latest of names that mean none."""
        heads = ((record, record.head) for record in self._names.all())
        return [
            self._entry(record, head or record.versions[-1])
            for record, head in heads
            if head is not None or has_candidates
        ]

    def versions(self, name: str) -> list[AdapterEntry]:
        """Every version of a name, oldest first. Raises AdapterNotFound."""
        record = self._names.record(name)
        return [self._entry(record, version) for version in record.versions]

    def remove(self, name: str) -> AdapterEntry:
        """Forget a name with all its versions, or with ``name@3`` that version alone; returns what it was.

        A name or alias that meant a version which is gone means again what it meant before, if that is there, else
        nothing: never a version that nobody promoted. Bytes go when the last lease does. Raises AdapterNotFound,
        InsufficientStorage.
        """
        if "@" in name:
            record, version = self._names.find(name)
            gone: tuple[VersionRecord, ...] = (version,)
        else:
            record = self._names.record(name)
            version, gone = record.head or record.versions[-1], record.versions
        entry = self._entry(record, version)
        self._names.remove(record.name, version.ref.version if "@" in name else None)
        self._garbage.collect(*(version.ref.digest for version in gone))
        _log.info("adapter.removed ref=%s", entry.ref)
        return entry

    def unstage(self, ref: AdapterRef) -> None:
        """Forget a version that was staged and did not prove itself; unless somebody has promoted it meanwhile."""
        self._names.remove(ref.name, ref.version, is_spared_if_meant=True)
        self._garbage.collect(ref.digest)
        _log.info("adapter.unstaged ref=%s", ref)

    def refresh(self) -> None:
        """Take in what other servers wrote, and delete what could not be deleted before. For a regular look."""
        self._names.watch()
        self._garbage.collect()
        self._store.size.measure()

    @property
    def store_bytes(self) -> int:
        """Of all packages, as it was at the last ``refresh``; at once."""
        return self._store.size.num_bytes

    def has(self, ref: AdapterRef) -> bool:
        """Whether this version is registered, as far as this process knows; at once."""
        return self._names.is_live(ref)

    # ---- what is done with them --------------------------------------------------------------------------------

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
            if ref.digest not in self._sound:  # once: the disk may have rotted since it was checked
                check_stored(folder, ref.digest, str(ref))
                self._sound.add(ref.digest)
            return load_weights(folder, self._sites, digest=ref.digest)

    def close(self) -> None:
        """End every lease, finish deletions, close the ledger. The registry is of no use afterwards."""
        self._garbage.finish()
        self._leases.close()
        self._garbage.collect()
        self._names.close()

    def _entry(self, record: NameRecord, version: VersionRecord) -> AdapterEntry:
        return entry_of(record, version, self._leases)

    def _note_deleted(self, digest: str) -> None:
        self._sound.discard(digest)
        self._on_deleted()

    def _compare_with_store(self, is_alone: bool) -> None:
        meant = {version.ref.digest for record in self._names.all() for version in record.versions}
        if is_alone:
            self._store.sweep(meant)
        missing = sorted(meant - self._store.digests())
        if missing:
            _log.error("registry.packages_missing count=%d first=%s", len(missing), ",".join(missing[:3]))
