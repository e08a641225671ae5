"""The sample adapters: their rows are sound, held-out ones are others, and each does what the base cannot."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer

from base.pocket import CHECKPOINT
from base.pocket.recipe.data import Mixture
from base.pocket.recipe.evaluate import load_in_4_bits
from base.pocket.recipe.scoring import score
from base.processor import Processor
from training.data.dataset import DataRules, check_data
from training.recipe.sources import resolve_recipe
from training.samples import recipe_of
from training.samples.adopt import SAMPLES, SHIPPED, adopt
from training.samples.askers import ask_for_json, ticket
from training.samples.rows import ALL, EVAL_SEED, TRAIN_SEED, write_rows

MAX_BYTES_IN_ALL = 6_000_000


# ---- rows


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_rows_of_every_sample_are_without_fault(name: str, processor: Processor, tmp_path: Path) -> None:
    train, held_out = write_rows(ALL[name], tmp_path, num_rows=12, num_eval_rows=6)
    checked = check_data([train], processor, DataRules(), eval=[held_out])
    assert (len(checked.train), len(checked.eval)) == (12, 6)
    assert all(row.pictures for row in (*checked.train, *checked.eval))
    assert all(len(row.loss) == 1 for row in checked.eval)


def test_rows_are_the_same_each_time_and_held_out_ones_are_others(tmp_path: Path) -> None:
    files = [write_rows(ALL["tickets"], tmp_path / n, num_rows=5, num_eval_rows=5) for n in "ab"]
    texts = [[path.read_text("utf-8") for path in pair] for pair in files]
    pictures = [[(path.parent / "train" / "00003.png").read_bytes() for path in pair] for pair in files]
    assert texts[0] == texts[1]
    assert pictures[0] == pictures[1]
    assert texts[0][0] != texts[0][1].replace("eval/", "train/")
    most = max(max(sample.num_rows, sample.num_eval_rows) for sample in ALL.values())
    assert abs(EVAL_SEED - TRAIN_SEED) > most


def test_a_longer_data_set_begins_with_the_shorter_one(tmp_path: Path) -> None:
    short, _ = write_rows(ALL["french"], tmp_path / "short", num_rows=3, num_eval_rows=0)
    long, _ = write_rows(ALL["french"], tmp_path / "long", num_rows=6, num_eval_rows=0)
    assert long.read_text("utf-8").startswith(short.read_text("utf-8"))


def test_a_ticket_names_the_colour_the_part_and_the_bin(tmp_path: Path) -> None:
    train, _ = write_rows(ALL["tickets"], tmp_path, num_rows=40, num_eval_rows=0)
    rows = [json.loads(line) for line in train.read_text("utf-8").splitlines()]
    tickets = [json.loads(row["messages"][-1]["content"]) for row in rows]
    assert all(list(found) == ["color", "part", "bin"] for found in tickets)
    assert {found["bin"] for found in tickets} >= {"A1", "C3"}
    assert ticket(()) == {"color": None, "part": None, "bin": None}


# ---- recipes


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_sample_has_a_recipe_for_the_embedded_base(name: str) -> None:
    recipe = resolve_recipe(recipe_of(name), {"data": ["train.jsonl"]}).recipe
    assert (recipe.name, recipe.base) == (name, "pocket")
    assert any(rule.replace(" ", "").startswith("exact_match>=0.95") for rule in recipe.gate)


# ---- what ships


def _weights(name: str) -> dict[str, tuple[int, ...]]:
    with safe_open(str(SAMPLES / name / "adapter_model.safetensors"), "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", SHIPPED)
def test_a_sample_sits_only_where_its_recipe_says(name: str) -> None:
    recipe = resolve_recipe(recipe_of(name), {"data": ["train.jsonl"]}).recipe
    config = json.loads((SAMPLES / name / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (
        recipe.r,
        recipe.alpha,
        recipe.rslora,
    )
    weights = _weights(name)
    modules = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", key) for key in weights}
    assert all(re.fullmatch(config["target_modules"], module) for module in modules)
    assert any("visual" in module for module in modules) == ("all" in recipe.preset)
    assert all(recipe.r in shape for shape in weights.values())


def test_the_samples_are_small() -> None:
    files = [SAMPLES / name / "adapter_model.safetensors" for name in SHIPPED]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES_IN_ALL


def test_every_sample_does_what_the_base_cannot() -> None:
    figures = json.loads((SAMPLES / "scores.json").read_text())
    assert sorted(figures) == sorted(SHIPPED)
    for name in SHIPPED:
        assert figures[name]["adapter"] >= 0.95
        assert figures[name]["base"] <= 0.2


@torch.no_grad()
def test_the_json_sample_answers_on_the_base_in_4_bits() -> None:
    base = load_in_4_bits(CHECKPOINT)
    PeftModel.from_pretrained(base, str(SAMPLES / "json"))
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    mixture = Mixture(num_pictures=8, num_text_rows=0, num_branches=4, max_things=1)
    assert score(base, tokenizer, 1, mixture=mixture, asker=ask_for_json).exact >= 0.9


# ---- adopting


def _run(folder: Path, *, passed: bool) -> Path:
    package = folder / ("package" if passed else "package-refused")
    package.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "lorikeet.json", "README.md"):
        (package / name).write_text(f"new {name}")
    views = {"true": 0.97, "blank": 0.1, "swapped": 0.2}
    scores = {"adapter": {"exact_match": 0.97}, "base": {"exact_match": 0.0}}
    verdict = {"scores": scores, "vision": {"adapter": {"views": {"vision_dependence_exact": views}}}}
    (folder / "scores.json").write_text(json.dumps(verdict))
    return folder


def test_a_run_s_package_is_adopted_with_its_figures(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "scores.json").write_text('{"french": {"base": 0.0, "adapter": 0.96}}')
    adopt("json", _run(tmp_path / "run", passed=True), samples)
    assert (samples / "json" / "lorikeet.json").read_text() == "new lorikeet.json"
    figures = json.loads((samples / "scores.json").read_text())
    assert figures["json"] == {"base": 0.0, "adapter": 0.97, "blank": 0.1, "swapped": 0.2}
    assert figures["french"] == {"base": 0.0, "adapter": 0.96}


def test_a_package_that_was_refused_is_not_adopted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gate"):
        adopt("json", _run(tmp_path / "run", passed=False), tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


def test_the_number_of_turns_is_the_sample_s(tmp_path: Path) -> None:
    sample = replace(ALL["json"], turns=3, system_prompts=())
    train, _ = write_rows(sample, tmp_path, num_rows=4, num_eval_rows=0)
    rows = [json.loads(line) for line in train.read_text("utf-8").splitlines()]
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] * 3 for row in rows)
