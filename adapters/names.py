"""Names: what every name means, read in microseconds and written durably.

Owns the agreement of the ledger (on disk, the truth) and the catalogue (in memory, for reading), also when other
servers write to the same ledger. Knows no files and no leases. Reading never waits for the disk: the lock over the
catalogue is never held while something is written.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from adapters.catalogue import AliasRecord, Catalogue, NameRecord, VersionRecord
from adapters.errors import AdapterNotFound
from adapters.ledger import Inserted, Ledger
from adapters.ref import AdapterRef
from adapters.validation import PackageReport

_WATCH_INTERVAL_S = 0.5
"""How long a change by another server may go unseen."""


def everybody(name: str) -> bool:
    """Visible to all."""
    return True


class Names:
    """Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._ledger = Ledger(path)
        self._writing = (
            threading.RLock()
        )  # over the ledger, and over making the catalogue equal to it; taken first
        self._reading = threading.Lock()  # over the catalogue alone
        self._next_watch_s = 0.0
        self._catalogue = Catalogue()
        self._read_all()

    def close(self) -> None:
        with self._writing:
            self._ledger.close()

    def find(
        self, name: str, is_visible: Callable[[str], bool] = everybody
    ) -> tuple[NameRecord, VersionRecord]:
        """What ``name``, ``name@3``, ``name@sha256:<prefix>`` or an alias means.

        Raises AdapterNotFound with near names, of those for which ``is_visible``.
        """
        self.watch()
        found = self._look_up(name)
        if found is None and self.watch(is_urgent=True):
            found = self._look_up(name)
        if found is None:
            raise AdapterNotFound(name, self._near(name.partition("@")[0], is_visible))
        return found

    def record(self, name: str) -> NameRecord:
        """All versions of a name (not an alias), also of one that means none of them. Raises AdapterNotFound."""
        record = self._get(name)
        if record is None and self.watch(is_urgent=True):
            record = self._get(name)
        if record is None:
            raise AdapterNotFound(name)
        return record

    def _get(self, name: str) -> NameRecord | None:
        self.watch()
        with self._reading:
            return self._catalogue.get(name)

    def alias(self, alias: str) -> AliasRecord | None:
        self.watch()
        with self._reading:
            return self._catalogue.alias(alias)

    def aliases(self) -> list[AliasRecord]:
        self.watch()
        with self._reading:
            return sorted(self._catalogue.aliases(), key=lambda record: record.alias)

    def all(self) -> list[NameRecord]:
        self.watch()
        with self._reading:
            records = list(self._catalogue)
        return sorted(records, key=lambda record: record.name)

    def pinned(self) -> list[AdapterRef]:
        """What pinned names mean now, in order of their names."""
        with self._reading:
            heads = [record.head for record in self._catalogue if record.is_pinned]
        return sorted((head.ref for head in heads if head is not None), key=lambda ref: ref.name)

    def is_live(self, ref: AdapterRef) -> bool:
        with self._reading:
            return self._catalogue.find(ref) is not None

    def is_meant(self, digest: str) -> bool:
        """Whether any version has this content, as far as this process knows."""
        with self._reading:
            return self._catalogue.has_digest(digest)

    def is_meant_on_disk(self, digest: str) -> bool:
        """The same by the ledger itself, with what other servers wrote."""
        return self._ledger.is_referenced(digest)

    def insert(self, name: str, report: PackageReport, *, source: str, pin: bool, promote: bool) -> Inserted:
        """As Ledger.insert."""
        with self._writing:
            now_s = time.time()
            inserted = self._ledger.insert(
                name, report, source=source, created_s=now_s, pin=pin, promote=promote
            )
            self._read(name)
        return inserted

    def remove(self, name: str, version: int | None, *, is_spared_if_meant: bool = False) -> None:
        """As Ledger.remove."""
        with self._writing:
            moved = self._ledger.remove(name, version, is_spared_if_meant=is_spared_if_meant)
            for written in (name, *moved, *self._aliases_of(name)):
                self._read(written)

    def promote(self, name: str, number: int, *, pin: bool) -> bool:
        """As Ledger.promote."""
        with self._writing:
            has_moved = self._ledger.promote(name, number, pin=pin)
            self._read(name)
        return has_moved

    def roll_back(self, name: str) -> None:
        """Of a name or an alias. Raises AdapterNotFound, NothingToRollBack."""
        with self._writing:
            if self._ledger.alias(name) is None:
                self._ledger.roll_back(name)
            else:
                self._ledger.roll_back_alias(name)
            self._read(name)

    def point(self, alias: str, ref: AdapterRef) -> bool:
        """As Ledger.point."""
        with self._writing:
            has_moved = self._ledger.point(alias, ref.name, ref.version)
            self._read(alias)
        return has_moved

    def remove_alias(self, alias: str) -> None:
        with self._writing:
            self._ledger.remove_alias(alias)
            self._read(alias)

    def change(self, name: str, act: Callable[[sqlite3.Connection], None]) -> None:
        """Any act on a name or an alias, as one transaction."""
        with self._writing:
            self._ledger.change(name, act)
            self._read(name)

    def set_pinned(self, name: str, is_pinned: bool) -> None:
        with self._writing:
            self._ledger.set_pinned(name, is_pinned)
            self._read(name)

    def set_enabled(self, name: str, is_enabled: bool) -> None:
        with self._writing:
            self._ledger.set_enabled(name, is_enabled)
            self._read(name)

    def watch(self, *, is_urgent: bool = False) -> bool:
        """Take in what other servers have written; True if there was anything. Skipped while this one writes."""
        now_s = time.monotonic()
        if now_s < self._next_watch_s and not is_urgent:
            return False
        if not self._writing.acquire(blocking=False):
            return False
        try:
            self._next_watch_s = now_s + _WATCH_INTERVAL_S
            return self._ledger.pulse() != self._pulse and self._read_changes()
        finally:
            self._writing.release()

    def _aliases_of(self, name: str) -> list[str]:
        with self._reading:
            return [alias.alias for alias in self._catalogue.aliases() if alias.name == name]

    def _look_up(self, name: str) -> tuple[NameRecord, VersionRecord] | None:
        """One state of the catalogue answers, so a name and an alias never mean two moments at once."""
        plain, has_selector, selector = name.partition("@")
        with self._reading:
            alias = None if has_selector else self._catalogue.alias(plain)
            record = self._catalogue.get(plain if alias is None else alias.name)
        if record is None:
            return None
        if alias is not None:
            version = record.version(alias.version)
        else:
            version = record.select(selector) if has_selector else record.head
        return None if version is None else (record, version)

    def _near(self, name: str, is_visible: Callable[[str], bool]) -> tuple[str, ...]:
        """Names that may have been meant; for a name without a current version, its latest version."""
        with self._reading:
            record = self._catalogue.get(name)
            if record is not None and is_visible(name):
                return (str(record.versions[-1].ref),)
            return self._catalogue.near(name, lambda found: is_visible(self._target(found)))

    def _target(self, name: str) -> str:
        """The adapter behind a name or an alias: it decides who may see either."""
        alias = self._catalogue.alias(name)
        return name if alias is None else alias.name

    def _read_changes(self) -> bool:
        changed = self._ledger.changed_names(self._last_change)
        if changed is None:
            self._read_all()
            return True
        self._note_position()
        for name in changed:
            self._read(name)
        return bool(changed)

    def _read_all(self) -> None:
        self._note_position()
        catalogue = Catalogue(self._ledger.records(), self._ledger.aliases())
        with self._reading:
            self._catalogue = catalogue

    def _note_position(self) -> None:
        """Noted before reading: what is written meanwhile is read again next time."""
        self._pulse = self._ledger.pulse()
        self._last_change = self._ledger.last_change()

    def _read(self, name: str) -> None:
        """A name or an alias, as it stands on disk."""
        record, alias = self._ledger.record(name), self._ledger.alias(name)
        with self._reading:
            if record is not None:
                self._catalogue.put(record)
            elif alias is not None:
                self._catalogue.put_alias(alias)
            else:
                self._catalogue.drop(name)
