from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from base.errors import BaseError
from server.commands.fit import SHAPES as SERVED_SHAPES
from server.commands.fit import language_parameters as served_parameters
from tests.support.checkpoints import make_checkpoint
from tests.training.kept import kept_by_a_layer, peak_of
from tests.training.real_shapes import skeleton
from training.plan.activations import HEAD_ROWS, Load, backward_bytes, language_layer_bytes
from training.plan.peak import WORKSPACE_BYTES, fits
from training.plan.plan import GIB, MemoryPlan, plan_memory
from training.plan.shape import KNOWN_SHAPES, BaseShape
from training.plan.time import DataSize, measured_rate, plan_time
from training.plan.weights import NF4, language_parameters, small_parameters, vision_parameters, weight_bytes
from training.recipe.recipe import PartRecipe, Recipe, Stage
from training.run.foresight import base_shape
from training.targets.targets import resolve_targets_on

THREE, SEVEN = KNOWN_SHAPES
LEAN = Recipe(micro_batch=1, accumulation=1, activation_checkpointing=True)


@pytest.mark.parametrize(("shape", "gib"), [(THREE, 5.1), (SEVEN, 9.0)], ids=["3b", "7b"])
def test_the_floors_are_at_most_the_published_ones_and_near_them(shape: BaseShape, gib: float) -> None:
    """At batch 1, 2,048 tokens and a picture of a megapixel. docs/recipes.md says where the difference comes from."""
    plan = plan_memory(shape, LEAN)
    assert 0.88 * gib < plan.total_bytes / GIB <= gib
    assert plan.floor_bytes == pytest.approx(plan.total_bytes, rel=0.01)


@pytest.mark.parametrize("shape", KNOWN_SHAPES, ids=["3b", "7b"])
def test_parameters_are_counted_to_the_last(shape: BaseShape) -> None:
    module = skeleton(shape)
    assert vision_parameters(shape) == sum(p.numel() for p in module.model.visual.parameters())
    language = sum(p.numel() for p in module.model.language_model.layers.parameters()) + shape.hidden
    assert language_parameters(shape) + small_parameters(shape) == language
    served = next(known for known in SERVED_SHAPES if known.name == shape.name)
    assert language_parameters(shape) == served_parameters(served)


def test_weights_are_what_the_page_of_floors_says() -> None:
    """1.431 and 3.366 GB of NF4; 0.622 and 1.090 GB a table of the vocabulary."""
    for shape, nf4, table in ((THREE, 1.431, 0.622), (SEVEN, 3.366, 1.090 * 2)):
        parts = weight_bytes(shape, 2, is_four_bit=True)
        assert language_parameters(shape) * NF4 / 1e9 == pytest.approx(nf4, abs=6e-4)
        assert parts["embeddings and head"] / 1e9 == pytest.approx(table, abs=6e-4)


@pytest.mark.parametrize("shape", KNOWN_SHAPES, ids=["3b", "7b"])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(dropout=0.0),
        Recipe(preset=("attention",)),
        Recipe(preset=("qv",), r=64),
        Recipe(r=128),
    ],
    ids=["language", "no dropout", "attention", "qv r64", "r128"],
)
def test_what_a_layer_keeps_is_what_autograd_saves_at_the_real_shapes(
    shape: BaseShape, recipe: Recipe
) -> None:
    """But for the scaled B, which our own layer makes and stock PEFT does not."""
    load = Load(tokens=2048, image_tokens=0, labels=0, element=2, mask=4)
    layer = [t for t in resolve_targets_on(recipe, shape.sites()).modules if ".layers.1." in t.name]
    scaled = sum(target.out_features * target.r * 4 for target in layer)
    planned = language_layer_bytes(shape, layer, recipe, load) - scaled
    saved = kept_by_a_layer(shape, recipe, 2048, torch.bfloat16)
    assert planned == pytest.approx(saved, rel=0.005)


