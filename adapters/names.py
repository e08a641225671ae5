"""Names: what every name means, read in microseconds and written durably.

Owns the agreement of the ledger (on disk, the truth) and the catalogue (in memory, for reading), also when other
servers write to the same ledger. Knows no files and no leases. Reading never waits for the disk: the lock over the
catalogue is never held while something is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from adapters.catalogue import Catalogue, NameRecord, VersionRecord
from adapters.errors import AdapterNotFound
from adapters.ledger import Ledger
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
        """What ``name``, ``name@3`` or ``name@sha256:<prefix>`` means.

        Raises AdapterNotFound with near names, of those for which ``is_visible``.
        """
        self.watch()
        found = self._look_up(name)
        if found is None and self.watch(is_urgent=True):
            found = self._look_up(name)
        if found is None:
            with self._reading:
                near = self._catalogue.near(name.partition("@")[0], is_visible)
            raise AdapterNotFound(name, near)
        return found

    def all(self) -> list[NameRecord]:
        self.watch()
        with self._reading:
            records = list(self._catalogue)
        return sorted(records, key=lambda record: record.name)

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

    def insert(self, name: str, report: PackageReport, *, source: str, pin: bool) -> bool:
        """Make ``report``'s content what ``name`` means. False if it meant that already."""
        with self._writing:
            is_created = self._ledger.insert(name, report, source=source, created_s=time.time(), pin=pin)
            self._read(name)
        return is_created

    def remove(self, name: str, version: int | None) -> None:
        with self._writing:
            self._ledger.remove(name, version)
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

    def _look_up(self, name: str) -> tuple[NameRecord, VersionRecord] | None:
        plain, has_selector, selector = name.partition("@")
        with self._reading:
            record = self._catalogue.get(plain)
        if record is None:
            return None
        version = record.select(selector) if has_selector else record.head
        return None if version is None else (record, version)

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
        catalogue = Catalogue(self._ledger.records())
        with self._reading:
            self._catalogue = catalogue

    def _note_position(self) -> None:
        """Noted before reading: what is written meanwhile is read again next time."""
        self._pulse = self._ledger.pulse()
        self._last_change = self._ledger.last_change()

    def _read(self, name: str) -> None:
        record = self._ledger.record(name)
        with self._reading:
            if record is None:
                self._catalogue.drop(name)
            else:
                self._catalogue.put(record)
