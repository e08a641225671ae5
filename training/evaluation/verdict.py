"""Verdict: everything that judging found about one adapter, as a table, Markdown, JSON and files.

Owns: that value and how it is written. Does not know: how it was found. Place in a training run: the outcome of
``judge.evaluate``; the package and the run folder keep it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training.data.faults import Origin
from training.durable import write_whole
from training.evaluation.catalogue import MEASURES, Measure, json_number
from training.evaluation.gate import GateResult
from training.evaluation.general import GeneralAbility
from training.evaluation.vision import VisionDependence


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One held-out row, answered by both."""

    origin: Origin
    question: str
    pictures: tuple[str, ...]
    """As the data names them."""
    gold: str
    base: str
    adapter: str
    base_scores: Mapping[str, float]
    adapter_scores: Mapping[str, float]

    def as_json(self) -> dict[str, object]:
        return {
            "file": self.origin.file, "line": self.origin.line, "question": self.question,
            "pictures": list(self.pictures), "gold": self.gold, "base": self.base, "adapter": self.adapter,
            "base_scores": dict(self.base_scores), "adapter_scores": dict(self.adapter_scores),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an adapter is worth beside the base on the same rows."""

    adapter: Mapping[str, float]
    base: Mapping[str, float]
    """By names of ``catalogue.MEASURES``; units there."""
    gate: GateResult
    num_rows: int
    """Held out: what the loss is of."""
    answers: tuple[JudgedAnswer, ...]
    """Of as many rows as answers were generated for."""
    vision: Mapping[str, VisionDependence]
    """``adapter`` and ``base``; empty for data without pictures."""
    general: GeneralAbility | None
    seconds: float

    @property
    def passed(self) -> bool:
        return self.gate.passed

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{'':40} {'adapter':>9} {'base':>9} {'difference':>10}  unit"]
        lines += [
            f"{found.title:40} {cells[0]:>9} {cells[1]:>9} {cells[2]:>10}  {found.unit}"
            for found, cells in self._table()
        ]
        lines.append(self._counted())
        lines += self._gate_lines("")
        return "\n".join(lines)

    def markdown(self) -> str:
        lines = ["| | adapter | base | difference | unit |", "|---|---:|---:|---:|---|"]
        lines += [f"| {found.title} | {' | '.join(cells)} | {found.unit} |" for found, cells in self._table()]
        lines += ["", self._counted(), "", *self._gate_lines("- ")]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, object]:
        """All but the single answers, which have a file of their own."""
        return {
            "passed": self.passed,
            "scores": {"adapter": _numbers(self.adapter), "base": _numbers(self.base)},
            "gate": self.gate.as_json(),
            "rows": self.num_rows,
            "answered": len(self.answers),
            "vision": {who: found.as_json() for who, found in self.vision.items()},
            "general": self.general.as_json() if self.general else [],
            "seconds": round(self.seconds, 3),
        }

    def write(self, folder: Path) -> None:
        """``scores.json``, ``scores.md`` and ``answers.jsonl``, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "scores.json", json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n")
        write_whole(folder / "scores.md", self.markdown())
        lines = (json.dumps(answer.as_json(), ensure_ascii=False) + "\n" for answer in self.answers)
        write_whole(folder / "answers.jsonl", "".join(lines))

    def _table(self) -> list[tuple[Measure, tuple[str, str, str]]]:
        names = [name for name in MEASURES if name in self.adapter]
        return [(MEASURES[name], self._cells(MEASURES[name])) for name in names]

    def _cells(self, found: Measure) -> tuple[str, str, str]:
        value, base = self.adapter[found.name], self.base.get(found.name)
        difference = "-" if base is None else f"{value - base:+.{found.digits}f}"
        return found.shown(value), found.shown(base), difference

    def _counted(self) -> str:
        pictured = self.vision["adapter"].num_rows if self.vision else 0
        return (
            f"{len(self.answers)} of {self.num_rows} held-out rows answered by both"
            + (f", {pictured} of them with blank and with swapped pictures" if pictured else "")
            + f"; {self.seconds:.0f} s"
        )

    def _gate_lines(self, mark: str) -> list[str]:
        if not self.gate.outcomes:
            return [f"{mark}gate: no rules"]
        outcome = "passed" if self.passed else "NOT passed"
        return [
            f"{mark}gate: {outcome}",
            *(f"{mark}  {line}" if not mark else mark + line for line in self.gate.lines),
        ]


def _numbers(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: json_number(value) for name, value in scores.items()}
