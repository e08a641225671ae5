from __future__ import annotations

import re
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from adapters.sites import discover_sites
from tests.support.packages import tiny_qwen
from tests.training.real_shapes import new_skeleton, skeleton
from training.plan.shape import KNOWN_SHAPES, BaseShape, shape_of
from training.recipe.recipe import PartRecipe, Preset, Recipe, Stage
from training.targets.targets import TargetsError, resolve_targets, resolve_targets_on

THREE, SEVEN = KNOWN_SHAPES
SEVEN_NAMES = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@pytest.mark.parametrize("shape", KNOWN_SHAPES, ids=["3b", "7b"])
def test_the_shapes_name_the_modules_that_transformers_builds(shape: BaseShape) -> None:
    module = skeleton(shape)
    assert shape.sites() == discover_sites(module)
    assert shape_of(module.config, shape.name) == shape


@pytest.mark.parametrize(
    ("preset", "three", "seven"),
    [
        (("language",), {"language": 252}, {"language": 196}),
        (("attention",), {"language": 144}, {"language": 112}),
        (("qv",), {"language": 72}, {"language": 56}),
        (("merger",), {"merger": 2}, {"merger": 2}),
        (("vision",), {"vision": 160}, {"vision": 160}),
        (("language", "merger"), {"language": 252, "merger": 2}, {"language": 196, "merger": 2}),
        (("qv", "merger", "attention"), {"language": 144, "merger": 2}, {"language": 112, "merger": 2}),
        (
            ("all",),
            {"language": 252, "vision": 160, "merger": 2},
            {"language": 196, "vision": 160, "merger": 2},
        ),
    ],
)
def test_presets_resolve_to_the_published_counts(
    preset: tuple[Preset, ...], three: dict[str, int], seven: dict[str, int]
) -> None:
    assert resolve_targets(Recipe(preset=preset), skeleton(THREE)).counts() == three
    assert resolve_targets(Recipe(preset=preset), skeleton(SEVEN)).counts() == seven


