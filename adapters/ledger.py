"""Ledger: the registry's truth on disk: names, versions and pins in one SQLite file.

Owns the transactions; each public method is one, and is durable when it returns (WAL, synchronous=FULL:
SQLite syncs the log at every commit). Knows no files but its own and keeps nothing in memory.

Rows of removed versions stay, marked: a number, once given, never comes to mean other content, and the same content
registered again gets its old number back.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from adapters import ledger_pointers as pointers
from adapters import ledger_versions as versions
from adapters.catalogue import AliasRecord, NameRecord
from adapters.errors import AdapterError
from adapters.ledger_conduct import SELECT_ALIAS, TRIGGERS
from adapters.ledger_errors import ledger_errors
from adapters.ledger_rows import (
    FROM_1,
    FROM_2,
    NUM_NAME_COLUMNS,
    SCHEMA,
    SCHEMA_VERSION,
    SELECT,
    to_alias,
    to_record,
)
from adapters.validation import PackageReport

T = TypeVar("T")

_BUSY_TIMEOUT_S = 10.0
"""Another server's transaction takes milliseconds; this long means that it hangs."""
_CHANGES_KEPT = 1000
"""A server that has missed more than this many changes of another reads everything, in about 0.1 s."""


@dataclass(frozen=True, slots=True)
class Inserted:
    """What a registration came to."""

    number: int
    is_new: bool
    """False if the name had this version already, current or not."""
    has_moved: bool
    """Whether the name came to mean this version with it."""


