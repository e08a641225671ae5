"""Where a recipe's values come from: flags, then one YAML file, then the defaults; the origin of each is kept.

Owns: the order of sources, unknown keys, duplicate keys, and that everything wrong is said at once. Does not know: what
values mean. Place in a training run: before its first phase; no torch.

    recipe.yaml, flags -> Given(key, value, origin)... -> ResolvedRecipe(recipe, origins, notes)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path

import yaml

from training.recipe.check import contradictions
from training.recipe.file import Given, RecipeError, bundled, read_file
from training.recipe.names import FIXED, RENAMED, translate
from training.recipe.recipe import PartRecipe, Recipe, Stage
from training.recipe.values import Reader, ValueRefused

__all__ = ["KEYS", "RecipeError", "ResolvedRecipe", "bundled", "recipe_as_dict", "resolve_recipe"]

DEFAULT = "default"
PARTS = ("language", "merger", "vision")


def _keys() -> dict[str, tuple[type[Recipe] | type[PartRecipe], str]]:
    """Dotted key -> the class that has it and its field's name."""
    plain = {field.name: (Recipe, field.name) for field in fields(Recipe) if field.name not in PARTS}
    of_parts = {
        f"{part}.{field.name}": (PartRecipe, field.name) for part in PARTS for field in fields(PartRecipe)
    }
    return {**plain, **of_parts}


KEYS = _keys()


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """A recipe whose every value has been read and checked."""

    recipe: Recipe
    origins: Mapping[str, str]
    """Each dotted key -> ``flag --lr``, ``recipe.yaml:12`` or ``default``."""
    notes: tuple[str, ...]
    """What was understood otherwise than it was written, for the user to read."""

    def rows(self) -> list[tuple[str, object, str]]:
        """(dotted key, value, origin) of every key, in the recipe's order."""
        return [(key, _value_of(self.recipe, key), self.origins[key]) for key in KEYS]

    def text(self) -> str:
        """One line a value with its origin, then the notes."""
        lines = [f"{key} = {_plain(value)}  ({origin})" for key, value, origin in self.rows()]
        return "\n".join([*lines, *self.notes])

    def as_yaml(self) -> str:
        """A recipe file that resolves to the same recipe, with each value's origin behind it."""
        lines = ["# each value's origin is behind it"]
        for key, value in recipe_as_dict(self.recipe).items():
            origin = self.origins.get(key) or ", ".join(
                sorted({self.origins[known] for known in KEYS if known.startswith(f"{key}.")} - {DEFAULT})
            )
            text = yaml.safe_dump({key: value}, default_flow_style=True, width=10**6, allow_unicode=True)
            lines.append(f"{text.strip()[1:-1]}  # {origin or DEFAULT}")
        return "\n".join(lines) + "\n"


def resolve_recipe(file: Path | None, flags: Mapping[str, object]) -> ResolvedRecipe:
    """The recipe of ``file`` (a path, or the name of a bundled recipe) and ``flags``, which win.

    ``flags``: dotted key -> text, or true or false, of those given. Raises RecipeError, which lists all that is wrong.
    """
    problems: list[str] = []
    notes: list[str] = []
    layers = [read_file(file) if file is not None else [], _of_flags(flags)]
    given: dict[str, Given] = {}
    for layer in layers:
        given |= _known(layer, problems, notes)
    values = _read(given.values(), problems)
    if problems:
        raise RecipeError(problems)
    recipe = _recipe(values)
    origins = {key: given[key].origin if key in given else DEFAULT for key in KEYS}
    wrong = [_with_origins(problem, given) for problem in contradictions(recipe, given)]
    if wrong:
        raise RecipeError(wrong)
    return ResolvedRecipe(recipe, origins, tuple(notes))


