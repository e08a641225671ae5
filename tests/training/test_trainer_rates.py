"""Rates: schedules, and the groups that show which part learns how fast."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from tests.training.loops import adapted, tiny_recipe
from training.loop.optimizers import parameter_groups
from training.loop.schedule import Shape
from training.loop.stages import plan_stages


@pytest.mark.parametrize(
    "kind", ["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
)
def test_a_schedule_is_transformers_own_after_its_rise(kind: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=4, num_training_steps=20)
    ours = Shape(kind, 20, 4)  # type: ignore[arg-type]
    for step in range(20):
        is_rising = kind != "constant" and step < 4
        expected = 3e-4 * (step + 1) / 5 if is_rising else theirs.get_last_lr()[0]
        assert 3e-4 * ours.share(step, 3e-4) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup", "polynomial", "inverse_sqrt"])
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 1), (1, 0), (2, 1), (3, 3)])
def test_no_step_of_a_run_is_without_a_rate(kind: str, num_steps: int, warmup: int) -> None:
    shape = Shape(kind, num_steps, warmup)  # type: ignore[arg-type]
    assert all(shape.share(step, 3e-4) > 0 for step in range(num_steps))


def test_groups_show_parts_and_roles_with_their_rates_and_decay() -> None:
    from training.recipe.recipe import PartRecipe

    recipe = tiny_recipe(
        preset=("all",), dora=True, lora_plus=16.0, lr=1e-3, weight_decay=0.1, merger=PartRecipe(lr=2e-3)
    )
    with adapted(recipe) as model:
        timeline = plan_stages(recipe, model.targets.parts, 3)
        groups = parameter_groups(model.trainable(), model.part_of, recipe, timeline)
        found = {(group["part"], group["role"]): (group["lr"], group["weight_decay"]) for group in groups}
        assert sum(len(group["params"]) for group in groups) == len(model.trainable())
    assert found == {
        (part, role): (rate * (16 if role == "B" else 1), 0.0 if role == "magnitude" else 0.1)
        for part, rate in (("language", 1e-3), ("vision", 1e-3), ("merger", 2e-3))
        for role in ("A", "B", "magnitude")
    }
