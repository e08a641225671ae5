from __future__ import annotations

from pathlib import Path

import pytest

from training.evaluation.gate import parse_rule
from training.plan.plan import GIB, plan_memory
from training.plan.shape import KNOWN_SHAPES
from training.recipe.file import FOLDER, bundled
from training.recipe.linter import advise
from training.recipe.page import fields_table, page
from training.recipe.recipe import Recipe
from training.recipe.sources import KEYS, resolve_recipe
from training.targets.targets import resolve_targets_on

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
THREE, SEVEN = KNOWN_SHAPES


def test_the_common_cases_are_there() -> None:
    assert bundled() == (
        "boxes", "classify", "domain-images", "large-data", "low-memory", "ocr", "quick", "staged", "style",
    )  # fmt: skip


@pytest.mark.parametrize("name", bundled())
def test_a_bundled_recipe_resolves_by_its_name_and_is_wise(name: str) -> None:
    resolved = resolve_recipe(Path(name), {"data": "rows.jsonl", "name": "mine"})
    assert resolved.notes == ()
    assert not [str(advice) for advice in advise(resolved.recipe) if advice.level != "note"]
    assert resolve_targets_on(resolved.recipe, THREE.sites()).modules
    for rule in resolved.recipe.gate:
        parse_rule(rule)
    assert plan_memory(SEVEN, resolved.recipe).total_bytes > 0


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("classify", 10), ("quick", 1000), ("style", 3000), ("ocr", 2000), ("boxes", 3000),
        ("staged", 2000), ("domain-images", 3000), ("large-data", 50_000), ("low-memory", 20_000),
    ],
)  # fmt: skip
def test_a_bundled_recipe_suits_the_data_that_it_is_for(name: str, rows: int) -> None:
    recipe = resolve_recipe(Path(name), {}).recipe
    assert not [str(advice) for advice in advise(recipe, rows) if advice.level != "note"]


@pytest.mark.parametrize("name", bundled())
def test_every_line_of_a_bundled_recipe_matters_and_it_says_what_it_is_for(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text("utf-8").splitlines()
    assert lines[0].startswith("# ") and "" in lines
    assert sum("#" in line for line in lines) >= 5


def test_the_low_memory_recipe_keeps_its_promise() -> None:
    recipe = resolve_recipe(Path("low-memory"), {}).recipe
    assert plan_memory(THREE, recipe, memory_bytes=6 * GIB).does_fit
    assert plan_memory(SEVEN, recipe, memory_bytes=12 * GIB).does_fit


def test_the_page_repeats_what_the_code_says() -> None:
    text = DOCS.read_text("utf-8")
    assert text == page(text), "run: python -m training.recipe.page docs/recipes.md"


def test_every_field_is_on_the_page_with_its_default() -> None:
    table = fields_table()
    for key in KEYS:
        if "." not in key:
            assert f"| `{key}` |" in table
    assert "| `language` | part | none |" in table
    assert f"| `lr` | a step | {Recipe().lr:g} | above 0 to 1 |" in table


def test_the_counts_on_the_page_are_the_presets() -> None:
    text = DOCS.read_text("utf-8")
    for preset in ("language", "attention", "qv", "merger", "vision", "all"):
        three, seven = (
            len(resolve_targets_on(Recipe(preset=(preset,)), shape.sites()).modules) for shape in KNOWN_SHAPES
        )
        row = next(line for line in text.splitlines() if line.startswith(f"| `{preset}` | "))
        assert row.endswith(f"| {three} | {seven} |")


def test_the_peaks_on_the_page_are_the_plans() -> None:
    recipe = Recipe(micro_batch=1, accumulation=1, activation_checkpointing=True)
    three, seven = (plan_memory(shape, recipe).total_bytes / GIB for shape in KNOWN_SHAPES)
    assert f"{three:.1f} GiB for the 3B and {seven:.1f} GiB for the 7B" in " ".join(
        DOCS.read_text("utf-8").split()
    )
