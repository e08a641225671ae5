"""Pointers: what a bare name or an alias means, moved forwards and back. Versions never change; these do.

Owns the acts on pointers, each durable and atomic: a request resolves to what was meant before or to what is meant
after, and one that has resolved keeps its version. Knows no device: whoever promotes proves the version first.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from adapters.catalogue import AliasRecord
from adapters.entry import AdapterEntry, entry_of
from adapters.errors import AdapterNotFound, NothingToRollBack
from adapters.leases import LeaseBook
from adapters.names import Names
from adapters.ref import AdapterRef
from adapters.spelling import Spelling

_log = logging.getLogger("lorikeet.adapters.pointers")


class Pointers:
    """Thread-safe."""

    def __init__(self, names: Names, leases: LeaseBook, spelling: Spelling) -> None:
        self._names = names
        self._leases = leases
        self._spelling = spelling

    def promote(self, name: str, *, pin: bool = False) -> tuple[AdapterEntry, bool]:
        """Make ``name@3`` or ``name@sha256:…`` what the bare name means; False if it was.

        ``pin`` also pins the name, in the same transaction. Raises AdapterNotFound, InsufficientStorage.
        """
        record, version = self._names.find(name)
        has_moved = self._names.promote(record.name, version.ref.version, pin=pin)
        _log.info("adapter.promoted ref=%s has_moved=%s", version.ref, has_moved)
        return self._entry(str(version.ref)), has_moved

    def previous(self, name: str) -> AdapterEntry:
        """What ``roll_back`` would make a name or an alias mean. Raises AdapterNotFound, NothingToRollBack."""
        alias = self._names.alias(name)
        if alias is not None:
            return self._previous_target(alias)
        record = self._names.record(name)
        if record.previous is None:
            raise NothingToRollBack(name)
        return entry_of(record, record.previous, self._leases)

    def roll_back(self, name: str) -> AdapterEntry:
        """Make a name or an alias mean what it meant before. Raises AdapterNotFound, NothingToRollBack."""
        self._names.roll_back(name)
        entry = self._entry(name)
        _log.info("adapter.rolled_back name=%s ref=%s", name, entry.ref)
        return entry

    def point(self, alias: str, target: str) -> tuple[AdapterEntry, bool]:
        """Make ``alias`` mean the version that ``target`` means now; False if it did already.

        Raises InvalidAdapterName, AdapterNotFound, AdapterExists (the alias is an adapter's name).
        """
        self._spelling.check_alias(alias)
        entry = self._entry(target)
        has_moved = self._names.point(alias, entry.ref)
        _log.info("alias.pointed alias=%s ref=%s has_moved=%s", alias, entry.ref, has_moved)
        return entry, has_moved

    def remove_alias(self, alias: str) -> None:
        """Raises AdapterNotFound."""
        if self._names.alias(alias) is None:
            raise AdapterNotFound(alias)
        self._names.remove_alias(alias)
        _log.info("alias.removed alias=%s", alias)

    def alias(self, alias: str) -> AliasRecord | None:
        return self._names.alias(alias)

    def aliases(self) -> list[AliasRecord]:
        """In order."""
        return self._names.aliases()

    def pinned(self) -> list[AdapterRef]:
        """What pinned names mean, in order of their names."""
        return self._names.pinned()

    def _entry(self, name: str) -> AdapterEntry:
        return entry_of(*self._names.find(name), self._leases)

    def _previous_target(self, alias: AliasRecord) -> AdapterEntry:
        for name, number in reversed(alias.history):
            with suppress(AdapterNotFound):
                if (name, number) != (alias.name, alias.version):
                    return self._entry(f"{name}@{number}")
        raise NothingToRollBack(alias.alias)
