"""Columns: rows of words as aligned lines. Nothing is cut off: a narrow terminal wraps, a pipe gets it all."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """One line a row, each column as wide as its longest word. Rows are equally long."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]
