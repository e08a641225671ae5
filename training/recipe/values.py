"""One value of a recipe read strictly: from what YAML gives, or from a flag's text, to what the field holds.

Owns: types, ranges and the sentence that says what was expected. Does not know: which keys there are, or where a value
came from. Place in a training run: under `sources.py`, before anything else; no torch.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import yaml

from training.recipe.recipe import FieldDoc, PartRecipe, Recipe, Stage, doc_of

FormatName = Literal["alpaca", "sharegpt", "role_content", "openai", "query_response", "prompt_completion"]
"""``training.data.formats.Format``'s values, without its imports."""
OnBadName = Literal["error", "skip", "quarantine"]

_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_INT = re.compile(r"[-+]?\d{1,18}")
_FP16 = frozenset({"fp16", "float16", "half", "16", "16-mixed"})
MAX_NUMBER = 2**53
"""Of values without a limit of their own: what JSON readers hold exactly."""
FP16_REASON = (
    "fp16 is refused: activations of Qwen2.5-VL exceed its range of 65,504, and the loss becomes NaN; "
    "use bf16, which has fp32's range (or auto)"
)


class ValueRefused(ValueError):
    """A value is of the wrong type or out of range; ``str()`` says what it was and what it should be."""


def hints_of(owner: type) -> dict[str, object]:
    """Field -> type, with those that need torch to import replaced by the names that they take."""
    return get_type_hints(owner, localns={"Format": FormatName, "OnBad": OnBadName})


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads values of one source. ``is_text``: they come from flags, where everything is text."""

    is_text: bool

    def read(self, owner: type[Recipe] | type[PartRecipe] | type[Stage], name: str, value: object) -> object:
        """The value of a field. Raises ValueRefused."""
        if owner is Recipe and name == "precision" and str(value).lower() in _FP16:
            raise ValueRefused(FP16_REASON)
        return self._as(hints_of(owner)[name], doc_of(owner, name), value)

    def _as(self, hint: object, doc: FieldDoc, value: object) -> object:
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return self._optional(next(kind for kind in arguments if kind is not type(None)), doc, value)
        if value is None:
            raise ValueRefused(
                f"holds nothing; it is {_article(hint, doc)}: leave the line out for its default"
            )
        if origin is Literal:
            return _choice(arguments, value)
        if origin is tuple:
            return self._tuple(arguments[0], doc, value)
        if origin is not None:
            return self._mapping(arguments, doc, value)
        return self._plain(hint, doc, value)

    def _optional(self, hint: object, doc: FieldDoc, value: object) -> object:
        if value is None or (self.is_text and str(value).lower() in ("none", "null", "")):
            return None
        return self._as(hint, doc, value)

    def _plain(self, hint: object, doc: FieldDoc, value: object) -> object:
        if hint is bool:
            return self._bool(value)
        if hint is int:
            return _within(doc, self._int(value))
        if hint is float:
            return _within(doc, self._float(value))
        if not isinstance(value, str) or not value.strip():
            raise ValueRefused(f"holds {shown(value)}; it is text ({doc.unit}): put it in quotes")
        return Path(value) if hint is Path else value

    def _bool(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower() if self.is_text else ""
        if text not in ("true", "yes", "false", "no"):
            raise ValueRefused(f"holds {shown(value)}; it is true or false")
        return text in ("true", "yes")

    def _int(self, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if self.is_text and isinstance(value, str) and _INT.fullmatch(value):
            return int(value)
        raise ValueRefused(f"holds {shown(value)}; it is a whole number")

    def _float(self, value: object) -> float:
        """Text such as 2e-4 too: YAML 1.1 reads it as text, because it has no point."""
        number = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = _widened(value)
        elif isinstance(value, str) and _FLOAT.fullmatch(value):
            number = float(value)
        if not math.isfinite(number):
            raise ValueRefused(f"holds {shown(value)}; it is a finite number")
        return number

    def _tuple(self, hint: object, doc: FieldDoc, value: object) -> tuple[object, ...]:
        if hint is Stage:
            return _stages(self._structure(value))
        if isinstance(value, str):
            value = (
                [] if value.strip().lower() in ("", "none") else [item.strip() for item in value.split(",")]
            )
        if not isinstance(value, list | tuple):
            raise ValueRefused(f"holds {shown(value)}; it is a list ({doc.unit})")
        items = tuple(self._as(hint, doc, item) for item in value)
        if len(set(items)) < len(items):
            raise ValueRefused(f"names one thing twice: {shown(value)}")
        return items

    def _mapping(self, arguments: tuple[object, ...], doc: FieldDoc, value: object) -> dict[object, object]:
        value = self._structure(value)
        if not isinstance(value, Mapping):
            how = "name=value,name=value" if self.is_text else doc.unit
            raise ValueRefused(f"holds {shown(value)}; it maps names to values ({how})")
        key_hint, value_hint = arguments
        return {self._as(key_hint, doc, key): self._as(value_hint, doc, item) for key, item in value.items()}

    def _structure(self, value: object) -> object:
        """A flag's text for a list or mapping: YAML or JSON, or ``name=value,name=value``."""
        if not self.is_text or not isinstance(value, str):
            return value
        if "=" in value and not value.lstrip().startswith(("{", "[", "-")):
            pairs = [pair.partition("=") for pair in value.split(",")]
            return {key.strip(): item.strip() for key, _, item in pairs}
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
            reason = " ".join(str(error).split())[:160]
            raise ValueRefused(f"is no YAML and no JSON ({reason}): {shown(value)}") from error


