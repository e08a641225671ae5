"""Ledger: the registry's truth on disk: names, versions and pins in one SQLite file.

Owns the transactions; each public method is one, and is durable when it returns (WAL, synchronous=FULL:
SQLite syncs the log at every commit). Knows no files but its own and keeps nothing in memory.

Rows of removed versions stay, marked: a number, once given, never comes to mean other content, and the same content
registered again gets its old number back.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from adapters.catalogue import NameRecord, VersionRecord
from adapters.errors import AdapterError, InsufficientStorage
from adapters.ledger_rows import SCHEMA, SCHEMA_VERSION, SELECT, ref_of, to_record, to_row
from adapters.validation import PackageReport

_BUSY_TIMEOUT_S = 10.0
"""Another server's transaction takes milliseconds; this long means that it hangs."""
_CHANGES_KEPT = 1000
"""A server that has missed more than this many changes of another reads everything, in about 0.1 s."""

_STORAGE_CODES = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
)


class Ledger:
    """Thread-safe: one connection behind one lock. Raises InsufficientStorage when the disk does not take a write."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        with _storage_errors():
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
        with self._lock, _storage_errors():
            return int(self._connection.execute("SELECT coalesce(max(number), 0) FROM change").fetchone()[0])

    def changed_names(self, since: int) -> set[str] | None:
        """Names written after change ``since``; None when so much has changed that all should be read."""
        with self._lock, _storage_errors():
            rows = self._connection.execute(
                "SELECT number, name FROM change WHERE number > ?", (since,)
            ).fetchall()
        is_whole = not rows or rows[0][0] == since + 1
        return {name for _, name in rows} if is_whole else None

    def records(self) -> list[NameRecord]:
        with self._lock, _storage_errors():
            rows = self._connection.execute(SELECT + "ORDER BY n.name, v.version").fetchall()
        return [to_record(list(group)) for _, group in groupby(rows, key=itemgetter(3))]

    def record(self, name: str) -> NameRecord | None:
        with self._lock, _storage_errors():
            rows = self._connection.execute(
                SELECT + "WHERE n.name = ? ORDER BY v.version", (name,)
            ).fetchall()
        return to_record(rows) if rows else None

    def is_referenced(self, digest: str) -> bool:
        with self._lock, _storage_errors():
            query = "SELECT 1 FROM version WHERE digest = ? AND NOT is_removed LIMIT 1"
            return self._connection.execute(query, (digest,)).fetchone() is not None

    def insert(self, name: str, report: PackageReport, *, source: str, created_s: float, pin: bool) -> bool:
        """Make ``report``'s content what ``name`` means. False if it meant that already."""
        with self._change(name) as connection:
            current = connection.execute(
                "SELECT v.digest FROM name n JOIN version v USING (name) WHERE n.name = ? AND v.version = n.current",
                (name,),
            ).fetchone()
            if current is not None and current[0] == report.digest:
                if pin:
                    connection.execute("UPDATE name SET is_pinned = 1 WHERE name = ?", (name,))
                return False
            number = _revive(connection, name, report) or _append(connection, name, report, source, created_s)
            connection.execute(
                "INSERT INTO name VALUES (?, ?, ?, 1) ON CONFLICT (name) DO UPDATE SET "
                "current = excluded.current, is_enabled = 1, is_pinned = max(is_pinned, excluded.is_pinned)",
                (name, number, int(pin)),
            )
            return True

    def remove(self, name: str, version: int | None = None) -> None:
        """Forget a name, or one version of it: then the name means the highest that is left, or is gone."""
        with self._change(name) as connection:
            connection.execute(
                "UPDATE version SET is_removed = 1 WHERE name = ? AND version = coalesce(?, version)",
                (name, version),
            )
            query = "SELECT max(version) FROM version WHERE name = ? AND NOT is_removed"
            left = connection.execute(query, (name,)).fetchone()[0]
            if left is None:
                connection.execute("DELETE FROM name WHERE name = ?", (name,))
            else:
                connection.execute(
                    "UPDATE name SET current = ? WHERE name = ? AND current = ?", (left, name, version)
                )

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
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _change(self, name: str) -> Iterator[sqlite3.Connection]:
        with self._transaction() as connection:
            yield connection
            connection.execute("INSERT INTO change (name) VALUES (?)", (name,))
            connection.execute("DELETE FROM change WHERE number <= last_insert_rowid() - ?", (_CHANGES_KEPT,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _storage_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


def _revive(connection: sqlite3.Connection, name: str, report: PackageReport) -> int | None:
    """The number that this content had under this name before; its row is alive again."""
    query = "SELECT max(version) FROM version WHERE name = ? AND digest = ?"
    number: int | None = connection.execute(query, (name, report.digest)).fetchone()[0]
    if number is not None:
        connection.execute("UPDATE version SET is_removed = 0 WHERE name = ? AND version = ?", (name, number))
    return number


def _append(
    connection: sqlite3.Connection, name: str, report: PackageReport, source: str, created_s: float
) -> int:
    query = "SELECT coalesce(max(version), 0) + 1 FROM version WHERE name = ?"
    number = int(connection.execute(query, (name,)).fetchone()[0])
    row = to_row(VersionRecord(ref_of(name, number, report), report, source, created_s))
    connection.execute(f"INSERT INTO version VALUES ({', '.join('?' * len(row))}, 0)", row)
    return number


@contextmanager
def _storage_errors() -> Iterator[None]:
    """SQLite's errors, translated where they enter."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in _STORAGE_CODES:  # the low byte is the primary code
            raise InsufficientStorage(
                f"the adapter registry cannot be written ({error}); free disk space"
            ) from error
        raise AdapterError(
            f"the adapter registry did not answer ({error}); does another server hold it?"
        ) from error
    except sqlite3.DatabaseError as error:
        raise AdapterError(
            f"the adapter registry cannot be read ({error}); move registry.sqlite away"
        ) from error