def recipe_as_dict(recipe: Recipe) -> dict[str, object]:
    """For JSON and YAML; ``resolve_recipe`` makes the same recipe of it.

    Values that another one displaces are left out (``preset`` beside ``targets``), and parts without values of their
    own.
    """
    values = {field.name: _plain(getattr(recipe, field.name)) for field in fields(Recipe)}
    displaced = {
        "preset": recipe.targets is not None,
        "warmup_ratio": recipe.warmup_steps is not None,
        "eval_split": bool(recipe.eval),
        **{part: not values[part] for part in PARTS},
        "gate": bool(recipe.gate) and not recipe.eval and recipe.eval_split == 0,
        "name": not recipe.name,
    }
    return {name: value for name, value in values.items() if not displaced.get(name, False)}


def _of_flags(flags: Mapping[str, object]) -> list[Given]:
    return [
        Given(key, value, f"flag --{key.replace('_', '-')}", is_text=True) for key, value in flags.items()
    ]


def _known(layer: Iterable[Given], problems: list[str], notes: list[str]) -> dict[str, Given]:
    """One source's values by this release's keys; what is unknown, refused or named twice goes to ``problems``."""
    found: dict[str, Given] = {}
    for given in layer:
        try:
            here = translate(given.key, given.value)
        except ValueRefused as error:
            problems.append(f"{error}  ({given.origin})")
            continue
        if here.note:
            notes.append(f"{here.note}  ({given.origin})")
        if here.key is None:
            continue
        if here.key not in KEYS:
            problems.append(f"{_unknown(given.key)}  ({given.origin})")
        elif here.key in found:
            other = found[here.key].origin
            problems.append(f"{given.key} is {here.key}, which is given already  ({given.origin}, {other})")
        else:
            found[here.key] = Given(here.key, here.value, given.origin, given.is_text)
    return found


def _unknown(key: str) -> str:
    if key in PARTS:
        return f"{key} maps r, alpha and lr to values"
    known = [*KEYS, *RENAMED, *FIXED]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    mine = dict.fromkeys(RENAMED.get(name, name) for name in near)
    return f"unknown key {key!r}" + (f"; did you mean {' or '.join(mine)}?" if mine else "")


def _read(given: Iterable[Given], problems: list[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for item in given:
        owner, name = KEYS[item.key]
        try:
            values[item.key] = Reader(item.is_text).read(owner, name, item.value)
        except ValueRefused as error:
            problems.append(f"{item.key} {error}  ({item.origin})")
    return values


def _recipe(values: Mapping[str, object]) -> Recipe:
    whole: dict[str, object] = {key: value for key, value in values.items() if "." not in key}
    for part in PARTS:
        own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{part}.")}
        whole[part] = PartRecipe(**own)  # type: ignore[arg-type]  # each was read as its field's type
    if whole.get("format") is not None:
        from training.data.formats import Format  # brings torch, so only where it is asked for

        whole["format"] = Format(str(whole["format"]))
    return Recipe(**whole)  # type: ignore[arg-type]  # as above


def _with_origins(problem: str, given: Mapping[str, Given]) -> str:
    words = dict.fromkeys(problem.replace(":", " ").replace(",", " ").split())
    named = [given[word] for word in words if word in given]
    if not named:
        return problem
    origins = ", ".join(dict.fromkeys(item.origin for item in named))
    from_file = [item.key for item in named if not item.is_text]
    is_undone = (
        len(from_file) < len(named) and from_file and from_file[0] in ("epochs", "max_steps", "preset")
    )
    remedy = f"; the flag --{from_file[0].replace('_', '-')} none takes the file's away" if is_undone else ""
    return f"{problem}{remedy}  ({origins})"


def _value_of(recipe: Recipe, key: str) -> object:
    part, dot, name = key.partition(".")
    return getattr(getattr(recipe, part), name) if dot else getattr(recipe, key)


def _plain(value: object) -> object:
    """Lists, dictionaries, text and numbers only."""
    if isinstance(value, Stage | PartRecipe):
        return {name: _plain(item) for name, item in asdict(value).items() if item not in (None, {})}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return str(value.value)
    return str(value) if isinstance(value, Path) else value
