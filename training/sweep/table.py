"""SweepTable: a sweep's experiments side by side, the best marked, as text, Markdown and JSON.

``experiment | r | alpha | (other keys of the grid) | BLEU | tokens/s | peak memory | verdict``; where the best is
chosen by another number than BLEU, that number's column stands behind BLEU's.

The best is the one with the best number among those that passed the gate (among all that finished, if none passed);
equal numbers are told apart by the lower held-out loss, then by order.

Owns: those values, the choice, the writing. Does not know: how an experiment is run, the plot.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from training.durable import write_whole
from training.evaluation.catalogue import json_number, measure
from training.sweep.grid import Experiment

BLEU: Final = "bleu"
_REASON_LENGTH: Final = 60


@dataclass(frozen=True, slots=True)
class ExperimentResult:
    """What one experiment came to."""

    scores: Mapping[str, float]
    """Of the adapter, by names of the catalogue."""
    base: Mapping[str, float]
    passed: bool
    """The gate."""
    tokens_per_s: float
    peak_bytes: int
    seconds: float

    def as_json(self) -> dict[str, object]:
        return {
            "scores": _numbers(self.scores), "base": _numbers(self.base), "passed": self.passed,
            "tokens_per_s": self.tokens_per_s, "peak_bytes": self.peak_bytes, "seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One experiment: its result, or why there is none."""

    experiment: Experiment
    r: int
    alpha: float
    outcome: ExperimentResult | str

    @property
    def result(self) -> ExperimentResult | None:
        return self.outcome if isinstance(self.outcome, ExperimentResult) else None

    def score(self, name: str) -> float | None:
        return self.result.scores.get(name) if self.result else None

    def verdict(self) -> str:
        if isinstance(self.outcome, str):
            reason = " ".join(self.outcome.split())
            return (
                f"failed: {reason if len(reason) <= _REASON_LENGTH else reason[: _REASON_LENGTH - 1] + '…'}"
            )
        return "passes" if self.outcome.passed else "below the gate"

    def as_json(self) -> dict[str, object]:
        return {
            "experiment": self.experiment.name, "changes": dict(self.experiment.changes),
            "r": self.r, "alpha": self.alpha, "verdict": self.verdict(),
            "result": self.result.as_json() if self.result else None,
            "error": self.outcome if isinstance(self.outcome, str) else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SweepTable:
    """All rows so far."""

    rows: tuple[SweepRow, ...]
    best_by: str = BLEU

    @property
    def best(self) -> SweepRow | None:
        """None while no experiment has the number."""
        finished = [row for row in self.rows if _is_number(row.score(self.best_by))]
        candidates = [row for row in finished if row.result and row.result.passed] or finished
        return min(candidates, key=self._rank, default=None)

    @property
    def other_keys(self) -> tuple[str, ...]:
        """The grid's, without r and alpha."""
        keys = dict.fromkeys(key for row in self.rows for key in row.experiment.changes)
        return tuple(key for key in keys if key not in ("r", "alpha"))

    def text(self) -> str:
        """For a terminal; the best has a star."""
        best = self.best
        marked = [
            ["", *self._head()],
            *(["*" if row is best else "", *self._cells(row)] for row in self.rows),
        ]
        widths = [max(len(cells[column]) for cells in marked) for column in range(len(marked[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
            for cells in marked
        ]
        return "\n".join([*lines, self._legend()])

    def markdown(self) -> str:
        head, best = self._head(), self.best
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in self.rows:
            cells = [cell.replace("|", "\\|") for cell in self._cells(row)]
            if row is best:
                cells = [f"**{cells[0]}**", *cells[1:-1], f"**best**, {cells[-1]}"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", self._legend()]) + "\n"

    def as_json(self) -> dict[str, object]:
        best = self.best
        return {
            "best": best.experiment.name if best else None,
            "best_by": self.best_by,
            "rows": [row.as_json() for row in self.rows],
        }

    def write(self, folder: Path) -> None:
        """``sweep.txt``, ``sweep.md``, ``sweep.json``."""
        write_whole(folder / "sweep.txt", self.text() + "\n")
        write_whole(folder / "sweep.md", self.markdown())
        write_whole(folder / "sweep.json", json.dumps(self.as_json(), indent=1, default=str) + "\n")

    def _rank(self, row: SweepRow) -> tuple[float, float]:
        score, loss = row.score(self.best_by), row.score("loss")
        if score is None:
            return math.inf, math.inf
        sign = -1 if measure(self.best_by).is_better_higher else 1
        return sign * score, loss if loss is not None and _is_number(loss) else math.inf

    def _head(self) -> list[str]:
        further = [] if self.best_by == BLEU else [measure(self.best_by).title]
        return [
            "experiment", "r", "alpha", *self.other_keys, measure(BLEU).title, *further,
            "tokens/s", "peak memory", "verdict",
        ]  # fmt: skip

    def _cells(self, row: SweepRow) -> list[str]:
        others = [_shown(row.experiment.changes[key]) if key in row.experiment.changes else "-"
                  for key in self.other_keys]  # fmt: skip
        numbers = [BLEU] if self.best_by == BLEU else [BLEU, self.best_by]
        result = row.result
        return [
            row.experiment.name, str(row.r), f"{row.alpha:g}", *others,
            *(measure(name).shown(row.score(name)) for name in numbers),
            f"{result.tokens_per_s:,.0f}" if result else "-",
            shown_bytes(result.peak_bytes) if result else "-",
            row.verdict(),
        ]  # fmt: skip

    def _legend(self) -> str:
        title, best = measure(self.best_by).title, self.best
        if best is None:
            return f"no experiment has {title}"
        way = "highest" if measure(self.best_by).is_better_higher else "lowest"
        has_passed = best.result is not None and best.result.passed
        among = "of those that pass the gate" if has_passed else "though none passes the gate"
        return f"best: {best.experiment.name}, by {way} {title} {among}; ties by held-out loss"


def shown_bytes(num_bytes: int) -> str:
    """In MiB, from 10 GiB on in GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 10 * 2**30 else f"{num_bytes / 2**20:,.0f} MiB"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return (
        "+".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


def _is_number(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _numbers(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: json_number(value) for name, value in scores.items()}