def _stages(value: object) -> tuple[Stage, ...]:
    if not isinstance(value, list):
        raise ValueRefused(f"holds {shown(value)}; it is a list of stages: - {{parts: [merger], epochs: 1}}")
    return tuple(_stage(index, item) for index, item in enumerate(value, start=1))


def _stage(index: int, value: object) -> Stage:
    known = [field.name for field in fields(Stage)]
    if not isinstance(value, Mapping):
        raise ValueRefused(f"stage {index} is {shown(value)}; it maps {', '.join(known)} to values")
    values: dict[str, object] = {}
    for key, item in value.items():
        if key not in known:
            raise ValueRefused(f"stage {index} has the unknown key {key!r}; it may have {', '.join(known)}")
        try:
            values[key] = Reader(is_text=False).read(Stage, key, item)
        except ValueRefused as error:
            raise ValueRefused(f"stage {index}: {key} {error}") from error
    return Stage(**values)  # type: ignore[arg-type]  # each was read as its field's type


def _choice(choices: tuple[object, ...], value: object) -> object:
    if value not in choices:
        raise ValueRefused(f"holds {shown(value)}; it is one of {', '.join(map(str, choices))}")
    return value


def _within(doc: FieldDoc, number: float) -> float:
    limits = (
        (doc.low is None or number >= doc.low, f"at least {doc.low}"),
        (doc.above is None or number > doc.above, f"above {doc.above}"),
        (number <= (MAX_NUMBER if doc.high is None else doc.high), f"at most {doc.high or MAX_NUMBER}"),
        (doc.below is None or number < doc.below, f"below {doc.below}"),
    )
    broken = [limit for is_kept, limit in limits if not is_kept]
    if broken:
        was = f"{number:g}" if isinstance(number, float) else shown(number)
        raise ValueRefused(f"is {was}; it must be {broken[0]} ({doc.unit})")
    return number


def _widened(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def shown(value: object) -> str:
    """A value for a message: short, and its type where that is the point."""
    try:
        text = repr(value) if isinstance(value, str) else ascii(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"{text} (text)" if isinstance(value, str) else text


def _article(hint: object, doc: FieldDoc) -> str:
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return f"{kinds.get(hint, 'a value') if isinstance(hint, type) else 'a value'} ({doc.unit})"
