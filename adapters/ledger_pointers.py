"""What a name or an alias points at, how that moves, and how it moves back. SQL on a connection within a transaction.

Owns the two columns ``history``: what was meant before, the latest last. A rollback goes one step back in it and
forgets the step, so that a rollback sent twice goes further back and never returns to what was just left.
"""

from __future__ import annotations

import json
import sqlite3

from adapters.errors import AdapterExists, AdapterNotFound, NothingToRollBack

MAX_HISTORY = 32
"""Steps that a rollback can go back; older ones are forgotten."""

Target = tuple[str, int]
"""A name and one of its versions."""


# ---- a name's own pointer --------------------------------------------------------------------------------------


def promote(connection: sqlite3.Connection, name: str, number: int) -> bool:
    """Make a version what its name means. False if it was that already. Raises AdapterNotFound if there is none."""
    if not _is_live(connection, (name, number)):
        raise AdapterNotFound(f"{name}@{number}")
    current, history = _read_name(connection, name)
    if current == number:
        return False
    before = [*history, current] if current else history
    _write_name(connection, name, number, before)
    return True


def roll_back(connection: sqlite3.Connection, name: str) -> int:
    """Make what was current before current again, and return its number. Raises NothingToRollBack."""
    current, history = _read_name(connection, name)
    number = _step_back(connection, name, current, history)
    if not number:
        raise NothingToRollBack(name)
    return number


def leave_removed(connection: sqlite3.Connection, name: str) -> None:
    """After a removal: a name whose current version is gone goes one step back, or means nothing any more."""
    current, history = _read_name(connection, name)
    if not _is_live(connection, (name, current)) and not _step_back(connection, name, current, history):
        _write_name(connection, name, 0, [])


def _step_back(connection: sqlite3.Connection, name: str, current: int, history: list[int]) -> int:
    """The number that became current; 0 if nothing of the history is left."""
    while history:
        number = history.pop()
        if number != current and _is_live(connection, (name, number)):
            _write_name(connection, name, number, history)
            return number
    return 0


def _read_name(connection: sqlite3.Connection, name: str) -> tuple[int, list[int]]:
    row = connection.execute("SELECT current, history FROM name WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise AdapterNotFound(name)
    return int(row[0]), json.loads(row[1])


def _write_name(connection: sqlite3.Connection, name: str, number: int, history: list[int]) -> None:
    connection.execute(
        "UPDATE name SET current = ?, history = ? WHERE name = ?",
        (number, json.dumps(history[-MAX_HISTORY:]), name),
    )


# ---- aliases ---------------------------------------------------------------------------------------------------


def point(connection: sqlite3.Connection, alias: str, target: Target) -> bool:
    """Make an alias, or move it. False if it pointed there already. Raises AdapterNotFound, AdapterExists."""
    if not _is_live(connection, target):
        raise AdapterNotFound(f"{target[0]}@{target[1]}")
    if connection.execute("SELECT 1 FROM name WHERE name = ?", (alias,)).fetchone():
        raise AdapterExists(alias, "is the name of an adapter; choose another name for the alias")
    row = connection.execute("SELECT name, version, history FROM alias WHERE alias = ?", (alias,)).fetchone()
    if row is not None and (row[0], row[1]) == target:
        return False
    history = [] if row is None else [*json.loads(row[2]), [row[0], row[1]]]
    _write_alias(connection, alias, target, history)
    return True


def roll_back_alias(connection: sqlite3.Connection, alias: str) -> None:
    """Raises AdapterNotFound, NothingToRollBack."""
    row = connection.execute("SELECT name, version, history FROM alias WHERE alias = ?", (alias,)).fetchone()
    if row is None:
        raise AdapterNotFound(alias)
    if not _step_alias_back(connection, alias, (row[0], row[1]), json.loads(row[2])):
        raise NothingToRollBack(alias)


def aliases_of(connection: sqlite3.Connection, name: str, version: int | None) -> list[str]:
    query = "SELECT alias FROM alias WHERE name = ? AND version = coalesce(?, version)"
    return [row[0] for row in connection.execute(query, (name, version)).fetchall()]


def is_meant(connection: sqlite3.Connection, name: str, version: int | None) -> bool:
    """Whether the bare name or an alias means this version."""
    query = "SELECT 1 FROM name WHERE name = ? AND current = ?"
    is_current = connection.execute(query, (name, version)).fetchone() is not None
    return is_current or bool(aliases_of(connection, name, version))


def leave_removed_target(connection: sqlite3.Connection, alias: str) -> None:
    """After a removal: an alias whose version is gone goes one step back, or is gone too."""
    query = "SELECT name, version, history FROM alias WHERE alias = ?"
    name, version, history = connection.execute(query, (alias,)).fetchone()
    if not _step_alias_back(connection, alias, (name, version), json.loads(history)):
        connection.execute("DELETE FROM alias WHERE alias = ?", (alias,))


def require_no_alias(connection: sqlite3.Connection, name: str) -> None:
    if connection.execute("SELECT 1 FROM alias WHERE alias = ?", (name,)).fetchone():
        raise AdapterExists(name, "is an alias; remove the alias or choose another name")


def _step_alias_back(
    connection: sqlite3.Connection, alias: str, current: Target, history: list[list[object]]
) -> bool:
    while history:
        name, version = history.pop()
        target = (str(name), int(str(version)))
        if target != current and _is_live(connection, target):
            _write_alias(connection, alias, target, history)
            return True
    return False


def _write_alias(
    connection: sqlite3.Connection, alias: str, target: Target, history: list[list[object]]
) -> None:
    connection.execute(
        "INSERT INTO alias VALUES (?, ?, ?, ?) ON CONFLICT (alias) DO UPDATE SET "
        "name = excluded.name, version = excluded.version, history = excluded.history",
        (alias, *target, json.dumps(history[-MAX_HISTORY:])),
    )


def _is_live(connection: sqlite3.Connection, target: Target) -> bool:
    query = "SELECT 1 FROM version WHERE name = ? AND version = ? AND NOT is_removed"
    return connection.execute(query, target).fetchone() is not None
