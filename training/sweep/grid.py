"""Grid: which experiments a sweep consists of, from flags and YAML.

``r=8,16,32`` is an axis of three values; a value that itself holds commas, or is a list, is written in JSON:
``targets=[".*q_proj|.*v_proj", ".*"]``, ``preset=[["language", "merger"], "language"]``. A YAML file is a mapping of
keys to lists (one axis each), or a list of mappings: experiments as they are, such as ``- {r: 8, alpha: 16}``. Several
axes multiply. Keys are the recipe's, dots for the parts of a part: ``merger.lr``.

Owns: that grammar, and the experiments' names. Does not know: the recipe's fields (whoever resolves the recipe refuses
unknown ones). Place in a training run: above it; the first thing that a sweep does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

MAX_EXPERIMENTS: Final = 1000
_NAME_LENGTH: Final = 80
_WORDS: Final = {"true": True, "false": False, "null": None, "none": None}
_EXAMPLE: Final = "write it as r=8,16,32"

Axis = tuple[Mapping[str, object], ...]
"""Sets of changes, of which an experiment has one."""


class SweepError(Exception):
    """A sweep that cannot begin: says what is wrong and what to write instead."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """What one experiment has otherwise than the sweep's recipe."""

    name: str
    """Unique in the sweep; fit for a folder."""
    changes: Mapping[str, object]
    """Recipe key -> value."""


def parse_axis(option: str) -> Axis:
    """One ``key=value,value``. Raises SweepError."""
    key, equals, values = option.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise SweepError(f"--grid {option!r} is no key with values: {_EXAMPLE}")
    return _axis(key, _values(option, values.strip()))


def read_axes(path: Path) -> tuple[Axis, ...]:
    """A YAML file's. Raises SweepError."""
    try:
        content: object = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SweepError(f"the grid {path} cannot be read: {error}") from error
    if isinstance(content, Mapping) and content:
        return tuple(_axis(str(key), _listed(str(key), values, path)) for key, values in content.items())
    if isinstance(content, list) and content and all(isinstance(item, Mapping) and item for item in content):
        return (tuple({_key(str(key)): _typed(value) for key, value in item.items()} for item in content),)
    raise SweepError(f"the grid {path} is neither keys with lists of values nor a list of experiments")


def experiments_of(axes: Sequence[Axis]) -> tuple[Experiment, ...]:
    """All combinations, the last axis fastest. Raises SweepError: no axis, a key on two axes, too many experiments, two
    that are the same."""
    if not axes:
        raise SweepError(
            f"a sweep needs a grid: --grid r=8,16 --grid alpha=16,32, or a YAML file; {_EXAMPLE}"
        )
    _check_keys(axes)
    combined = [
        {key: value for changes in parts for key, value in changes.items()}
        for parts in itertools.islice(itertools.product(*axes), MAX_EXPERIMENTS + 1)
    ]
    if len(combined) > MAX_EXPERIMENTS:
        raise SweepError(f"the grid has more than {MAX_EXPERIMENTS} experiments: take values out")
    names = [_name(changes) for changes in combined]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SweepError(f"the grid has {twice[0]} twice: name each value once")
    return tuple(map(Experiment, names, combined))


def _check_keys(axes: Sequence[Axis]) -> None:
    counts = Counter(key for axis in axes for key in {key for changes in axis for key in changes})
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise SweepError(f"the grid has {twice[0]} on two axes: give all of its values on one")


def _axis(key: str, values: Sequence[object]) -> Axis:
    return tuple({_key(key): value} for value in values)


def _key(key: str) -> str:
    return key.strip().removeprefix("--").replace("-", "_")


def _values(option: str, text: str) -> list[object]:
    if not text.startswith("["):
        words = [word.strip() for word in text.split(",")]
        if not all(words):
            raise SweepError(f"--grid {option!r} has an empty value: {_EXAMPLE}")
        return [_typed(word) for word in words]
    try:
        values: object = json.loads(text)
    except ValueError as error:
        raise SweepError(f"--grid {option!r} begins like a JSON list and is none: {error}") from error
    if not isinstance(values, list) or not values:
        raise SweepError(f"--grid {option!r} is an empty list: {_EXAMPLE}")
    return values


def _listed(key: str, values: object, path: Path) -> list[object]:
    if not isinstance(values, list) or not values:
        raise SweepError(f"the grid {path} has no list of values for {key}: write it as {key}: [8, 16]")
    return [_typed(value) for value in values]


def _typed(value: object) -> object:
    """A word as what it spells; YAML takes 2e-4 for a word."""
    if not isinstance(value, str):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    for kind in (int, float):
        if re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", value, re.IGNORECASE):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _name(changes: Mapping[str, object]) -> str:
    name = "-".join(f"{key}{_spelt(value)}" for key, value in changes.items())
    clean = re.sub(r"[^A-Za-z0-9.+-]+", "_", name).strip("_.")
    if len(clean) <= _NAME_LENGTH and clean == name.replace("=", "_"):
        return clean
    digest = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:8]
    return f"{clean[:_NAME_LENGTH]}-{digest}"


def _spelt(value: object) -> str:
    if isinstance(value, (bool, int)) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "=" + ("+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
