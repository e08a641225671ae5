"""DataReport: what a data set holds and everything wrong with it, as text for a terminal and JSON for the run's record.

Owns: those values and how they are written. Does not know: how they were found. Place in a training run: the outcome of
its first phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training.data.faults import Fault, FaultKind
from training.data.histogram import Histogram


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What was found in one split (train or eval)."""

    formats: Mapping[str, str]
    """File -> its format."""
    num_rows: int
    """Read, bad ones included."""
    num_kept: int
    num_examples: int
    num_labels: int
    tokens: Histogram
    """Of rows, too long ones included: tokens with pictures."""
    image_tokens: Histogram
    """Of rows with pictures."""
    unused_columns: Mapping[str, int]
    """Columns that nothing is learnt from -> rows that have them."""
    digest: str
    """Hex SHA-256 over the kept rows in order: independent of format, file names and unused columns."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """The report: what there is, and everything wrong with it."""

    train: SplitReport
    eval: SplitReport | None
    faults: tuple[Fault, ...]

    @property
    def num_bad_rows(self) -> int:
        return len({fault.origin for fault in self.faults})

    def counts(self) -> dict[FaultKind, int]:
        """Faults of each kind, in the order of FaultKind."""
        found = [fault.kind for fault in self.faults]
        return {kind: found.count(kind) for kind in FaultKind if kind in set(found)}

    def as_json(self) -> dict[str, object]:
        return {
            "train": _split_json(self.train),
            "eval": _split_json(self.eval) if self.eval else None,
            "bad_rows": self.num_bad_rows,
            "faults": [fault.as_json() for fault in self.faults],
        }

    def text(self, most: int = 50) -> str:
        """For a terminal: at most so many faults, then how many more there are."""
        lines = [_split_line("train", self.train)]
        lines += [_split_line("eval", self.eval)] if self.eval else []
        if self.faults:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts().items())
            lines.append(f"{self.num_bad_rows} bad rows: {kinds}")
        lines += [f"  {fault}" for fault in self.faults[:most]]
        if len(self.faults) > most:
            lines.append(f"  and {len(self.faults) - most} more; the report's JSON has all of them")
        return "\n".join(lines)


def _split_json(split: SplitReport) -> dict[str, object]:
    return {
        "formats": dict(split.formats),
        "rows": split.num_rows,
        "kept": split.num_kept,
        "examples": split.num_examples,
        "labels": split.num_labels,
        "tokens": split.tokens.as_json(),
        "image_tokens": split.image_tokens.as_json(),
        "unused_columns": dict(split.unused_columns),
        "digest": split.digest,
    }


def _split_line(name: str, split: SplitReport) -> str:
    unused = f"; unused columns: {', '.join(split.unused_columns)}" if split.unused_columns else ""
    images = f"; image tokens {split.image_tokens}" if split.image_tokens.count else ""
    return f"{name}: {split.num_kept} of {split.num_rows} rows; tokens {split.tokens}{images}{unused}"
