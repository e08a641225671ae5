"""The sample adapters: each sits where it says, stays small, and does what the base cannot."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer

from base.pocket import CHECKPOINT
from base.pocket.recipe.evaluate import load_in_4_bits
from base.pocket.recipe.scoring import score
from training.samples import ALL, BASE_NAME, SAMPLES, Sample

MAX_BYTES_IN_ALL = 6_000_000


def _weights(sample: Sample) -> dict[str, tuple[int, ...]]:
    with safe_open(str(SAMPLES / sample.name / "adapter_model.safetensors"), "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("sample", ALL, ids=lambda sample: sample.name)
def test_a_sample_sits_only_where_its_configuration_says(sample: Sample) -> None:
    config = json.loads((SAMPLES / sample.name / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (sample.rank, sample.alpha)
    assert config["base_model_name_or_path"] == BASE_NAME
    weights = _weights(sample)
    modules = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in weights}
    assert all(re.fullmatch(config["target_modules"], module) for module in modules)
    assert any("visual" in module for module in modules) == sample.trains_vision
    assert all(sample.rank in shape for shape in weights.values())


def test_the_samples_are_small() -> None:
    files = [SAMPLES / sample.name / "adapter_model.safetensors" for sample in ALL]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES_IN_ALL


def test_every_sample_does_what_the_base_cannot() -> None:
    figures = json.loads((SAMPLES / "scores.json").read_text())
    for sample in ALL:
        assert figures[sample.name]["adapter"] >= 0.95
        assert figures[sample.name]["base"] <= 0.2


@torch.no_grad()
def test_the_json_sample_answers_on_the_base_in_4_bits() -> None:
    sample = next(sample for sample in ALL if sample.name == "json")
    base = load_in_4_bits(CHECKPOINT)
    PeftModel.from_pretrained(base, str(SAMPLES / sample.name))
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert score(base, tokenizer, 1, mixture=sample.mixture, asker=sample.asker).exact >= 0.9
