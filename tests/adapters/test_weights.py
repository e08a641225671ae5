from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear

from adapters.manifest import parse_manifest
from adapters.sites import discover_sites
from adapters.validation import Limits, check_package
from adapters.weights import AdapterWeights, load_weights
from tests.support.packages import LAYOUTS, make_package, peft_adapter, tiny_qwen, tiny_sites

LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
VISION = ["qkv", "attn.proj", "merger.mlp.0", "merger.mlp.2"]

PEFT_CASES: dict[str, LoraConfig] = {
    "plain": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "all language linears": LoraConfig(r=3, lora_alpha=7, target_modules=[*LANGUAGE, "gate_proj"]),
    "rslora": LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=LANGUAGE),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=LANGUAGE,
        rank_pattern={
            "v_proj": 2,
            "layers.1.self_attn.q_proj": 6,
            "^model.language_model.layers.0.self_attn.k_proj": 1,
        },
        alpha_pattern={"layers.0.self_attn.v_proj": 32, "v_proj": 3, r"mlp\.up_proj": 1},
    ),
    "rslora with patterns": LoraConfig(
        r=4, use_rslora=True, target_modules=LANGUAGE, rank_pattern={"o_proj": 9}, alpha_pattern={"o_proj": 5}
    ),
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "down_proj", "attn.proj"]),
    "vision and merger": LoraConfig(r=5, lora_alpha=9, target_modules=VISION),
    "one regular expression": LoraConfig(
        r=4, target_modules=r".*(visual\.blocks|language_model).*(gate|up)_proj"
    ),
    "some layers": LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1]),
    "orthogonal": LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=["q_proj"]),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_a_package_made_by_peft_loads_with_peft_s_own_delta(case: str, tmp_path: Path) -> None:
    model = tiny_qwen()
    sites = discover_sites(model)
    peft_adapter(model, PEFT_CASES[case], tmp_path)

    report = check_package(tmp_path, sites, Limits(), ["anything"])
    weights = load_weights(tmp_path, sites)

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    assert set(weights.sites) == set(layers)
    assert report.num_sites == len(layers)
    for name, layer in layers.items():
        ours = weights.sites[name]
        torch.testing.assert_close(ours.b @ ours.a, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
        assert ours.a.shape[0] == layer.r["default"]
        if report.kind == "dora":
            magnitude = layer.lora_magnitude_vector["default"].get_parameter("weight")
            assert ours.magnitude is not None
            assert torch.equal(ours.magnitude, magnitude)
        else:
            assert ours.magnitude is None


def _equal(left: AdapterWeights, right: AdapterWeights) -> bool:
    return left.sites.keys() == right.sites.keys() and all(
        torch.equal(left.sites[name].a, right.sites[name].a)
        and torch.equal(left.sites[name].b, right.sites[name].b)
        for name in left.sites
    )


@pytest.mark.parametrize("suffix", ["", ".default"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_layout_loads_the_same_weights_under_the_same_digests(
    layout: str, suffix: str, tmp_path: Path
) -> None:
    targets = ("q_proj", "down_proj", "attn.qkv", "merger.mlp.0")
    pattern = {"layers.1.self_attn.q_proj": 2}
    sites = tiny_sites()
    wanted = make_package(tmp_path / "today", sites, targets=targets, alpha_pattern=pattern)
    spelled = make_package(
        tmp_path / "other", sites, targets=targets, layout=layout, suffix=suffix, alpha_pattern=pattern
    )

    first = check_package(wanted, sites, Limits(), [])
    second = check_package(spelled, sites, Limits(), [])

    assert _equal(load_weights(wanted, sites), load_weights(spelled, sites))
    assert (first.language_digest, first.vision_digest) == (second.language_digest, second.vision_digest)
    assert first.parts == second.parts == ("language", "vision", "merger")


def test_patterns_and_targets_may_speak_the_old_layout_s_full_names(tmp_path: Path) -> None:
    sites = tiny_sites()
    old = "model.layers.0.self_attn.q_proj"
    folder = make_package(
        tmp_path,
        sites,
        targets=("q_proj",),
        layout="before_4_52",
        target_modules=[old, "model.layers.1.self_attn.q_proj"],
        alpha_pattern={f"^{old}": 400},
    )
    check_package(folder, sites, Limits(), [])
    weights = load_weights(folder, sites)
    plain = load_weights(make_package(tmp_path / "plain", sites, targets=("q_proj",)), sites)
    first, second = (f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
    torch.testing.assert_close(weights.sites[first].b, plain.sites[first].b * 50)
    assert torch.equal(weights.sites[second].b, plain.sites[second].b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_types_load_as_exact_fp32_with_the_scale_in_b(dtype: torch.dtype, tmp_path: Path) -> None:
    sites = tiny_sites()
    name = "model.language_model.layers.0.self_attn.q_proj"
    folder = make_package(tmp_path, sites, dtype=dtype, rank=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 32, generator=generator).to(dtype).float()
    b = torch.randn(32, 4, generator=generator).to(dtype).float() * 2
    loaded = load_weights(folder, sites)
    assert torch.equal(loaded.sites[name].a, a)
    assert torch.equal(loaded.sites[name].b, b)
    assert loaded.num_bytes == sum(
        4 * 4 * (site.in_features + site.out_features) for site in map(sites.get, loaded.sites) if site
    )
    assert loaded.max_rank == 4


def test_sites_that_add_exactly_nothing_are_left_out(tmp_path: Path) -> None:
    """A frozen tower's B stays zero: such an adapter must share image embeddings with the base."""
    sites = tiny_sites()
    folder = make_package(tmp_path, sites, targets=("q_proj", "attn.qkv"), zeroed=("visual",))
    report = check_package(folder, sites, Limits(), [])
    assert report.parts == ("language",)
    assert report.vision_digest == ""
    assert all("visual" not in name for name in load_weights(folder, sites).sites)


def test_digests_of_halves_follow_their_own_half_alone(tmp_path: Path) -> None:
    sites = tiny_sites()
    both = check_package(
        make_package(tmp_path / "a", sites, targets=("attn.qkv", "q_proj")), sites, Limits(), []
    )
    vision = check_package(
        make_package(tmp_path / "b", sites, targets=("attn.qkv",), seed=9), sites, Limits(), []
    )
    same_with_other_scale = check_package(
        make_package(tmp_path / "c", sites, targets=("attn.qkv",), seed=9, lora_alpha=80), sites, Limits(), []
    )
    assert both.language_digest
    assert both.vision_digest
    assert vision.language_digest == ""
    assert vision.vision_digest != same_with_other_scale.vision_digest


def test_patterns_in_old_names_leave_a_package_in_today_s_layout_alone_as_in_peft(tmp_path: Path) -> None:
    model = tiny_qwen()
    sites = discover_sites(model)
    pattern = {"model.layers.0.self_attn.q_proj": 400}
    make_package(tmp_path, sites, targets=("q_proj",), target_modules=["q_proj"], alpha_pattern=pattern)
    PeftModel.from_pretrained(model, str(tmp_path))
    name = "model.language_model.layers.0.self_attn.q_proj"
    ours, layer = load_weights(tmp_path, sites).sites[name], model.get_submodule(name)
    assert isinstance(layer, LoraLinear)
    torch.testing.assert_close(ours.b @ ours.a, layer.get_delta_weight("default"))


def test_the_first_pattern_of_the_file_wins_as_in_peft() -> None:
    manifest = parse_manifest(
        b'{"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 2, "layers.0.q_proj": 4}}'
    )
    assert [rank for _, rank in manifest.rank_pattern] == [2, 4]
