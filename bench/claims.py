"""Claims: what the engine must show, each a target, the measured ratios of pairs, and whether it is met. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Sense = Literal["at least", "at most"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One promise and its measurement. A target of None is a figure shown beside the claims, which promises nothing."""

    item: int
    name: str
    values: tuple[float, ...]
    """One of each pair, in the order of time."""
    target: float | None = None
    sense: Sense = "at least"

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"nothing was measured for {self.name!r}")

    @property
    def measured(self) -> float:
        """The median over the pairs."""
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        """None where nothing is promised."""
        if self.target is None:
            return None
        return self.measured >= self.target if self.sense == "at least" else self.measured <= self.target

    def as_json(self) -> dict[str, object]:
        return {
            "item": self.item,
            "name": self.name,
            "sense": self.sense,
            "target": self.target,
            "measured": self.measured,
            "lowest": min(self.values),
            "highest": max(self.values),
            "num_pairs": len(self.values),
            "values": list(self.values),
            "is_met": self.is_met,
        }


def quotients(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """Pair by pair. Raises ValueError unless there are as many of one as of the other."""
    return tuple(mine / other for mine, other in zip(ours, theirs, strict=True))


@dataclass(frozen=True, slots=True)
class Proof:
    """What one item of the list gave: its claims, and the cells that they were taken from."""

    claims: tuple[Claim, ...]
    cells: tuple[Mapping[str, object], ...] = ()

    def as_cells(self, item: int, about: str) -> list[dict[str, object]]:
        """Claims first, then the cells, for a result's file."""
        head: dict[str, object] = {
            "workload": f"prove-{item}",
            "about": about,
            "endpoint": {"label": "lorikeet"},
            "claims": [claim.as_json() for claim in self.claims],
        }
        return [head, *(dict(cell) for cell in self.cells)]


def not_measured(item: int, about: str, why: str) -> dict[str, object]:
    """The cell of an item that gave no figures."""
    return {
        "workload": f"prove-{item}",
        "about": about,
        "endpoint": {"label": "lorikeet"},
        "claims": [],
        "failure": why,
    }
