"""What contradicts what in a recipe: values that are fine alone and cannot hold together, or would have no effect.

Owns: those rules. A value that would be ignored is an error, never silence. Does not know: YAML, flags; whether a value
is wise (`linter.py`). Place in a training run: after the recipe is read, before anything else; no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator

from adapters.sites import PARTS
from training.recipe.recipe import Part, PartRecipe, Recipe, Stage
from training.targets.targets import PRESETS

_NAME = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9_-][A-Za-z0-9._-]{0,95}")
"""As the registry takes names, without leading dots: it names a folder too."""
_RIVALS: tuple[tuple[str, str, str], ...] = (
    ("epochs", "max_steps", "both say how long the run is"),
    ("warmup_ratio", "warmup_steps", "both say how long the rate rises"),
    ("targets", "preset", "both say what the adapter sits on"),
    ("stages", "epochs", "each stage has its own length"),
    ("stages", "max_steps", "each stage has its own length"),
)


def contradictions(recipe: Recipe, given: Collection[str]) -> list[str]:
    """One sentence each, beginning with the key at fault. ``given``: dotted keys that someone wrote, as opposed to
    defaults."""
    rules: tuple[Callable[[Recipe, Collection[str]], Iterator[str]], ...] = (
        _names,
        _rivals,
        _held_out,
        _pixels,
        _parts,
        _stages,
    )
    return [problem for rule in rules for problem in rule(recipe, given)]


def parts_of(recipe: Recipe) -> tuple[Part, ...] | None:
    """Parts that the presets reach; None when ``targets`` decides and only a base can tell."""
    if recipe.targets is not None:
        return None
    return tuple(part for part in PARTS if any(part in PRESETS[preset] for preset in recipe.preset))


def _names(recipe: Recipe, given: Collection[str]) -> Iterator[str]:
    if recipe.name and not _NAME.fullmatch(recipe.name):
        yield (
            f"name {recipe.name!r}: letters, digits, dot, dash and underscore, up to 96, beginning with no dot;"
            " at most one slash between two such"
        )
    if recipe.name in ("base", "pocket", "lorikeet-pocket"):
        yield f"name {recipe.name!r} is the base's own: choose another"
    if not recipe.preset and recipe.targets is None:
        yield "preset is empty: name at least one, or targets"


def _rivals(recipe: Recipe, given: Collection[str]) -> Iterator[str]:
    for one, other, reason in _RIVALS:
        if one in given and other in given and _is_set(recipe, one) and _is_set(recipe, other):
            yield f"{one} and {other} are both given, but {reason}: take one out"


def _is_set(recipe: Recipe, name: str) -> bool:
    return getattr(recipe, name) not in (None, (), "")


def _held_out(recipe: Recipe, given: Collection[str]) -> Iterator[str]:
    if recipe.eval and "eval_split" in given and recipe.eval_split > 0:
        yield "eval_split has no effect where eval names files: take one out"
    if recipe.eval or recipe.eval_split > 0:
        return
    for name in ("early_stopping", "eval_steps", "gate", "metrics"):
        if name in given and _is_set(recipe, name):
            yield f"{name} needs held-out rows, but eval_split is 0 and eval names no file"


def _pixels(recipe: Recipe, given: Collection[str]) -> Iterator[str]:
    low, high = recipe.min_pixels, recipe.max_pixels
    if low is not None and high is not None and low > high:
        yield f"min_pixels {low} is above max_pixels {high}"


def _parts(recipe: Recipe, given: Collection[str]) -> Iterator[str]:
    present = parts_of(recipe)
    for part in PARTS:
        if present is not None and part not in present and recipe.of(part) != PartRecipe():
            yield (
                f"{part} has values of its own, but no preset reaches it: add {part} to preset, or take them out"
            )


def _stages(recipe: Recipe, given: Collection[str]) -> Iterator[str]:
    present = parts_of(recipe)
    for index, stage in enumerate(recipe.stages, start=1):
        yield from (f"stages: stage {index} {problem}" for problem in _stage(stage, present))
    if recipe.stages and present is not None:
        trained = {part for stage in recipe.stages for part in stage.parts}
        for part in present:
            if part not in trained:
                yield f"stages: no stage trains {part}, which the preset reaches: its weights would stay zero"


def _stage(stage: Stage, present: tuple[Part, ...] | None) -> Iterator[str]:
    if not stage.parts:
        yield "names no parts: parts: [merger]"
    if (stage.epochs is None) == (stage.max_steps is None):
        yield "needs a length: exactly one of epochs and max_steps"
    for part in stage.parts:
        if present is not None and part not in present:
            yield f"trains {part}, which no preset reaches: add {part} to preset"
    for part in stage.rates:
        if part not in stage.parts:
            yield f"has a rate for {part}, which it does not train"
