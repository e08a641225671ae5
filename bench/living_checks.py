"""Checks: a figure beside what it must be, and whether it is; as lines for people and as values for a result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

Cell = dict[str, object]
"""One figure with all its values, as a result keeps it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of a figure."""

    what: str
    value: float
    limit: float
    is_at_least: bool = False
    """The limit is a floor; otherwise a ceiling."""

    @property
    def is_met(self) -> bool:
        return self.value >= self.limit if self.is_at_least else self.value <= self.limit

    def line(self, figure: str) -> str:
        bound = f"at {'least' if self.is_at_least else 'most'} {self.limit:g}"
        return (
            f"{figure:9} {self.what:62} {self.value:10.4g}   {bound:14} {'met' if self.is_met else 'NOT MET'}"
        )

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"is_met": self.is_met}


def with_checks(cell: Cell, checks: Iterable[Check]) -> Cell:
    """A result's cell that carries its checks."""
    return {**cell, "checks": [check.as_json() for check in checks]}


def checks_of(cell: Mapping[str, object]) -> list[Check]:
    """What ``with_checks`` put in. Raises ValueError for a cell without any: then nothing was promised of it."""
    found = cell.get("checks")
    if not isinstance(found, list) or not found:
        raise ValueError(f"the cell {cell.get('figure')} has no checks")
    return [Check(each["what"], each["value"], each["limit"], each["is_at_least"]) for each in found]
