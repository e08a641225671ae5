from __future__ import annotations

import pytest

from training.recipe.linter import Level, advise, num_steps
from training.recipe.recipe import PartRecipe, Recipe, Stage


@pytest.mark.parametrize(
    ("recipe", "rows", "level", "key", "says"),
    [
        (Recipe(r=64, alpha=16.0), None, "note", "alpha", "scale of 0.25: cautious"),
        (Recipe(r=128, alpha=16.0), None, "warning", "alpha", "below 0.25 the adapter hardly acts"),
        (
            Recipe(r=8, alpha=32.0),
            None,
            "note",
            "alpha",
            "scale of 4: stronger than the usual 2, and in use at r 8",
        ),
        (Recipe(r=8, alpha=64.0), None, "warning", "alpha", "above 4 learning becomes unstable"),
        (Recipe(preset=("qv",)), None, "warning", "preset", "q and v only"),
        (Recipe(targets="v_proj, q_proj"), None, "warning", "targets", "q and v only"),
        (Recipe(precision="fp16"), None, "error", "precision", "exceed its range of 65,504"),  # type: ignore[arg-type]
        (Recipe(epochs=2, max_steps=5), None, "error", "epochs", "epochs and max_steps are both given"),
        (Recipe(r=128, alpha=256.0), None, "warning", "r", "r 128 is rarely worth it"),
        (Recipe(r=64, alpha=64.0), 500, "note", "r", "r 64 for 500 rows"),
        (
            Recipe(dropout=0.0),
            500,
            "note",
            "dropout",
            "0.1 to 0.3 suits under 1,000 rows; little data overfits",
        ),
        (Recipe(dropout=0.2), 5000, "note", "dropout", "0.05 to 0.1 suits 1,000 to 10,000 rows"),
        (Recipe(dropout=0.1), 50_000, "note", "dropout", "0 to 0.05 suits over 10,000 rows"),
        (Recipe(lr=2e-3), None, "warning", "lr", "diverge"),
        (Recipe(lr=2e-5), None, "note", "lr", "LoRA wants 0.0001 to 0.0005"),
        (
            Recipe(preset=("merger",), merger=PartRecipe(r=8)),
            None,
            "note",
            "merger.alpha",
            "alpha 32 / r with r 8 is a scale of 4",
        ),
        (
            Recipe(preset=("language", "merger"), merger=PartRecipe(lr=1e-4)),
            None,
            "note",
            "merger.lr",
            "wants somewhat more",
        ),
        (Recipe(preset=("all",)), 200, "warning", "preset", "vision with 200 rows"),
        (Recipe(epochs=30), 1000, "warning", "epochs", "learnt by heart"),
        (Recipe(), 10, "warning", "epochs", "10 rows in steps of 16 make 3 steps"),
        (Recipe(), 10, "warning", "accumulation", "a step of 16 rows holds all 10"),
        (Recipe(warmup_steps=300), 1000, "error", "warmup_steps", "never reach its peak"),
        (Recipe(max_pixels=1_605_632), None, "warning", "max_pixels", "2048 tokens a picture"),
        (Recipe(lora_plus=64.0), None, "warning", "lora_plus", "its authors use 16"),
        (Recipe(scheduler="constant", warmup_steps=3), None, "warning", "scheduler", "constant_with_warmup"),
        (
            Recipe(rslora=True, r=64, alpha=128.0),
            None,
            "warning",
            "alpha",
            "with rsLoRA take alpha near sqrt(r)",
        ),
        (
            Recipe(stages=(Stage(parts=("language",), lr=5e-3, epochs=1),)),
            None,
            "warning",
            "stages.1.language",
            "diverge",
        ),
    ],
)
def test_advice_names_the_value_and_the_reason(
    recipe: Recipe, rows: int | None, level: Level, key: str, says: str
) -> None:
    found = [advice for advice in advise(recipe, rows) if advice.key == key and says in advice.text]
    assert [advice.level for advice in found] == [level]


def test_the_defaults_are_beyond_reproach() -> None:
    assert advise(Recipe()) == ()
    assert advise(Recipe(), 5000) == ()


def test_errors_come_first() -> None:
    levels = [
        advice.level for advice in advise(Recipe(r=64, alpha=4.0, epochs=1, max_steps=2, dora=True), 500)
    ]
    assert levels == sorted(levels, key=["error", "warning", "note"].index) and levels[0] == "error"


def test_steps_are_counted_over_stages() -> None:
    assert num_steps(Recipe(), 1000) == 189
    assert num_steps(Recipe(max_steps=7), 1000) == 7
    two = (Stage(parts=("merger",), max_steps=5), Stage(parts=("language",), epochs=0.5))
    assert num_steps(Recipe(stages=two), 1000) == 5 + 32
