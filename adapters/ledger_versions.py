"""Versions in the ledger: how a number is given, and given back. SQL on a connection within a transaction."""

from __future__ import annotations

import sqlite3

from adapters.catalogue import VersionRecord
from adapters.ledger_rows import ref_of, to_row
from adapters.validation import PackageReport


def revive(connection: sqlite3.Connection, name: str, report: PackageReport) -> int | None:
    """The number that this content had under this name before; its row is alive again."""
    query = "SELECT max(version) FROM version WHERE name = ? AND digest = ?"
    number: int | None = connection.execute(query, (name, report.digest)).fetchone()[0]
    if number is not None:
        connection.execute("UPDATE version SET is_removed = 0 WHERE name = ? AND version = ?", (name, number))
    return number


def append(
    connection: sqlite3.Connection, name: str, report: PackageReport, source: str, created_s: float
) -> int:
    """Give the next number. Numbers of removed versions are not given again."""
    query = "SELECT coalesce(max(version), 0) + 1 FROM version WHERE name = ?"
    number = int(connection.execute(query, (name,)).fetchone()[0])
    row = to_row(VersionRecord(ref_of(name, number, report), report, source, created_s))
    connection.execute(f"INSERT INTO version VALUES ({', '.join('?' * len(row))})", row)
    return number
