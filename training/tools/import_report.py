"""ImportReport: what was made of a foreign adapter, as values, text and JSON.

Owns the wording. Place in a training run: none; ``import`` ends with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.sites import PARTS
from adapters.validation import PackageReport
from training.tools.logit_check import LogitDifference
from training.tools.plain import part_of


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What was made of a foreign adapter."""

    folder: Path
    source: str
    source_sha256: str
    base: str
    package: PackageReport
    deltas: Mapping[str, float]
    """|alpha / r * B A| of each module that acts."""
    num_silent: int
    """Modules that add nothing."""
    logits: LogitDifference | None
    """None when the base is not at hand, or was not to be asked."""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {
            "folder": str(self.folder),
            "source": self.source,
            "source_sha256": self.source_sha256,
            "base": self.base,
            "digest": self.package.digest,
            "kind": self.package.kind,
            "rank": self.package.rank,
            "num_sites": self.package.num_sites,
            "num_silent": self.num_silent,
            "deltas": dict(self.deltas),
            "logits_effect": None if self.logits is None else self.logits.effect,
            "notes": list(self.notes),
        }

    @property
    def text(self) -> str:
        found = self.package
        counts = [
            f"{part} {sum(part_of(name) == part for name in self.deltas)}"
            for part in PARTS
            if part in found.parts
        ]
        silent = f", {self.num_silent} without effect" if self.num_silent else ""
        lines = [
            f"imported {self.source} into {self.folder}: {found.kind}, rank {found.rank}, {len(self.deltas)} linears "
            f"({', '.join(counts)}{silent}), digest {found.digest[:12]}",
            "effect: "
            + (
                "not tried on the base; its B @ A is not zero"
                if self.logits is None
                else f"it changes the base's logits by {self.logits.effect:.3g} rms (their spread is "
                f"{self.logits.spread:.3g})"
            ),
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