class Ledger:
    """Thread-safe: one connection behind one lock. Raises InsufficientStorage when the disk does not take a write."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        with ledger_errors():
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._prepare()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def pulse(self) -> int:
        """A number that moves when another process has committed; costs microseconds."""
        with self._lock:
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def last_change(self) -> int:
        with self._lock, ledger_errors():
            return int(self._connection.execute("SELECT coalesce(max(number), 0) FROM change").fetchone()[0])

    def changed_names(self, since: int) -> set[str] | None:
        """Names written after change ``since``; None when so much has changed that all should be read."""
        with self._lock, ledger_errors():
            rows = self._connection.execute(
                "SELECT number, name FROM change WHERE number > ?", (since,)
            ).fetchall()
        is_whole = not rows or rows[0][0] == since + 1
        return {name for _, name in rows} if is_whole else None

    def records(self) -> list[NameRecord]:
        with self._lock, ledger_errors():
            rows = self._connection.execute(SELECT + "ORDER BY n.name, v.version").fetchall()
        return [to_record(list(group)) for _, group in groupby(rows, key=itemgetter(NUM_NAME_COLUMNS - 1))]

    def aliases(self) -> list[AliasRecord]:
        with self._lock, ledger_errors():
            return [to_alias(row) for row in self._connection.execute(SELECT_ALIAS).fetchall()]

    def alias(self, alias: str) -> AliasRecord | None:
        with self._lock, ledger_errors():
            row = self._connection.execute(SELECT_ALIAS + "WHERE a.alias = ?", (alias,)).fetchone()
        return None if row is None else to_alias(row)

    def record(self, name: str) -> NameRecord | None:
        with self._lock, ledger_errors():
            rows = self._connection.execute(
                SELECT + "WHERE n.name = ? ORDER BY v.version", (name,)
            ).fetchall()
        return to_record(rows) if rows else None

    def is_referenced(self, digest: str) -> bool:
        with self._lock, ledger_errors():
            query = "SELECT 1 FROM version WHERE digest = ? AND NOT is_removed LIMIT 1"
            return self._connection.execute(query, (digest,)).fetchone() is not None

    def insert(
        self, name: str, report: PackageReport, *, source: str, created_s: float, pin: bool, promote: bool
    ) -> Inserted:
        """Make ``report``'s content a version of ``name`` and, if asked, what the name means.

        Raises AdapterExists if the name is an alias.
        """
        with self._change(name) as connection:
            pointers.require_no_alias(connection, name)
            live = "SELECT max(version) FROM version WHERE name = ? AND digest = ? AND NOT is_removed"
            found = connection.execute(live, (name, report.digest)).fetchone()[0]
            number = found or versions.revive(connection, name, report)
            number = number or versions.append(connection, name, report, source, created_s)
            connection.execute(
                "INSERT INTO name (name, current, is_pinned, is_enabled) VALUES (?, 0, ?, 1) ON CONFLICT (name) "
                "DO UPDATE SET is_enabled = 1, is_pinned = max(is_pinned, excluded.is_pinned)",
                (name, int(pin)),
            )
            has_moved = promote and pointers.promote(connection, name, number)
            return Inserted(number, is_new=found is None, has_moved=has_moved)

    def remove(self, name: str, version: int | None = None, *, is_spared_if_meant: bool = False) -> list[str]:
        """Forget a name, or one version of it, and return the aliases that this moved.

        Whatever pointed at what is gone goes back to what it pointed at before; a name without versions is gone, an
        alias without a target too. A version may be spared if anything points at it.
        """
        with self._change(name) as connection:
            if is_spared_if_meant and pointers.is_meant(connection, name, version):
                return []
            connection.execute(
                "UPDATE version SET is_removed = 1 WHERE name = ? AND version = coalesce(?, version)",
                (name, version),
            )
            query = "SELECT 1 FROM version WHERE name = ? AND NOT is_removed LIMIT 1"
            if connection.execute(query, (name,)).fetchone() is None:
                connection.execute("DELETE FROM name WHERE name = ?", (name,))
            else:
                pointers.leave_removed(connection, name)
            moved = pointers.aliases_of(connection, name, version)
            for alias in moved:
                pointers.leave_removed_target(connection, alias)
                _note(connection, alias)
            return moved

    def promote(self, name: str, number: int, *, pin: bool) -> bool:
        """Move the name's pointer, and pin it. False if it was there already. Raises AdapterNotFound."""
        with self._change(name) as connection:
            if pin:
                connection.execute("UPDATE name SET is_pinned = 1 WHERE name = ?", (name,))
            return pointers.promote(connection, name, number)

    def roll_back(self, name: str) -> int:
        """Move the name's pointer to where it was before; that version. Raises AdapterNotFound, NothingToRollBack."""
        with self._change(name) as connection:
            return pointers.roll_back(connection, name)

    def point(self, alias: str, name: str, number: int) -> bool:
        """Make or move an alias. False if it was there already. Raises AdapterNotFound, AdapterExists."""
        with self._change(alias) as connection:
            return pointers.point(connection, alias, (name, number))

    def roll_back_alias(self, alias: str) -> None:
        """Raises AdapterNotFound, NothingToRollBack."""
        with self._change(alias) as connection:
            pointers.roll_back_alias(connection, alias)

    def remove_alias(self, alias: str) -> None:
        with self._change(alias) as connection:
            connection.execute("DELETE FROM alias WHERE alias = ?", (alias,))

    def set_pinned(self, name: str, is_pinned: bool) -> None:
        with self._change(name) as connection:
            connection.execute("UPDATE name SET is_pinned = ? WHERE name = ?", (int(is_pinned), name))

    def set_enabled(self, name: str, is_enabled: bool) -> None:
        with self._change(name) as connection:
            connection.execute("UPDATE name SET is_enabled = ? WHERE name = ?", (int(is_enabled), name))

    def _prepare(self) -> None:
        with self._transaction() as connection:
            found = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if found > SCHEMA_VERSION:
                raise AdapterError(
                    f"the registry was written by a newer Lorikeet (schema {found}; this one knows {SCHEMA_VERSION})"
                )
            steps = SCHEMA + (FROM_1 if found == 1 else "") + (FROM_2 if found in (1, 2) else "")
            for statement in (*steps.split(";"), *TRIGGERS):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def change(self, name: str, act: Callable[[sqlite3.Connection], T]) -> T:
        """Any act on a name or an alias, as one transaction."""
        with self._change(name) as connection:
            return act(connection)

    @contextmanager
    def _change(self, name: str) -> Iterator[sqlite3.Connection]:
        with self._transaction() as connection:
            yield connection
            _note(connection, name)
            connection.execute("DELETE FROM change WHERE number <= last_insert_rowid() - ?", (_CHANGES_KEPT,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, ledger_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def _note(connection: sqlite3.Connection, name: str) -> None:
    """Tell other servers that this name or alias was written."""
    connection.execute("INSERT INTO change (name) VALUES (?)", (name,))
