"""Fault: one thing wrong with one row of a data file, with what to do about it.

Owns: the closed list of faults, and how a value is shortened for show. Does not know files, formats or models.
Place in a training run: the first phase; everything that reads data speaks of what it refuses in these values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Final

SHOWN_CHARS: Final = 80
_SHOWN_ITEMS: Final = 4
_SHOWN_DEPTH: Final = 3


class FaultKind(StrEnum):
    """The closed list of what can be wrong with a row."""

    BAD_FILE = "bad_file"
    BAD_JSON = "bad_json"
    UNKNOWN_FORMAT = "unknown_format"
    MIXED_FORMAT = "mixed_format"
    MISSING_FIELD = "missing_field"
    BAD_VALUE = "bad_value"
    ROLE_ORDER = "role_order"
    EMPTY_TARGET = "empty_target"
    NO_LABEL = "no_label"
    IMAGE_COUNT = "image_count"
    IMAGE_MISSING = "image_missing"
    IMAGE_OUTSIDE_ROOT = "image_outside_root"
    IMAGE_REMOTE = "image_remote"
    IMAGE_UNDECODABLE = "image_undecodable"
    IMAGE_TOO_EXTREME = "image_too_extreme"
    IMAGE_BOMB = "image_bomb"
    TOO_LONG = "too_long"
    RESERVED_TOKEN = "reserved_token"
    BOX_OUT_OF_RANGE = "box_out_of_range"
    DUPLICATE = "duplicate"
    LEAK = "leak"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row begins."""

    file: str
    line: int
    """From 1; for a table without lines (parquet) the number of the row."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Complaint:
    """What is wrong, before it is known where."""

    kind: FaultKind
    field: str
    """As a path into the row, such as ``messages[2].content``; empty for the row as a whole."""
    value: str
    """What was found, shortened by ``shown``."""
    expected: str
    fix: str

    def at(self, origin: Origin) -> Fault:
        return Fault(origin, self)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with one row."""

    origin: Origin
    complaint: Complaint

    @property
    def kind(self) -> FaultKind:
        return self.complaint.kind

    def __str__(self) -> str:
        said = self.complaint
        place = f" {said.field}" if said.field else ""
        found = f" is {said.value}" if said.value else ""
        return f"{self.origin} {said.kind}:{place}{found}; expected {said.expected}; fix: {said.fix}"

    def as_json(self) -> dict[str, object]:
        """Flat, for a report's file."""
        said = self.complaint
        return {
            "file": self.origin.file,
            "line": self.origin.line,
            "fault": str(said.kind),
            "field": said.field,
            "value": said.value,
            "expected": said.expected,
            "fix": said.fix,
        }


class RowRejected(Exception):
    """A row that cannot be used; carries one complaint. Raised and caught within this room."""

    def __init__(self, kind: FaultKind, field: str, value: object, expected: str, fix: str) -> None:
        self.complaint = Complaint(kind, field, shown(value), expected, fix)
        super().__init__(expected)


class Found(str):
    """Words of ours about a value, to be shown as they are instead of as a quoted string."""

    __slots__ = ()


def shown(value: object) -> str:
    """``value`` as JSON in at most ``SHOWN_CHARS`` characters; long things are cut before they are written out."""
    if isinstance(value, Found):
        return str(value)
    text = json.dumps(
        _clipped(value, _SHOWN_DEPTH), ensure_ascii=False, default=lambda item: type(item).__name__
    )
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def _clipped(value: object, depth: int) -> object:
    if isinstance(value, str):
        return value[: SHOWN_CHARS + 1]
    if isinstance(value, Mapping):
        items = islice(value.items(), _SHOWN_ITEMS) if depth else ()
        return {str(key)[:SHOWN_CHARS]: _clipped(item, depth - 1) for key, item in items}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_clipped(item, depth - 1) for item in islice(value, _SHOWN_ITEMS)] if depth else []
    return value
