"""Rows of a data file with the line that each begins on: .json, .jsonl, .csv, and .parquet where pyarrow is installed.

Owns: file syntax. A row that cannot be read is a Fault in its place, and the rows after it are still read wherever the
syntax allows. Does not know what a row means. Place in a training run: the first thing done with a data file.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Never

from training.data.faults import Complaint, Fault, FaultKind, Found, Origin, shown

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_JSON_COLUMNS: Final = frozenset({"images", "history", "conversations", "messages", "loss", "tools"})
"""Columns of a CSV file whose cells may hold JSON."""


@dataclass(frozen=True, slots=True)
class Row:
    fields: Mapping[str, object]
    origin: Origin


def read_rows(
    path: Path, columns: Mapping[str, str] | None = None, on_rename: Callable[[str], None] | None = None
) -> Iterator[Row | Fault]:
    """Every row of ``path``; ``columns`` renames fields (name in the file -> name of the format).

    ``on_rename`` is told each name that a row has and that was changed.
    """
    renames = dict(columns or {})
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        yield _bad_file(
            path, 1, path.suffix, f"one of {', '.join(_READERS)}", "convert the file, or rename it"
        )
        return
    finish = _with_json_cells if reader is _read_csv else _as_it_is
    try:
        for item in reader(path):
            renamed = item if isinstance(item, Fault) else _renamed(item, renames, on_rename)
            yield renamed if isinstance(renamed, Fault) else finish(renamed)
    except OSError as error:
        yield _bad_file(path, 1, path.name, "a file that can be read", f"check it: {error.strerror}")


def _renamed(row: Row, renames: Mapping[str, str], on_rename: Callable[[str], None] | None) -> Row | Fault:
    if not renames:
        return row
    fields: dict[str, object] = {}
    for name, value in row.fields.items():
        target = renames.get(name, name)
        if target in fields:
            return Complaint(
                FaultKind.BAD_VALUE,
                target,
                shown(value),
                "one column of each name",
                "rename the other one too",
            ).at(row.origin)
        fields[target] = value
        if name in renames and on_rename is not None:
            on_rename(name)
    return Row(fields, row.origin)


def _bad_file(path: Path, line: int, value: object, expected: str, fix: str) -> Fault:
    return Complaint(FaultKind.BAD_FILE, "", shown(value), expected, fix).at(Origin(path.name, line))


# ---- JSON ------------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} twice")
    return result


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name}, which is not JSON")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _bad_json(origin: Origin, text: str, error: ValueError | RecursionError) -> Fault:
    if isinstance(error, json.JSONDecodeError):
        why = f"{error.msg} at column {error.colno}"
        text = text[max(0, error.pos - 30) : error.pos + 30]
    else:
        why = "too deep a nesting" if isinstance(error, RecursionError) else f"it has {error}"
    return Complaint(
        FaultKind.BAD_JSON, "", shown(text.strip()), f"one JSON object ({why})", "correct the row's JSON"
    ).at(origin)


def _row_of(path: Path, line: int, value: object) -> Row | Fault:
    origin = Origin(path.name, line)
    if isinstance(value, dict):
        return Row(value, origin)
    return Complaint(
        FaultKind.BAD_JSON, "", shown(value), "one JSON object", "make the row an object with named fields"
    ).at(origin)


def _read_jsonl(path: Path) -> Iterator[Row | Fault]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
            try:
                text.encode("utf-8")
                yield _row_of(path, number, _DECODER.decode(text))
            except UnicodeEncodeError:
                yield _bad_file(
                    path, number, Found("bytes that are no UTF-8"), "UTF-8 text", "save the file as UTF-8"
                )
                if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    return  # UTF-16: no line of it can be read
            except (ValueError, RecursionError) as error:
                yield _bad_json(Origin(path.name, number), text, error)


def _read_json(path: Path) -> Iterator[Row | Fault]:
    """An array of objects. What follows a syntax error cannot be told apart, so reading ends there."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        yield _bad_file(path, line, Found("bytes that are no UTF-8"), "UTF-8 text", "save the file as UTF-8")
        return
    place, line, counted = _skip(text, 0), 1, 0
    if text[place : place + 1] != "[":
        yield _row_error(
            path, text, place, "an array of rows, [ first", "for one object a line, name the file .jsonl"
        )
        return
    place = _skip(text, place + 1)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            at = text.count("\n", 0, error.pos) + 1 if isinstance(error, json.JSONDecodeError) else line
            yield _bad_json(Origin(path.name, at), text, error)
            return
        yield _row_of(path, line, value)
        place = _skip(text, place)
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            yield _row_error(path, text, place, "a comma or ] after a row", "correct the array")
            return


def _row_error(path: Path, text: str, place: int, expected: str, fix: str) -> Fault:
    line = text.count("\n", 0, place) + 1
    return Complaint(FaultKind.BAD_JSON, "", shown(text[place : place + 40]), expected, fix).at(
        Origin(path.name, line)
    )


def _skip(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


# ---- tables ----------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Iterator[Row | Fault]:
    """A header, then rows; a cell of a column such as ``images`` may hold JSON."""
    with path.open("rb") as file:
        lines = (raw.decode("utf-8-sig" if number == 1 else "utf-8") for number, raw in enumerate(file, 1))
        reader, line = csv.reader(lines, strict=True), 1
        try:
            header = next(reader, [])
            while True:
                line = reader.line_num + 1
                cells = next(reader, None)
                if cells is None:
                    return
                if cells:
                    yield _table_row(path, line, header, cells)
        except (csv.Error, UnicodeDecodeError) as error:
            yield _bad_file(path, line, Found(str(error)[:80]), "CSV in UTF-8", "correct it, or use JSONL")


def _table_row(path: Path, line: int, header: list[str], cells: list[str]) -> Row | Fault:
    if len(cells) != len(header):
        return _bad_file(
            path,
            line,
            Found(f"{len(cells)} cells"),
            f"{len(header)}, as the header has",
            "quote cells that hold commas",
        )
    return Row(dict(zip(header, cells, strict=True)), Origin(path.name, line))


def _as_it_is(row: Row) -> Row | Fault:
    return row


def _with_json_cells(row: Row) -> Row | Fault:
    """A CSV row whose JSON cells are values; an empty cell is none at all, but for those that may be empty text."""
    fields: dict[str, object] = {}
    for name, cell in row.fields.items():
        text = str(cell)
        if name in _JSON_COLUMNS and not text.strip():
            fields[name] = None
            continue
        try:
            is_json = name in _JSON_COLUMNS and (name == "loss" or text.lstrip()[:1] in ("[", "{"))
            fields[name] = _DECODER.decode(text) if is_json else text
        except (ValueError, RecursionError) as error:
            return _bad_json(row.origin, text, error)
    return Row(fields, row.origin)


def _read_parquet(path: Path) -> Iterator[Row | Fault]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        yield _bad_file(
            path, 1, path.name, "pyarrow, which reads parquet", "pip install pyarrow, or convert it to JSONL"
        )
        return
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, Origin(path.name, number))
    except ValueError as error:  # pyarrow's own errors are ValueErrors
        yield _bad_file(path, number + 1, Found(str(error)[:80]), "a whole parquet file", "write it again")


_READERS: Final[Mapping[str, Callable[[Path], Iterator[Row | Fault]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
