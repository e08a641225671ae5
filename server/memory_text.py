"""A memory budget as operators write it: ``auto``, a share such as ``0.9`` or ``90%``, or bytes such as ``70GiB``.

Place in a request's way: none; once, at start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ByteSize, TypeAdapter

if TYPE_CHECKING:
    from engine.config import MemoryBudget

_BYTES = TypeAdapter(ByteSize)


def parse_budget(text: str) -> MemoryBudget | None:
    """None for ``auto``. A plain number up to 1 is a share. Raises ValueError, saying what is allowed."""
    from engine.config import MemoryBudget

    word = text.strip().lower()
    if word == "auto":
        return None
    share = _share(word)
    if share is not None and 0 < share <= 1:
        return MemoryBudget(share=share)
    try:
        num_bytes = int(_BYTES.validate_python(word))
    except ValueError as error:
        raise ValueError(_allowed(text)) from error
    if num_bytes < 1 or (share is not None and word.endswith("%")):
        raise ValueError(_allowed(text))
    return MemoryBudget(num_bytes=num_bytes)


def _share(word: str) -> float | None:
    try:
        return float(word[:-1]) / 100 if word.endswith("%") else float(word)
    except ValueError:
        return None


def _allowed(text: str) -> str:
    return (
        f"{text[:40]!r} is no memory budget: write auto, a share such as 0.9 or 90%, or bytes such as 70GiB"
    )
