"""Stages: which parts learn when and how fast, on one count of steps."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.learnable import pictured
from tests.training.loops import Listener, adapted, examples, mixed, run, tiny_recipe
from training.loop.runlog import read_log
from training.loop.stages import StageError, Timeline, plan_stages
from training.loop.trainer import train
from training.recipe.recipe import PartRecipe, Stage

STAGED = tiny_recipe(
    preset=("language", "merger"),
    lr=1e-3,
    merger=PartRecipe(lr=4e-3),
    warmup_steps=1,
    scheduler="linear",
    stages=(
        Stage(("merger",), max_steps=4, rates={"merger": 8e-3}),
        Stage(("merger", "language"), epochs=1),
    ),
)
"""Twelve rows make three steps an epoch: four steps of the merger, three of both."""


def timeline() -> Timeline:
    return plan_stages(STAGED, ("language", "merger"), 3)


def test_steps_are_counted_through_and_each_stage_has_its_own_schedule() -> None:
    planned = timeline()
    first, second = planned.spans
    assert (first.first_step, first.end, second.first_step, second.end) == (
        0,
        4,
        4,
        7,
    ) and planned.num_steps == 7
    assert [planned.span_at(step).index for step in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [first.rate("merger", step) for step in range(4)] == pytest.approx(
        [4e-3, 8e-3, 8e-3 * 2 / 3, 8e-3 / 3]
    )
    assert [second.rate("merger", step) for step in (4, 5, 6)] == pytest.approx([2e-3, 4e-3, 2e-3])
    assert [second.rate("language", step) for step in (4, 5, 6)] == pytest.approx([5e-4, 1e-3, 5e-4])
    assert first.rate("language", 2) == 0.0


def test_each_stage_begins_a_pass_over_the_data() -> None:
    planned = timeline()
    assert [planned.epoch_at(step) for step in range(7)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip
    assert [step for step in range(7) if planned.ends_epoch(step)] == [2, 3, 6]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage(("vision",), epochs=1),), "stage 1 trains vision; this adapter has language, merger"),
        ((Stage((), epochs=1),), "stage 1 trains nothing"),
        ((Stage(("merger",), epochs=1, max_steps=2),), "not both"),
        ((Stage(("merger",)),), "not neither"),
        ((Stage(("merger",), epochs=1),), "sits on language, which no stage trains"),
    ],
)
def test_stages_that_cannot_be_gone_through_are_refused(stages: tuple[Stage, ...], message: str) -> None:
    with pytest.raises(StageError, match=message):
        plan_stages(tiny_recipe(stages=stages), ("language", "merger"), 3)


def test_resting_parts_have_no_gradient_and_do_not_change_and_rates_are_in_groups_and_log(
    tmp_path: Path,
) -> None:
    seen: list[dict[str, Tensor]] = []
    with adapted(STAGED) as model:
        names = list(model.trainable())
        is_language = {name: model.part_of(name) == "language" for name in names}
        parameters = dict(model.named_parameters())
        seen.append({name: parameters[name].detach().clone() for name in names})
        learning: list[frozenset[str]] = []

        def look(step: int) -> None:
            seen.append({name: parameters[name].detach().clone() for name in names})
            learning.append(model.learning)
            if step <= 4:
                assert all(parameters[name].grad is None for name in names if is_language[name])

        train(model, examples(pictured(12)), None, STAGED, tmp_path, Listener(look))
    for step in range(1, 8):
        before, after = seen[step - 1], seen[step]
        moved = {is_language[name] for name in names if not torch.equal(before[name], after[name])}
        assert moved == ({False} if step <= 4 else {False, True})
    assert learning == [frozenset({"merger"})] * 4 + [frozenset({"merger", "language"})] * 3
    told = [event for event in read_log(tmp_path / "log.jsonl") if event["event"] == "step"]
    assert [event["stage"] for event in told] == [0, 0, 0, 0, 1, 1, 1]
    rates = [event["lr"] for event in told]
    assert rates[1] == pytest.approx({"language": 0.0, "merger": 8e-3})
    assert rates[5] == pytest.approx({"language": 1e-3, "merger": 4e-3})


@pytest.mark.parametrize("cut_after", [2, 4, 5])
def test_a_run_goes_on_inside_any_stage(tmp_path: Path, cut_after: int) -> None:
    whole = run(tmp_path / "whole", STAGED, mixed(12))

    def stop(step: int) -> None:
        if step == cut_after:
            os.kill(os.getpid(), signal.SIGINT)

    cut = run(tmp_path / "cut", STAGED, mixed(12), listener=Listener(stop))
    assert cut.outcome.num_steps == cut_after
    rest = run(tmp_path / "cut", STAGED, mixed(12), resume=True)
    assert [step.stage for step in rest.heard.steps] == [0, 0, 0, 0, 1, 1, 1][cut_after:]
    assert all(torch.equal(rest.state[name], whole.state[name]) for name in whole.state)  # type: ignore[arg-type]