def _older(name: str) -> str:
    """As transformers up to 4.51 named the same module."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(preset=("all",)),
        Recipe(preset=("qv", "merger")),
        Recipe(targets=r"model\.language_model\.layers\.(1\d|3)\.(self_attn\.q_proj|mlp\.up_proj)"),
        Recipe(targets=r"model\.visual\.merger\.mlp\.2"),
        Recipe(targets=r"model\.(visual\.blocks\.3\.attn\.qkv|language_model\.layers\.1\.mlp\.down_proj)"),
    ],
)
def test_the_pattern_matches_exactly_the_modules_in_every_layout(recipe: Recipe) -> None:
    sites = SEVEN.sites()
    targets = resolve_targets_on(recipe, sites)
    named = {target.name for target in targets.modules}
    assert {name for name in sites if re.fullmatch(targets.pattern, name)} == named
    assert {name for name in sites if re.fullmatch(targets.pattern, _older(name))} == named
    assert {name for name in sites if re.fullmatch(targets.pattern, f"{name}.lora_A")} == set()


def test_peft_puts_its_layers_on_exactly_these_modules_with_these_ranks_and_scales() -> None:
    recipe = Recipe(
        preset=("language", "merger"),
        merger=PartRecipe(r=8, alpha=16.0),
        rank_pattern={"q_proj": 3, "layers.1.mlp.down_proj": 20},
        alpha_pattern={"layers.11.self_attn.v_proj": 60.0},
    )
    module = new_skeleton(replace(SEVEN, layers=12))
    targets = resolve_targets(recipe, module)
    config = LoraConfig(
        r=targets.r,
        lora_alpha=targets.alpha,  # type: ignore[arg-type]
        target_modules=targets.pattern,
        rank_pattern=targets.rank_pattern,
        alpha_pattern=targets.alpha_pattern,
    )
    wrapped = get_peft_model(module, config)
    found = {
        name.removeprefix("base_model.model."): (child.r["default"], child.lora_alpha["default"])
        for name, child in wrapped.named_modules()
        if isinstance(child, LoraLayer)
    }
    assert found == {target.name: (target.r, target.alpha) for target in targets.modules}
    assert found["model.language_model.layers.1.mlp.down_proj"] == (20, 32.0)
    assert found["model.language_model.layers.11.mlp.down_proj"] == (16, 32.0)
    assert found["model.language_model.layers.11.self_attn.v_proj"] == (16, 60.0)
    assert found["model.visual.merger.mlp.0"] == (8, 16.0)
    trainable = sum(p.numel() for n, p in wrapped.named_parameters() if "lora_" in n)
    assert trainable == targets.num_parameters


def test_targets_are_the_same_after_peft_wrapped_the_linears() -> None:
    module = tiny_qwen()
    before = resolve_targets(Recipe(preset=("all",)), module)
    get_peft_model(module, LoraConfig(r=2, target_modules=before.pattern))
    assert resolve_targets(Recipe(preset=("all",)), module) == before


def test_a_plain_list_of_seven_names_is_narrowed_to_the_language_model_and_says_so() -> None:
    targets = resolve_targets(Recipe(targets=SEVEN_NAMES), skeleton(THREE))
    assert targets.counts() == {"language": 252}
    assert targets == replace(resolve_targets(Recipe(), skeleton(THREE)), notes=targets.notes)
    assert "gate_proj, up_proj, down_proj are also names of 96 linears of the vision tower" in targets.text()


def test_names_that_only_the_language_model_has_need_no_explanation() -> None:
    targets = resolve_targets_on(Recipe(targets="q_proj, v_proj"), THREE.sites())
    assert targets.counts() == {"language": 72} and not targets.notes


def test_whole_names_in_a_list_are_taken_at_their_word_in_old_and_new_layouts() -> None:
    names = "model.visual.blocks.0.mlp.up_proj,model.layers.0.self_attn.q_proj,merger.mlp.0"
    assert resolve_targets_on(Recipe(targets=names), THREE.sites()).counts() == {
        "language": 1,
        "vision": 1,
        "merger": 1,
    }


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe(targets="qkv,proj,gate_proj,up_proj"), "the language model and the vision tower both have"),
        (Recipe(targets=r".*\.(gate|up|down)_proj"), "also matches 96 modules outside the language model"),
        (Recipe(targets=r".*"), "also matches 162 modules outside"),
        (Recipe(targets="all-linear"), "would take the vision tower"),
        (Recipe(targets="q_proj,lm_head"), "belong to the base that all adapters share"),
        (Recipe(targets="q_prj,v_proj"), "did you mean q_proj?"),
        (Recipe(targets="q_proj$(("), "no regular expression"),
        (Recipe(targets=r"layers\.0\.self_attn\.q_proj"), "must match whole names"),
        (Recipe(rank_pattern={"attn.qkv": 8}), "rank_pattern names 'attn.qkv'"),
        (Recipe(alpha_pattern={r".*q_proj": 8.0}), "expressions are not read here"),
        (Recipe(merger=PartRecipe(r=8)), "merger has values of its own"),
        (Recipe(stages=(Stage(parts=("vision",), max_steps=1),)), "stage 1 trains vision"),
    ],
)
def test_what_is_not_there_or_more_than_was_meant_is_refused(recipe: Recipe, says: str) -> None:
    with pytest.raises(TargetsError, match=re.escape(says)):
        resolve_targets_on(recipe, THREE.sites())


def test_the_number_of_trainable_numbers_is_rank_times_widths() -> None:
    """59.9 MB in 16 bits for rank 16 on all language linears of the 3B, 80.7 MB of the 7B."""
    three = resolve_targets_on(Recipe(r=16), THREE.sites())
    seven = resolve_targets_on(Recipe(r=16), SEVEN.sites())
    assert round(three.num_parameters * 2 / 1e6, 1) == 59.9
    assert round(seven.num_parameters * 2 / 1e6, 1) == 80.7
    assert resolve_targets_on(Recipe(dora=True), THREE.sites()).num_parameters > three.num_parameters
