"""Fields: one object of a row, read by name and type; a field that is wrong is refused where it stands.

Owns: which fields were asked for, so that those nobody reads are reported instead of silently dropped.
Does not know: which formats there are. Place in a training run: under the formats.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.data.faults import FaultKind, RowRejected


class Fields:
    """A JSON object at ``path`` in its row. A field that is null counts as absent."""

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        self._values = values
        self._path = path
        self._read: set[str] = set()

    def at(self, name: str) -> str:
        """The path of a field in its row."""
        return f"{self._path}.{name}" if self._path else name

    def value(self, name: str) -> object:
        """As it is; None when absent."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str) -> str:
        """Raises RowRejected: missing_field, bad_value."""
        value = self.value(name)
        if value is None:
            raise RowRejected(
                FaultKind.MISSING_FIELD, self.at(name), list(self._values), f"a field {name!r} with text",
                "add it, or rename the column that holds it",
            )  # fmt: skip
        return as_text(value, self.at(name))

    def optional_text(self, name: str) -> str:
        """Empty when absent."""
        return "" if self.value(name) is None else self.text(name)

    def items(self, name: str) -> list[object]:
        """A list; empty when absent."""
        value = self.value(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise RowRejected(FaultKind.BAD_VALUE, self.at(name), value, "a list", "put it in [ ]")
        return value

    def objects(self, name: str) -> list[Fields]:
        """A list of objects, each with its own path."""
        return [as_fields(item, f"{self.at(name)}[{i}]") for i, item in enumerate(self.items(name))]

    def flag(self, name: str, default: bool) -> bool:
        """true, false, 1, 0 or what ``default`` says."""
        value = self.value(name)
        return default if value is None else as_flag(value, self.at(name))

    def unread(self) -> list[str]:
        """Fields that hold something and that nobody asked for."""
        return [
            name
            for name, value in self._values.items()
            if name not in self._read and value not in (None, [], "")
        ]


def as_text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise RowRejected(FaultKind.BAD_VALUE, field, value, "text", "write it as a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowRejected(
            FaultKind.BAD_VALUE,
            field,
            value,
            "text that is UTF-8",
            "remove the lone surrogate (half a character)",
        ) from None
    return value


def as_fields(value: object, field: str) -> Fields:
    if not isinstance(value, dict):
        raise RowRejected(FaultKind.BAD_VALUE, field, value, "an object", "see the example row of the format")
    return Fields(value, field)


def as_flag(value: object, field: str) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise RowRejected(
        FaultKind.BAD_VALUE, field, value, "true or false", "train on the answer (true) or not (false)"
    )
