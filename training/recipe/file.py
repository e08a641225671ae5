"""One recipe file, read into keys, values and the lines that they stand in.

Owns: YAML and its traps (a key twice, anchors, a file that is no mapping) and the recipes that come with us. Reads with
``yaml.safe_load`` alone: no tag makes an object. Does not know: which keys exist. Place in a training run: under
`sources.py`; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent / "bundled"
MAX_BYTES = 1 << 20
PARTS = ("language", "merger", "vision")


class RecipeError(ValueError):
    """``str()`` lists everything that is wrong, each with its origin."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class Given:
    """One value that someone wrote."""

    key: str
    """Dotted for parts: ``merger.lr``."""
    value: object
    origin: str
    is_text: bool = False
    """From a flag, where everything is text."""


def bundled() -> tuple[str, ...]:
    """Names of the recipes that come with us."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def read_file(path: Path) -> list[Given]:
    """Its values, in order; the keys of parts dotted. A name without a file is a bundled recipe's.

    Raises RecipeError.
    """
    found = _find(path)
    try:
        data = found.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"the recipe {found} cannot be read: {error}"]) from error
    if len(data) > MAX_BYTES:
        raise RecipeError([f"the recipe {found} has {len(data)} bytes; a recipe has at most {MAX_BYTES}"])
    try:
        lines = _lines(text, found.name)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError([f"{found.name} is no YAML: {' '.join(str(error).split())[:300]}"]) from error
    if values is None:
        return []
    if not isinstance(values, dict):
        raise RecipeError([f"{found.name} is no recipe: it must map keys to values (lr: 2e-4)"])
    return list(_given(values, lines, found.name))


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    ours = FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and ours.is_file():
        return ours
    raise RecipeError([f"there is no recipe {path}: give a file, or one of {', '.join(bundled())}"])


def _given(values: dict[object, object], lines: dict[str, int], file: str) -> Iterator[Given]:
    for key, value in values.items():
        name = str(key)
        if name in PARTS and isinstance(value, dict):
            for own, item in value.items():
                dotted = f"{name}.{own}"
                yield Given(dotted, item, f"{file}:{lines.get(dotted, lines.get(name, 1))}")
        elif not (name in PARTS and value is None):
            yield Given(name, value, f"{file}:{lines.get(name, 1)}")


def _lines(text: str, file: str) -> dict[str, int]:
    """Dotted key -> line, of the first two levels. Raises RecipeError for keys given twice and for anchors."""
    problems = [
        f"{file}:{event.start_mark.line + 1}: anchors and aliases (& and *) are not read: write it out"
        for event in yaml.parse(text, Loader=yaml.SafeLoader)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None)
    ]
    if problems:
        raise RecipeError(problems)
    lines: dict[str, int] = {}
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    _walk(root, "", lines, problems, file)
    if problems:
        raise RecipeError(problems)
    return lines


def _walk(node: yaml.Node | None, stem: str, lines: dict[str, int], problems: list[str], file: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value, start=1):
            _walk(item, f"{stem}{index}.", lines, problems, file)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name, line = f"{stem}{key.value}", key.start_mark.line + 1
        if name in lines:
            problems.append(f"{file}:{line}: {name} is given twice, first in line {lines[name]}: keep one")
        lines.setdefault(name, line)
        _walk(value, f"{name}.", lines, problems, file)
