"""Garbage: packages that no name means and nobody leases, deleted as soon as that is so.

Owns when bytes go. Asks the names whether a digest is meant, the leases whether it is held here, and the store whether
another server that shares it holds it; takes nothing that is. When a store with a limit is full, it looks for what
nothing means and nobody has noticed: what a killed server kept and never registered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from adapters.leases import LeaseBook
from adapters.names import Names
from adapters.store import PackageStore


class Garbage:
    """Thread-safe. ``on_deleted`` gets the digest of what is gone."""

    def __init__(
        self, store: PackageStore, names: Names, leases: LeaseBook, on_deleted: Callable[[str], None]
    ) -> None:
        self._store = store
        self._names = names
        self._leases = leases
        self._on_deleted = on_deleted
        self._collecting = threading.Lock()
        self._waiting: set[str] = set()
        self._reapers: list[threading.Thread] = []

    def collect_later(self, digest: str) -> None:
        """A package's last lease has gone, perhaps on the engine's thread: if no name means it, another deletes it."""
        if self._names.is_meant(digest):
            return
        reaper = threading.Thread(target=self.collect, args=(digest,), name="registry-reaper", daemon=True)
        self._reapers = [thread for thread in self._reapers if thread.is_alive()] + [reaper]
        reaper.start()

    def collect(self, *digests: str) -> None:
        """Delete what nothing means and nobody leases, of these and of what waits from before.

        While others add, all of it waits for the next time; so does what another server holds.
        """
        with self._collecting:
            self._waiting.update(digests)
            if not self._waiting:
                return
            with self._store.alone() as is_alone:
                if is_alone:
                    free = {digest for digest in self._waiting if not self._leases.is_held(digest)}
                    self._waiting -= {digest for digest in free if self._is_done_with(digest)}

    def make_room(self, num_bytes: int) -> None:
        """If as many bytes would not fit the store's limit, delete all that nothing means and nobody holds."""
        if not self._store.size.has_room(num_bytes):
            self.collect(*(digest for digest in self._store.digests() if not self._names.is_meant(digest)))

    def _is_done_with(self, digest: str) -> bool:
        """False while another server holds it, which may not know yet that it should go."""
        if self._names.is_meant_on_disk(digest):
            return True
        self._leases.forget(digest)
        if self._store.remove(digest):
            self._on_deleted(digest)
            return True
        return not self._store.path(digest).is_dir()

    def finish(self) -> None:
        """Wait for the deletions that are under way."""
        for reaper in self._reapers:
            reaper.join()
