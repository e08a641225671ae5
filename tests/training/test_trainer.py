"""train: what a step is, what is told of it, and when it stops."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.learnable import base_state
from tests.training.loops import Listener, adapted, examples, mixed, run, tiny_base, tiny_recipe, words
from training.data.labels import Labeller
from training.loop.observer import NonFiniteLoss
from training.loop.optimizers import OptimizerUnavailable
from training.loop.ranks import Ranks
from training.loop.reporters import ReporterMissing, check_reporters
from training.loop.runlog import read_log
from training.loop.step import GradientStep, StepInput
from training.loop.trainer import train
from training.model.collator import Collator
from training.model.model import AdaptedBase
from training.recipe.recipe import Recipe


def same(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)  # type: ignore[arg-type]


def gradients(model: AdaptedBase, recipe: Recipe, groups: list[list[int]]) -> dict[str, Tensor]:
    """Of one step whose micro-batches are ``groups`` of the eight rows."""
    rows = examples(mixed(8))
    collate = Collator(Labeller(tiny_base().processor))
    batches = tuple(collate([rows[index] for index in group]) for group in groups)
    model.zero_grad(set_to_none=True)
    GradientStep(model, recipe, Ranks()).run(StepInput(0, batches, tuple(range(len(batches)))))
    return {name: each.grad.clone() for name, each in model.trainable().items() if each.grad is not None}


def test_eight_micro_batches_have_the_gradient_of_the_one_big_batch() -> None:
    recipe = tiny_recipe(preset=("all",), dropout=0.0, max_grad_norm=0.0)
    with adapted(recipe) as model:
        for name, parameter in model.trainable().items():  # B = 0 would leave A without any
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        whole = gradients(model, recipe, [list(range(8))])
        apart = gradients(model, recipe, [[index] for index in range(8)])
        mean_of_means = {name: torch.zeros_like(each) for name, each in whole.items()}
        for index in range(8):
            for name, each in gradients(model, recipe, [[index]]).items():
                mean_of_means[name] += each / 8
    assert apart.keys() == whole.keys()
    scale = max(float(each.abs().max()) for each in whole.values())
    for name, each in whole.items():
        torch.testing.assert_close(apart[name], each, rtol=1e-5, atol=1e-5 * scale)
    off = max(float((mean_of_means[name] - each).abs().max()) for name, each in whole.items())
    assert (
        off > 0.01 * scale
    )  # the rows do have answers of different lengths: a mean of means is another gradient


def test_the_loss_of_a_step_is_the_mean_over_its_labels(tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=1, micro_batch=1, accumulation=12, dropout=0.0)
    with adapted(recipe) as model:
        rows = examples(words(12))
        batch = Collator(Labeller(tiny_base().processor))([rows[index] for index in range(12)])
        mean = float(model.label_losses(batch).mean())
    report = run(tmp_path, recipe).heard.steps[0]
    assert report.loss == pytest.approx(mean, rel=1e-5)
    assert report.num_labels == batch.num_labels and report.num_tokens == batch.num_tokens


def test_training_learns_and_tells_of_each_step_once(tmp_path: Path) -> None:
    made = run(tmp_path, tiny_recipe(epochs=6), held_out=words(3))
    assert made.outcome.ended == "finished" and made.outcome.num_steps == 18
    assert [report.step for report in made.heard.steps] == list(range(1, 19))
    assert made.heard.steps[-1].loss < 0.6 * made.heard.steps[0].loss
    assert [report.step for report in made.heard.evals] == [3, 6, 9, 12, 15, 18]
    told = list(read_log(tmp_path / "log.jsonl"))
    assert [event["step"] for event in told if event["event"] == "step"] == list(range(1, 19))
    assert [event["step"] for event in told if event["event"] == "eval"] == [3, 6, 9, 12, 15, 18]
    assert made.outcome.num_tokens == sum(report.num_tokens for report in made.heard.steps)
    assert made.heard.steps[5].seconds_left > 0 == made.heard.steps[-1].seconds_left
    assert all(report.memory_bytes > 0 and report.tokens_per_s > 0 for report in made.heard.steps)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_of_the_log_means_over_the_labels_since_the_last(tmp_path: Path) -> None:
    made = run(tmp_path, tiny_recipe(log_steps=4))
    lines = [event for event in read_log(tmp_path / "log.jsonl") if event["event"] == "step"]
    assert [line["step"] for line in lines] == [4, 6]
    four = made.heard.steps[:4]
    mean = sum(step.loss * step.num_labels for step in four) / sum(step.num_labels for step in four)
    assert lines[0]["loss"] == pytest.approx(mean)


def test_evaluation_leaves_the_adapter_and_the_callers_random_streams_as_they_would_be(
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe(preset=("all",), eval_steps=1)
    plain = run(tmp_path / "a", recipe, mixed(12))

    def draws(step: int) -> dict[str, float]:
        return {"drawn": float(torch.rand(()))}

    torch.manual_seed(5)
    looked_at = run(tmp_path / "b", recipe, mixed(12), mixed(5), hook=draws)
    assert len(looked_at.heard.evals) == 6
    assert same(plain.state, looked_at.state)


def test_the_hook_may_have_the_bare_base_and_the_base_is_bitwise_what_it_was(tmp_path: Path) -> None:
    base = tiny_base()
    before = base_state(base)
    recipe = tiny_recipe(preset=("all",), eval_steps=2)
    with adapted(recipe) as model:

        def hook(step: int) -> dict[str, float]:
            with model.bare():
                assert base.module.state_dict().keys() == before.keys()
                return {
                    "weights_kept": float(all(torch.equal(t, before[n]) for n, t in base_state(base).items()))
                }

        heard = Listener()
        train(model, examples(mixed(12)), examples(mixed(4)), recipe, tmp_path, heard, eval_hook=hook)
        assert [report.scores for report in heard.evals] == [{"weights_kept": 1.0}] * 3
        hooked = model.state()
    after = base_state(base)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert same(hooked, run(tmp_path / "plain", recipe, mixed(12)).state)


def test_held_out_loss_counts_each_label_once(tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=2, micro_batch=2)
    rows = examples(words(5))
    with adapted(recipe) as model:
        heard = Listener()
        train(model, examples(words(12)), rows, recipe, tmp_path, heard)
        batch = Collator(Labeller(tiny_base().processor))([rows[index] for index in range(5)])
        assert heard.evals[-1].loss == pytest.approx(float(model.label_losses(batch).mean()), rel=1e-5)


def test_a_loss_that_is_no_number_names_its_rows_and_changes_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(save_steps=1, micro_batch=1, accumulation=4)
    with adapted(recipe) as model:
        kept: dict[str, Tensor] = {}

        def spoil(step: int) -> None:
            if step == 2:
                kept.update(model.state())
                forward = type(model).forward

                def poisoned(self: AdaptedBase, batch: object) -> object:
                    made = forward(self, batch)  # type: ignore[arg-type]
                    if any(origin.line == 7 for origin in batch.origins):  # type: ignore[attr-defined]
                        return type(made)(made.total * math.nan, made.num_labels)
                    return made

                model.forward = poisoned.__get__(model)  # type: ignore[method-assign]

        with pytest.raises(NonFiniteLoss, match=r"the rows rows:7; the step was not taken") as raised:
            train(model, examples(words(12)), None, recipe, tmp_path, Listener(spoil))
        assert [str(origin) for origin in raised.value.origins] == ["rows:7"]
        assert raised.value.step in (3, 4, 5, 6)
        if raised.value.step == 3:
            assert same(model.state(), kept)
        assert all(torch.isfinite(each).all() for each in model.state().values())
        assert all(each.grad is None for each in model.parameters())
    last = list(read_log(tmp_path / "log.jsonl"))[-1]
    assert last["event"] == "non_finite" and last["rows"] == ["rows:7"]
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert newest.name == f"step-{raised.value.step - 1:06d}"


def test_a_gradient_that_is_no_number_names_all_rows_of_its_step(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    with adapted(recipe) as model:
        first = next(iter(model.trainable().values()))
        first.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(NonFiniteLoss) as raised:
            train(model, examples(words(12)), None, recipe, tmp_path, Listener())
    assert math.isfinite(raised.value.loss) and len(raised.value.origins) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_step_boundary_and_the_run_goes_on_from_there(
    tmp_path: Path, number: signal.Signals
) -> None:
    recipe = tiny_recipe()
    whole = run(tmp_path / "whole", recipe)
    before = signal.getsignal(number)
    cut = run(
        tmp_path / "cut",
        recipe,
        listener=Listener(lambda step: os.kill(os.getpid(), number) if step == 2 else None),
    )
    assert cut.outcome.ended == "interrupted" and cut.outcome.num_steps == 2
    assert signal.getsignal(number) == before
    rest = run(tmp_path / "cut", recipe, resume=True)
    assert rest.outcome.ended == "finished" and [report.step for report in rest.heard.steps] == [3, 4, 5, 6]
    assert same(rest.state, whole.state)
    assert rest.outcome.num_tokens == whole.outcome.num_tokens


def test_early_stopping_ends_with_the_best(tmp_path: Path) -> None:
    """Held out are rows that contradict what is learnt, so that their loss soon only rises."""
    contrary = [*words(4)]
    recipe = tiny_recipe(
        epochs=40, lr=0.05, eval_steps=1, early_stopping=3, scheduler="constant", save_steps=2
    )
    made = run(tmp_path, recipe, words(12), [row for row in mixed(8) if row.pictures] + contrary)
    losses = [report.loss for report in made.heard.evals if report.loss is not None]
    assert made.outcome.ended == "early_stopping" and made.outcome.num_steps < 120
    best = losses.index(min(losses)) + 1
    assert made.outcome.best_step == best == made.outcome.num_steps - 3
    again = run(
        tmp_path, recipe, words(12), [row for row in mixed(8) if row.pictures] + contrary, resume=True
    )
    assert again.outcome == made.outcome and same(again.state, made.state) and not again.heard.steps
    short = run(
        tmp_path / "short",
        tiny_recipe(**{**_fields(recipe), "epochs": None, "max_steps": best, "early_stopping": None}),
    )
    assert same(short.state, made.state)


def _fields(recipe: Recipe) -> dict[str, object]:
    return {name: getattr(recipe, name) for name in ("lr", "scheduler", "save_steps")}


# ---- what it is asked to use


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "sgd"])
def test_every_optimizer_learns_and_goes_on_bitwise(tmp_path: Path, optimizer: str) -> None:
    recipe = tiny_recipe(optimizer=optimizer, lr=0.5 if optimizer == "sgd" else 1e-2, max_steps=4)
    whole = run(tmp_path / "whole", recipe)
    assert whole.heard.steps[-1].loss < whole.heard.steps[0].loss
    stop = Listener(lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None)
    run(tmp_path / "cut", recipe, listener=stop)
    assert same(run(tmp_path / "cut", recipe, resume=True).state, whole.state)


def test_what_is_not_here_is_said_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ReporterMissing, match="pip install wandb"):
        check_reporters(("tensorboard", "wandb"))
    if not torch.cuda.is_available():
        with pytest.raises(OptimizerUnavailable, match="CUDA"):
            run(tmp_path, tiny_recipe(optimizer="paged_adamw_8bit"))


def test_tensorboard_gets_losses_and_rates_by_part(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    run(tmp_path, tiny_recipe(max_steps=2, report_to=("tensorboard",)), held_out=words(2))
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lr_language", "train/grad_norm", "eval/loss"} <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, tiny_recipe(max_steps=2), held_out=words(2))
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


def test_no_weight_of_the_base_is_in_a_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, tiny_recipe(max_steps=2, save_steps=2))
    (folder,) = (tmp_path / "checkpoints").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert sorted(record["files"]) == [
        "adapter.safetensors", "optimizer.json", "optimizer.safetensors", "trainer_state.json",
    ]  # fmt: skip
    from safetensors import safe_open

    for name in ("adapter.safetensors", "optimizer.safetensors"):
        with safe_open(folder / name, "pt") as file:
            assert all("lora_" in key or key.split(".")[0].isdigit() for key in file.keys())  # noqa: SIM118 (no dict)
