"""The page on judging names every number, and what it shows can be used as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from training.evaluation.catalogue import MEASURES
from training.evaluation.gate import check_gate
from training.evaluation.general import MAX_TOKENS, PLAIN_PROMPTS
from training.evaluation.judge import VISION_ROWS
from training.recipe.sources import resolve_recipe
from training.sweep.sweep import experiments_of, parse_axis, read_axes

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text("utf-8")


def part(name: str) -> str:
    return PAGE.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


def code(name: str) -> str:
    return part(name).strip().removeprefix("```yaml\n").removesuffix("```")


def test_every_number_is_on_the_page_with_its_unit() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", part("metrics"), flags=re.MULTILINE)
    assert rows == [(measure.name, measure.unit) for measure in MEASURES.values()]


def test_the_page_s_rules_are_rules() -> None:
    assert len(check_gate(yaml.safe_load(code("rules"))["gate"], tuple(MEASURES))) == 6


def test_the_page_s_figures_are_the_code_s() -> None:
    assert f"up to {VISION_ROWS} rows" in PAGE
    assert f"at most {MAX_TOKENS} tokens" in PAGE
    assert len(PLAIN_PROMPTS) == 20 and "Twenty short prompts" in PAGE


def test_the_page_s_grids_are_grids_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(code("grid"))
    experiments = experiments_of(read_axes(path))
    assert len(experiments) == 3 * 2 * 2
    flags = {"data": ["rows.jsonl"], "name": "a"}
    recipes = [resolve_recipe(None, {**flags, **experiment.changes}).recipe for experiment in experiments]
    assert {(recipe.r, recipe.merger.lr, recipe.preset[0]) for recipe in recipes} == {
        (r, lr, preset) for r in (8, 16, 32) for lr in (1e-4, 3e-4) for preset in ("language", "attention")
    }
    options = re.findall(r"--grid '([^']+)'|--grid (\w+=[\w,]+)", PAGE)
    assert len(options) == 3
    for quoted, plain in options:
        for experiment in experiments_of([parse_axis(quoted or plain)]):
            resolve_recipe(None, {**flags, **experiment.changes})