@pytest.mark.parametrize("shape", KNOWN_SHAPES, ids=["3b", "7b"])
@pytest.mark.parametrize("dropout", [0.05, 0.0])
@pytest.mark.parametrize("is_twice", [True, False], ids=["checkpointing", "kept"])
def test_the_peak_of_a_backward_pass_is_that_of_its_live_tensors_at_the_real_shapes(
    shape: BaseShape, dropout: float, is_twice: bool
) -> None:
    """In three layers; nothing is unpacked there, and the embeddings are not counted."""
    recipe = Recipe(dropout=dropout, activation_checkpointing=is_twice)
    load = Load(tokens=2048, image_tokens=0, labels=0, element=2, mask=4)
    layer = [t for t in resolve_targets_on(recipe, shape.sites()).modules if ".layers.1." in t.name]
    kept = language_layer_bytes(shape, layer, recipe, load)
    held = 2 * 2048 * 2 * shape.hidden + kept if is_twice else 3 * kept
    planned = held + 2048 * 6 * shape.hidden + backward_bytes(shape.hidden, shape.mlp, 0, 2048, recipe, load)
    assert planned == pytest.approx(peak_of(shape, recipe, 2048, 3), rel=0.06)


def _total(recipe: Recipe, **row: int) -> int:
    return plan_memory(
        THREE, recipe, max_tokens=row.get("tokens", 1024), image_tokens=row.get("image", 512)
    ).total_bytes


@pytest.mark.parametrize(
    "less",
    [
        lambda r: replace(r, r=8),
        lambda r: replace(r, preset=("attention",)),
        lambda r: replace(r, optimizer="paged_adamw_8bit"),
        lambda r: replace(r, optimizer="adafactor"),
        lambda r: replace(r, activation_checkpointing=True),
        lambda r: replace(r, micro_batch=1),
        lambda r: replace(r, dropout=0.0),
    ],
)
def test_every_saving_saves(less: Callable[[Recipe], Recipe]) -> None:
    assert _total(less(Recipe(micro_batch=2))) < _total(Recipe(micro_batch=2))


def test_a_tower_that_learns_keeps_its_blocks_and_a_frozen_one_nothing() -> None:
    frozen = plan_memory(THREE, LEAN, image_tokens=1275)
    learning = plan_memory(THREE, replace(LEAN, preset=("language", "vision")), image_tokens=1275)
    merger = plan_memory(THREE, replace(LEAN, preset=("language", "merger")), image_tokens=1275)
    assert frozen.parts["kept for pictures"] == 0
    assert 0 < merger.parts["kept for pictures"] < learning.parts["kept for pictures"]


def test_the_head_costs_its_labelled_rows_and_never_more_than_a_piece() -> None:
    """All 2,048 rows in one go would take 3.5 GiB."""
    short = replace(LEAN, preset=("qv",), dropout=0.0)
    few = plan_memory(THREE, short, max_tokens=64, image_tokens=0, num_labels=8)
    many = plan_memory(THREE, short, max_tokens=64, image_tokens=0, num_labels=2048)
    assert few.total_bytes < many.total_bytes
    assert many.parts["at work"] == HEAD_ROWS * 3 * 4 * THREE.vocab + WORKSPACE_BYTES


def test_parts_sum_up_and_json_says_the_same() -> None:
    plan = plan_memory(THREE, Recipe(), memory_bytes=8 * GIB)
    assert sum(plan.parts.values()) == plan.total_bytes
    content = json.loads(json.dumps(plan.as_json()))
    assert content["total_bytes"] == plan.total_bytes and content["fits"] is False
    assert len(content["ladder"]) == len(plan.ladder)
    assert "does not fit in 8.0 GiB" in plan.text()


def _ladder(
    recipe: Recipe, gib: float, shape: BaseShape = THREE, image_tokens: int | None = None
) -> MemoryPlan:
    return plan_memory(shape, recipe, memory_bytes=int(gib * GIB), image_tokens=image_tokens)


