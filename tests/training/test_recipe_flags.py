from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from typer.testing import CliRunner

from training.recipe.flags import CONTEXT, flag_of, flags_command
from training.recipe.recipe import PartRecipe, Recipe, Stage
from training.recipe.sources import KEYS, resolve_recipe


def _run(*arguments: str) -> tuple[Mapping[str, object], Mapping[str, object], str]:
    """The recipe's flags, the command's own values, and what was printed."""
    seen: list[Mapping[str, object]] = []
    file = inspect.Parameter(
        "recipe",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Path | None, typer.Option("--recipe")],
    )
    app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT)
    app.command("train")(flags_command(lambda flags, own: seen.extend((flags, own)), [file]))
    result = CliRunner().invoke(app, list(arguments))
    return (seen[0], seen[1], result.output) if seen else ({}, {}, result.output)


def test_flags_become_a_recipe() -> None:
    flags, own, _ = _run(
        "--recipe", "x.yaml", "--merger.lr", "2e-4", "--preset", "language,merger", "--rslora", "--no-dora",
        "--data", "a.jsonl,b.jsonl", "--data", "c.jsonl", "--max_length", "512", "--rank-pattern", "q_proj=4",
        "--stages", "[{parts: [merger], max_steps: 2}, {parts: [language, merger], epochs: 1}]",
    )  # fmt: skip
    assert own == {"recipe": Path("x.yaml")}
    assert resolve_recipe(None, flags).recipe == Recipe(
        preset=("language", "merger"),
        merger=PartRecipe(lr=2e-4),
        rslora=True,
        data=("a.jsonl", "b.jsonl", "c.jsonl"),
        max_length=512,
        rank_pattern={"q_proj": 4},
        stages=(Stage(parts=("merger",), max_steps=2), Stage(parts=("language", "merger"), epochs=1.0)),
    )


def test_flags_that_were_not_given_are_not_passed_on() -> None:
    flags, own, _ = _run("--lr", "1e-4")
    assert flags == {"lr": "1e-4"} and own == {"recipe": None}


def test_every_key_has_a_flag_with_its_unit_and_default_in_the_help() -> None:
    _, _, text = _run("--help")
    plain = " ".join(text.split())
    for key in KEYS:
        assert f"{flag_of(key)} " in plain or f"{flag_of(key)}/" in plain or f"{flag_of(key)}," in plain, key
    assert "[a step; default: 0.0002]" in plain
    assert "The merger's; none is as the rest. [rank; default: none]" in plain
    assert "--lora-r" not in plain


def test_names_of_other_trainers_are_taken_with_their_note() -> None:
    flags, _, _ = _run("--lora-r", "8", "--learning_rate", "1e-4", "--bf16", "--lora_target", "q_proj,v_proj")
    resolved = resolve_recipe(None, flags)
    assert (resolved.recipe.r, resolved.recipe.lr, resolved.recipe.precision) == (8, 1e-4, "bf16")
    assert resolved.recipe.targets == "q_proj,v_proj"
    assert len(resolved.notes) == 4


def test_an_unknown_flag_is_an_error_with_a_near_one() -> None:
    _, _, text = _run("--learnig-rate", "1")
    assert "No such option" in text and "--learning-rate" in text


def test_the_flags_bring_no_torch() -> None:
    """So that help answers at once."""
    code = "import sys, training.recipe.flags as f; f.recipe_parameters(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
