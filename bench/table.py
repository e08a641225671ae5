"""A table of a report: rows of text under a title, as Markdown or side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a title."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = ["| " + " | ".join(row) + " |" for row in (self.head, ("---",) * len(self.head), *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines])

    def text(self) -> str:
        """Columns side by side, numbers to the right."""
        widths = [max(len(row[place]) for row in (self.head, *self.rows)) for place in range(len(self.head))]
        lines = [_line(row, widths) for row in (self.head, *self.rows)]
        return "\n".join([self.title, *(line.rstrip() for line in lines)])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(_pad(*each, place) for place, each in enumerate(zip(row, widths, strict=True)))


def _pad(cell: str, width: int, place: int) -> str:
    return cell.ljust(width) if place < 2 else cell.rjust(width)
