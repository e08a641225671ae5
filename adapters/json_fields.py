"""Fields: a parsed JSON object read field by field, each with its type and its bound.

For documents that strangers wrote. What is absent is the empty value of its type; what is present and of another type,
or beyond its bound, is a ValueError that names the field and never echoes more than a few characters of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final, TypeGuard

MAX_TEXT: Final = 1024
MAX_COUNT: Final = 1 << 62
_HEX_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class Fields:
    """One object of the document; ``where`` is its place, for messages."""

    def __init__(self, values: Mapping[str, object], where: str = "") -> None:
        self.values = values
        self._where = where

    def name_of(self, key: str) -> str:
        return f"{self._where}.{_shown(key)}" if self._where else _shown(key)

    def _wrong(self, key: str, wanted: str) -> ValueError:
        return ValueError(f"{self.name_of(key)} is {ascii(self.values[key])[:64]}; it must be {wanted}")

    def text(self, key: str, max_chars: int = MAX_TEXT) -> str:
        value = self.values.get(key)
        if value is None:
            return ""
        if not isinstance(value, str) or len(value) > max_chars:
            raise self._wrong(key, f"text of at most {max_chars} characters")
        return value

    def sha256(self, key: str) -> str:
        value = self.text(key)
        if value and not _HEX_SHA256.fullmatch(value):
            raise self._wrong(key, "a SHA-256 in 64 lower-case hexadecimal digits")
        return value

    def count(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            raise self._wrong(key, "a whole number from 0")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise ValueError(f"{self.name_of(key)} must be true or false")
        return value

    def texts(self, key: str, max_items: int) -> tuple[str, ...]:
        items = self.items(key, max_items)
        if not all(isinstance(item, str) and len(item) <= MAX_TEXT for item in items):
            raise self._wrong(key, f"a list of texts of at most {MAX_TEXT} characters")
        return tuple(str(item) for item in items)

    def items(self, key: str, max_items: int) -> Sequence[object]:
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > max_items:
            raise self._wrong(key, f"a list of at most {max_items}")
        return value

    def section(self, key: str) -> Fields:
        """The object under ``key``; an empty one when there is none."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self._wrong(key, "a JSON object")
        return Fields(value, self.name_of(key))

    def numbers(self) -> dict[str, float]:
        """The whole object as names and finite numbers."""
        numbers: dict[str, float] = {}
        for key, value in self.values.items():
            if not is_finite(value):
                raise self._wrong(key, "a finite number")
            numbers[key] = float(value)
        return numbers


def _shown(key: str) -> str:
    """A key as messages may carry it: ours as they are, a stranger's cut short and in ASCII."""
    return key if key.isascii() and key.isidentifier() and len(key) <= 64 else ascii(key)[:64]


def is_finite(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold; true and false are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MAX_COUNT
