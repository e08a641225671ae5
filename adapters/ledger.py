"""Ledger: the registry's truth on disk: names, versions and pins in one SQLite file.

Owns the schema and the transactions; each public method is one, and is durable when it returns (WAL, synchronous=FULL:
SQLite syncs the log at every commit). Knows no files but its own and keeps nothing in memory.

Rows of removed versions stay, marked: a number, once given, never comes to mean other content, and the same content
registered again gets its old number back.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from adapters.catalogue import NameRecord, VersionRecord
from adapters.errors import AdapterError, InsufficientStorage
from adapters.ref import AdapterRef
from adapters.sites import Part
from adapters.validation import PackageReport

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 10.0
"""Another server's transaction takes milliseconds; this long means that it hangs."""
_CHANGES_KEPT = 1000
"""A server that has missed more than this many changes of another reads everything, in about 0.1 s."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS version (
    name TEXT NOT NULL, version INTEGER NOT NULL,
    digest TEXT NOT NULL, vision_digest TEXT NOT NULL, language_digest TEXT NOT NULL,
    kind TEXT NOT NULL, num_bytes INTEGER NOT NULL, rank INTEGER NOT NULL,
    targets TEXT NOT NULL, parts TEXT NOT NULL, num_sites INTEGER NOT NULL,
    source TEXT NOT NULL, created_s REAL NOT NULL, is_removed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (name, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS name (
    name TEXT PRIMARY KEY, current INTEGER NOT NULL, is_pinned INTEGER NOT NULL, is_enabled INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS change (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS version_digest ON version (digest) WHERE NOT is_removed;
"""

_SELECT = """
SELECT n.name, n.current, n.is_pinned, n.is_enabled, v.version, v.digest, v.vision_digest, v.language_digest, v.kind,
       v.num_bytes, v.rank, v.targets, v.parts, v.num_sites, v.source, v.created_s
FROM name n JOIN version v ON v.name = n.name AND NOT v.is_removed
"""

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
            rows = self._connection.execute(_SELECT + "ORDER BY n.name, v.version").fetchall()
        return [_name_record(list(group)) for _, group in groupby(rows, key=lambda row: row[0])]

    def record(self, name: str) -> NameRecord | None:
        with self._lock, _storage_errors():
            rows = self._connection.execute(
                _SELECT + "WHERE n.name = ? ORDER BY v.version", (name,)
            ).fetchall()
        return _name_record(rows) if rows else None

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
            for statement in _SCHEMA.split(";"):
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
    connection.execute(
        "INSERT INTO version VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
        (
            name,
            number,
            report.digest,
            report.vision_digest,
            report.language_digest,
            report.kind,
            report.num_bytes,
            report.rank,
            json.dumps(report.targets),
            json.dumps(report.parts),
            report.num_sites,
            source,
            created_s,
        ),
    )
    return number


def _name_record(rows: list[tuple[Any, ...]]) -> NameRecord:
    name, current, is_pinned, is_enabled = rows[0][:4]
    versions = tuple(_version_record(name, row[4:]) for row in rows)
    return NameRecord(name, current, bool(is_pinned), bool(is_enabled), versions)


def _version_record(name: str, row: tuple[Any, ...]) -> VersionRecord:
    number, digest, vision, language, kind, num_bytes, rank, targets, parts, num_sites, source, created_s = (
        row
    )
    report = PackageReport(
        kind=kind,
        digest=digest,
        vision_digest=vision,
        language_digest=language,
        num_bytes=num_bytes,
        rank=rank,
        targets=_names(targets),
        parts=cast(tuple[Part, ...], _names(parts)),
        num_sites=num_sites,
    )
    return VersionRecord(AdapterRef(name, number, digest, vision, language), report, source, created_s)


@lru_cache(maxsize=4096)
def _names(text: str) -> tuple[str, ...]:
    """Shared between records: ten thousand adapters have a handful of target lists."""
    return tuple(json.loads(text))


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
