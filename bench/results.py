"""Results: what is kept of a run, one JSON file each under bench/results, with where it comes from.

A file holds ``kind``, ``provenance`` and ``cells``; a cell one workload on one endpoint. The report reads them back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.provenance import Provenance

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 1

Cell = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Result:
    """One run of the bench."""

    kind: str
    provenance: Mapping[str, object]
    cells: Sequence[Cell]
    path: Path | None = None

    @property
    def device(self) -> str:
        """What the figures were taken on, as one line; equal lines compare."""
        found = self.provenance.get("device")
        fields = found if isinstance(found, dict) else {}
        features = ", ".join(map(str, fields.get("features", ())))
        return f"{fields.get('name')} ({features or fields.get('kind')}), {fields.get('num_cpus')} CPUs"

    def as_json(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "provenance": dict(self.provenance),
            "cells": [dict(cell) for cell in self.cells],
        }


def make_result(kind: str, origin: Provenance, cells: Sequence[Cell]) -> Result:
    return Result(kind, origin.as_json(), cells)


def save(result: Result, folder: Path = RESULTS, path: Path | None = None) -> Path:
    """Write a result under a name of its own (kind, time, commit), or again where it was: whole, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    commit = str(result.provenance.get("commit", ""))[:8] or "nowhere"
    path = path or folder / f"{result.kind}-{stamp}-{commit}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)  # a run that is ended while it writes leaves what it had
    return path


def load(path: Path) -> Result:
    """Raises ValueError for a file that is no result."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a result: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no result of this bench (format {FORMAT})")
    return Result(content["kind"], content["provenance"], content["cells"], path)


def label_of(cell: Cell) -> str:
    """What was measured: the server's or peer's name; empty if it has none."""
    endpoint = cell.get("endpoint")
    return str(endpoint.get("label")) if isinstance(endpoint, dict) else ""


def claims_of(cells: Sequence[Cell]) -> list[Mapping[str, object]]:
    """Every claim of a run of proofs, in order."""
    found: list[Mapping[str, object]] = []
    for cell in cells:
        claims = cell.get("claims")
        found += claims if isinstance(claims, list) else []
    return found


def last_line(result: Result) -> str:
    """The one JSON line that a run ends in: medians alone."""
    cells = [
        {key: value for key, value in cell.items() if key not in ("runs", "by_adapter")}
        for cell in result.cells
    ]
    return json.dumps(result.as_json() | {"cells": cells})
