"""How adapters are served, in the ledger: profiles that were set here, and how aliases are split. SQL in a transaction.

Owns two tables and their triggers, which take a profile away with its version and a split with its alias, in the same
transaction as whatever removed them: so no other file need know that there is anything to remove.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping

from adapters.errors import AdapterNotFound
from adapters.traffic import Shadow, Traffic

_ALL_VERSIONS = 0
"""As ``profile_layers.ALL_VERSIONS``, which stands above this file."""

TABLES = """
CREATE TABLE IF NOT EXISTS profile (
    name TEXT NOT NULL, version INTEGER NOT NULL, fields TEXT NOT NULL, PRIMARY KEY (name, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS traffic (
    alias TEXT PRIMARY KEY, weights TEXT NOT NULL, sticky TEXT NOT NULL, salt TEXT NOT NULL,
    shadow INTEGER NOT NULL, share REAL NOT NULL, tokens_per_minute INTEGER
) WITHOUT ROWID
"""

TRIGGERS = (
    """
    CREATE TRIGGER IF NOT EXISTS version_removed AFTER UPDATE OF is_removed ON version
    WHEN NEW.is_removed AND NOT OLD.is_removed BEGIN
        DELETE FROM profile WHERE name = NEW.name AND version = NEW.version;
        INSERT INTO change (name) SELECT t.alias FROM traffic t JOIN alias a ON a.alias = t.alias
            WHERE a.name = NEW.name;
        UPDATE traffic SET
            weights = json_remove(weights, '$."' || NEW.version || '"'),
            shadow = CASE shadow WHEN NEW.version THEN 0 ELSE shadow END
            WHERE alias IN (SELECT alias FROM alias WHERE name = NEW.name);
    END
    """,
    """
    CREATE TRIGGER IF NOT EXISTS name_removed AFTER DELETE ON name BEGIN
        DELETE FROM profile WHERE name = OLD.name;
    END
    """,
    """
    CREATE TRIGGER IF NOT EXISTS alias_moved AFTER UPDATE OF name, version ON alias
    WHEN NEW.name <> OLD.name OR NEW.version <> OLD.version BEGIN
        DELETE FROM traffic WHERE alias = NEW.alias;
    END
    """,
    """
    CREATE TRIGGER IF NOT EXISTS alias_removed AFTER DELETE ON alias BEGIN
        DELETE FROM traffic WHERE alias = OLD.alias;
    END
    """,
)

PROFILES_COLUMN = (
    "(SELECT json_group_object(CAST(p.version AS TEXT), json(p.fields)) FROM profile p WHERE p.name = n.name)"
)
SELECT_ALIAS = """
SELECT a.alias, a.name, a.version, a.history,
       t.weights, t.sticky, t.salt, t.shadow, t.share, t.tokens_per_minute
FROM alias a LEFT JOIN traffic t ON t.alias = a.alias
"""

Fields = Mapping[str, object]


def change_profile(connection: sqlite3.Connection, name: str, version: int, changes: Fields) -> None:
    """Set fields of a name's or a version's profile; None takes one out. Raises AdapterNotFound."""
    _require(connection, name, version)
    row = connection.execute(
        "SELECT fields FROM profile WHERE name = ? AND version = ?", (name, version)
    ).fetchone()
    fields: dict[str, object] = {**(json.loads(row[0]) if row else {}), **changes}
    kept = {key: value for key, value in fields.items() if value is not None}
    if kept:
        connection.execute(
            "INSERT OR REPLACE INTO profile VALUES (?, ?, ?)", (name, version, json.dumps(kept))
        )
    else:
        clear_profile(connection, name, version)


def clear_profile(connection: sqlite3.Connection, name: str, version: int) -> None:
    connection.execute("DELETE FROM profile WHERE name = ? AND version = ?", (name, version))


def split(connection: sqlite3.Connection, alias: str, name: str, traffic: Traffic) -> None:
    """Raises AdapterNotFound unless the alias is there, is of that adapter, and all the versions are."""
    row = connection.execute("SELECT 1 FROM alias WHERE alias = ? AND name = ?", (alias, name)).fetchone()
    if row is None:
        raise AdapterNotFound(alias)
    shadow = traffic.shadow or Shadow(0, 0.0)
    for number in (*traffic.weights, *((shadow.version,) if shadow.version else ())):
        _require(connection, name, number)
    weights = json.dumps({str(number): weight for number, weight in traffic.weights.items()})
    connection.execute(
        "INSERT OR REPLACE INTO traffic VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            alias,
            weights,
            traffic.sticky,
            traffic.salt,
            shadow.version,
            shadow.share,
            shadow.tokens_per_minute,
        ),
    )


def end_split(connection: sqlite3.Connection, alias: str) -> None:
    connection.execute("DELETE FROM traffic WHERE alias = ?", (alias,))


def to_traffic(columns: tuple[object, ...]) -> Traffic | None:
    """The last columns of ``SELECT_ALIAS``."""
    weights, sticky, salt, shadow, share, budget = columns
    if weights is None:
        return None
    found = {int(number): float(weight) for number, weight in json.loads(str(weights)).items()}
    tokens = int(str(budget)) if budget is not None else None
    copied = Shadow(int(str(shadow)), float(str(share)), tokens) if shadow else None
    return Traffic(found, str(sticky), str(salt), copied)


def to_profiles(text: str) -> Mapping[int, Fields]:
    """By version; 0 is the name's own."""
    return {} if text == "{}" else {int(number): fields for number, fields in json.loads(text).items()}


def _require(connection: sqlite3.Connection, name: str, version: int) -> None:
    if version == _ALL_VERSIONS:
        row = connection.execute("SELECT 1 FROM name WHERE name = ?", (name,)).fetchone()
    else:
        query = "SELECT 1 FROM version WHERE name = ? AND version = ? AND NOT is_removed"
        row = connection.execute(query, (name, version)).fetchone()
    if row is None:
        raise AdapterNotFound(f"{name}@{version}" if version else name)
