"""The ladder: changes to a recipe that make it fit, the harmless ones first, each on top of the last.

Owns their order and what each costs. Does not know: bytes, beyond asking the plan. Place in a training run: when the
plan does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from training.plan.peak import Device, Row, fits, peak_parts
from training.plan.shape import BaseShape
from training.recipe.recipe import PartRecipe, Preset, Recipe

Change = tuple[str, str, Recipe, Row]
"""What changes, what it costs, and the recipe and row after it."""
SMALLEST_PIXELS = 200_704
"""256 tokens a picture: below it print becomes unreadable."""


@dataclass(frozen=True, slots=True)
class Step:
    """One rung of the ladder: a change on top of all before it."""

    change: str
    cost: str
    recipe: Recipe
    total_bytes: int
    does_fit: bool


def climb(shape: BaseShape, recipe: Recipe, row: Row, device: Device, memory_bytes: int) -> tuple[Step, ...]:
    """Rungs until it fits, or all of them."""
    steps: list[Step] = []
    for rung in (_smaller_batch, _checkpointing, _optimizer, _fewer_pixels, _lower_ranks, _fewer_targets):
        for change, cost, after, row_after in rung(recipe, row, device):
            total = sum(peak_parts(shape, after, row_after, device).values())
            steps.append(Step(change, cost, after, total, fits(total, memory_bytes)))
            recipe, row = after, row_after
            if steps[-1].does_fit:
                return tuple(steps)
    return tuple(steps)


def _smaller_batch(recipe: Recipe, row: Row, device: Device) -> Iterator[Change]:
    rows = recipe.rows_per_step
    sizes = [size for size in (4, 2, 1) if size < recipe.micro_batch and rows % size == 0]
    for size in sizes:
        after = replace(recipe, micro_batch=size, accumulation=rows // size)
        yield (
            f"micro_batch {size}, accumulation {rows // size}",
            "some time; the result is the same",
            after,
            row,
        )


def _checkpointing(recipe: Recipe, row: Row, device: Device) -> Iterator[Change]:
    if not recipe.activation_checkpointing:
        after = replace(recipe, activation_checkpointing=True)
        yield "activation_checkpointing true", "a third more time; the result is the same", after, row


def _optimizer(recipe: Recipe, row: Row, device: Device) -> Iterator[Change]:
    if device == "cuda" and recipe.optimizer == "adamw":
        yield (
            "optimizer paged_adamw_8bit",
            "slightly rougher steps",
            replace(recipe, optimizer="paged_adamw_8bit"),
            row,
        )


def _fewer_pixels(recipe: Recipe, row: Row, device: Device) -> Iterator[Change]:
    pixels = row.image_tokens * 784
    while pixels // 2 >= SMALLEST_PIXELS:
        pixels //= 2
        image_tokens = pixels // 784
        row = replace(row, image_tokens=image_tokens, tokens=row.tokens - (row.image_tokens - image_tokens))
        low = recipe.min_pixels if recipe.min_pixels is None else min(recipe.min_pixels, pixels)
        recipe = replace(recipe, max_pixels=pixels, min_pixels=low)
        yield f"max_pixels {pixels}", "small print; the server must use the same", recipe, row


def _lower_ranks(recipe: Recipe, row: Row, device: Device) -> Iterator[Change]:
    while recipe.r > 8:
        recipe = _halved(recipe)
        yield f"r {recipe.r}, alpha {recipe.alpha:g}", "what the adapter can hold", recipe, row


def _halved(recipe: Recipe) -> Recipe:
    """Ranks and alphas alike, so that scales stay."""
    return replace(
        recipe,
        r=recipe.r // 2,
        alpha=recipe.alpha / 2,
        language=_half(recipe.language),
        merger=_half(recipe.merger),
        vision=_half(recipe.vision),
    )


def _half(part: PartRecipe) -> PartRecipe:
    r = None if part.r is None else max(1, part.r // 2)
    return replace(part, r=r, alpha=None if part.alpha is None else part.alpha / 2)


def _fewer_targets(recipe: Recipe, row: Row, device: Device) -> Iterator[Change]:
    if recipe.targets is not None or recipe.stages:
        return
    if "all" in recipe.preset or "vision" in recipe.preset:
        kept: tuple[Preset, ...] = ("language", "merger")
        recipe = replace(recipe, preset=kept, vision=PartRecipe(), rank_pattern={}, alpha_pattern={})
        yield "preset language,merger", "the tower stays as it is", recipe, row
    if "language" in recipe.preset:
        others = tuple(preset for preset in recipe.preset if preset != "language")
        recipe = replace(recipe, preset=("attention", *others), rank_pattern={}, alpha_pattern={})
        yield f"preset {','.join(recipe.preset)}", "new skills come slower without the MLPs", recipe, row