def test_the_ladder_ends_with_the_first_change_that_fits_and_its_recipe_does() -> None:
    plan = _ladder(Recipe(preset=("all",), r=64, alpha=64.0), 6.2, image_tokens=256)
    *others, last = plan.ladder
    assert last.does_fit and not any(step.does_fit for step in others)
    totals = [step.total_bytes for step in plan.ladder]
    assert totals == sorted(totals, reverse=True)
    again = _ladder(last.recipe, 6.2, image_tokens=256)
    assert fits(last.total_bytes, int(6.2 * GIB))
    assert again.does_fit and again.ladder == ()


def test_harmless_changes_come_first_and_keep_the_step_and_the_scale() -> None:
    plan = _ladder(Recipe(r=64, alpha=32.0, merger=PartRecipe(r=16), preset=("language", "merger")), 4.6)
    assert [step.change.split()[0] for step in plan.ladder][:4] == [
        "micro_batch", "micro_batch", "activation_checkpointing", "optimizer",
    ]  # fmt: skip
    for step in plan.ladder:
        assert step.recipe.rows_per_step == 16
        assert step.recipe.alpha / step.recipe.r == 0.5


def test_what_cannot_fit_says_so() -> None:
    plan = _ladder(Recipe(), 2.0, SEVEN)
    assert not plan.ladder[-1].does_fit
    assert "take a smaller base or a larger device" in plan.text()


def test_on_a_cpu_everything_is_in_fp32() -> None:
    plan = plan_memory(base_shape(Recipe(base="pocket")), Recipe(), device="cpu")
    assert plan.total_bytes < 4 * GIB
    half = plan_memory(THREE, Recipe(precision="bf16"), device="cpu")
    full = plan_memory(THREE, Recipe(), device="cpu")
    assert full.parts["language weights"] > 7 * half.parts["language weights"]


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-instruct"]
)
def test_published_bases_are_known_without_a_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert base_shape(Recipe(base=name)) == THREE


def test_a_folder_and_the_embedded_base_are_read_from_their_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path / "qwen2.5-vl-3b", hidden=128, layers=3, mlp=192)
    monkeypatch.chdir(tmp_path)  # where the published name is a folder's
    shape = base_shape(Recipe(base="qwen2.5-vl-3b"))
    assert (shape.hidden, shape.layers, shape.mlp) == (128, 3, 192)
    assert base_shape(Recipe(base="pocket")).hidden > 0
    with pytest.raises(BaseError, match="nothing"):
        base_shape(Recipe(base=str(tmp_path / "nothing")))


def test_time_counts_steps_tokens_and_work() -> None:
    data = DataSize(rows=1000, tokens=500, image_tokens=0)
    plan = plan_time(THREE, Recipe(epochs=2), data, flops_per_s=1e14)
    assert (plan.steps, plan.tokens) == (126, 1_000_000)
    assert plan.flops == pytest.approx(4 * language_parameters(THREE) * 1e6, rel=0.2)
    assert plan.seconds == pytest.approx(plan.flops / 4e13)
    assert "126 steps, 1,000,000 tokens" in plan.text()


def test_twice_computed_layers_and_learning_towers_take_longer_and_kept_pictures_less() -> None:
    data = DataSize(rows=100, tokens=1500, image_tokens=1200)
    plain = plan_time(THREE, Recipe(epochs=4), data).flops
    assert plan_time(THREE, Recipe(epochs=4, activation_checkpointing=True), data).flops > 1.3 * plain
    assert plan_time(THREE, Recipe(epochs=4, vision_cache_mib=0), data).flops > plain
    assert plan_time(THREE, Recipe(epochs=4, preset=("all",)), data).flops > plain
    staged = Recipe(stages=(Stage(parts=("language",), epochs=1), Stage(parts=("language",), epochs=3)))
    assert plan_time(THREE, staged, data).tokens == plan_time(THREE, Recipe(epochs=4), data).tokens


def test_the_machines_rate_is_a_positive_number() -> None:
    assert measured_rate(side=64) > 0
