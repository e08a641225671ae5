"""The ledger's tables, and how a row becomes a record and back.

Owns the schema: a change here needs a new ``SCHEMA_VERSION`` and a step that brings older files to it.
"""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from typing import Any, cast

from adapters.catalogue import AliasRecord, NameRecord, VersionRecord
from adapters.ledger_conduct import PROFILES_COLUMN, TABLES, to_profiles, to_traffic
from adapters.ref import AdapterRef
from adapters.sites import Part
from adapters.validation import PackageReport

SCHEMA_VERSION = 3

SCHEMA = (
    TABLES
    + """;
CREATE TABLE IF NOT EXISTS version (
    name TEXT NOT NULL, version INTEGER NOT NULL,
    digest TEXT NOT NULL, vision_digest TEXT NOT NULL, language_digest TEXT NOT NULL,
    kind TEXT NOT NULL, num_bytes INTEGER NOT NULL, rank INTEGER NOT NULL,
    targets TEXT NOT NULL, parts TEXT NOT NULL, num_sites INTEGER NOT NULL,
    source TEXT NOT NULL, created_s REAL NOT NULL, is_removed INTEGER NOT NULL,
    defaults TEXT NOT NULL DEFAULT '{}',
    PRIMARY KEY (name, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS name (
    name TEXT PRIMARY KEY, current INTEGER NOT NULL, is_pinned INTEGER NOT NULL, is_enabled INTEGER NOT NULL,
    history TEXT NOT NULL DEFAULT '[]'
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS alias (
    alias TEXT PRIMARY KEY, name TEXT NOT NULL, version INTEGER NOT NULL, history TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS change (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS version_digest ON version (digest) WHERE NOT is_removed;
"""
)

FROM_1 = """
ALTER TABLE name ADD COLUMN history TEXT NOT NULL DEFAULT '[]';
UPDATE name SET history = (
    SELECT json_group_array(v.version) FROM version v
    WHERE v.name = name.name AND NOT v.is_removed AND v.version <> name.current
);
"""
"""Schema 1 had no history of what a name meant; each of its versions had been current once, in order."""

FROM_2 = "ALTER TABLE version ADD COLUMN defaults TEXT NOT NULL DEFAULT '{}'"
"""Schema 2 had no profiles and no splits."""

SELECT = f"""
SELECT n.current, n.is_pinned, n.is_enabled, n.history, {PROFILES_COLUMN},
       v.name, v.version, v.digest, v.vision_digest, v.language_digest,
       v.kind, v.num_bytes, v.rank, v.targets, v.parts, v.num_sites, v.source, v.created_s, v.defaults
FROM name n JOIN version v ON v.name = n.name AND NOT v.is_removed
"""
"""One row a version that is not removed; ``to_record`` takes those of one name."""
NUM_NAME_COLUMNS = 6
"""The first columns of a row are the name's own; the last of them, the name itself, is also the version's first."""


def ref_of(name: str, number: int, report: PackageReport) -> AdapterRef:
    return AdapterRef(name, number, report.digest, report.vision_digest, report.language_digest)


def to_row(record: VersionRecord) -> tuple[str | int | float, ...]:
    """The columns of ``version``, in order."""
    report = record.report
    return (
        record.ref.name,
        record.ref.version,
        report.digest,
        report.vision_digest,
        report.language_digest,
        report.kind,
        report.num_bytes,
        report.rank,
        json.dumps(report.targets),
        json.dumps(report.parts),
        report.num_sites,
        record.source,
        record.created_s,
        False,
        report.defaults,
    )


def to_record(rows: list[tuple[Any, ...]]) -> NameRecord:
    current, is_pinned, is_enabled, history, profiles, name = rows[0][:NUM_NAME_COLUMNS]
    versions = tuple(_version_record(row[NUM_NAME_COLUMNS - 1 :]) for row in rows)
    return NameRecord(
        name, current, bool(is_pinned), bool(is_enabled), versions, _numbers(history), to_profiles(profiles)
    )


def to_alias(row: tuple[Any, ...]) -> AliasRecord:
    alias, name, version, history, *traffic = row
    return AliasRecord(alias, name, version, _targets(history), to_traffic(tuple(traffic)))


def _numbers(text: str) -> tuple[int, ...]:
    return () if text == "[]" else tuple(json.loads(text))


def _targets(text: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, version) for name, version in json.loads(text))


def _version_record(row: tuple[Any, ...]) -> VersionRecord:
    (
        name,
        number,
        digest,
        vision,
        language,
        kind,
        num_bytes,
        rank,
        targets,
        parts,
        num_sites,
        source,
        created_s,
        defaults,
    ) = row
    report = PackageReport(
        kind=kind,
        digest=digest,
        vision_digest=vision,
        language_digest=language,
        num_bytes=num_bytes,
        rank=rank,
        targets=_texts(targets),
        parts=cast(tuple[Part, ...], _texts(parts)),
        num_sites=num_sites,
        defaults=sys.intern(defaults),
    )
    return VersionRecord(ref_of(name, number, report), report, source, created_s)


@lru_cache(maxsize=4096)
def _texts(text: str) -> tuple[str, ...]:
    """Shared between records: ten thousand adapters have a handful of target lists."""
    return tuple(json.loads(text))
