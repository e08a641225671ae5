from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.dataset import OnBad
from training.data.formats import Format
from training.recipe.recipe import PartRecipe, Recipe, Stage, doc_of
from training.recipe.sources import KEYS, RecipeError, recipe_as_dict, resolve_recipe
from training.recipe.values import FormatName, OnBadName


def _file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _problems(folder: Path, text: str, **flags: object) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(_file(folder, text), flags)
    return str(caught.value)


def test_without_sources_every_value_is_the_default() -> None:
    resolved = resolve_recipe(None, {})
    assert resolved.recipe == Recipe()
    assert set(resolved.origins) == set(KEYS) and set(resolved.origins.values()) == {"default"}
    assert resolved.notes == ()


def test_a_flag_wins_over_the_file_and_each_value_keeps_its_origin(tmp_path: Path) -> None:
    path = _file(
        tmp_path, "# mine\nr: 8\nlr: 2e-4\nmerger:\n  r: 4\n  lr: 0.0003\npreset: [language, merger]\n"
    )
    resolved = resolve_recipe(path, {"r": "32", "merger.lr": "5e-4", "rslora": True})
    assert resolved.recipe == Recipe(
        r=32, lr=2e-4, rslora=True, preset=("language", "merger"), merger=PartRecipe(r=4, lr=5e-4)
    )
    origins = {key: origin for key, origin in resolved.origins.items() if origin != "default"}
    assert origins == {
        "r": "flag --r",
        "lr": "recipe.yaml:3",
        "merger.r": "recipe.yaml:5",
        "merger.lr": "flag --merger.lr",
        "preset": "recipe.yaml:7",
        "rslora": "flag --rslora",
    }
    assert "r = 32  (flag --r)" in resolved.text().splitlines()


FULL = Recipe(
    name="invoice",
    data=("a.jsonl", "hf://datasets/org/name@main"),
    eval=("b.jsonl",),
    data_root=Path("pictures"),
    format=Format.OPENAI,
    columns={"question": "instruction", "yes": "no"},
    on_bad="skip",
    targets=r"model\.language_model\.layers\.\d+\.mlp\.up_proj",
    r=8,
    alpha=16.0,
    lora_plus=16.0,
    rank_pattern={"layers.0.mlp.up_proj": 4},
    alpha_pattern={"layers.0.mlp.up_proj": 8.5},
    language=PartRecipe(r=3, alpha=1e-5, lr=1e-5),
    stages=(
        Stage(parts=("language",), lr=1e-4, rates={"language": 3e-5}, max_steps=3),
        Stage(parts=("language",), epochs=0.5),
    ),
    warmup_steps=7,
    max_pixels=1003520,
    report_to=("tensorboard", "wandb"),
    gate=("exact_match >= base + 0.1",),
    early_stopping=3,
)


@pytest.mark.parametrize(
    "recipe", [Recipe(), FULL, Recipe(eval_split=0.0), Recipe(eval_split=0.0, gate=()), Recipe(max_steps=3)]
)
def test_a_recipe_goes_to_yaml_and_to_json_and_comes_back_the_same(tmp_path: Path, recipe: Recipe) -> None:
    content = recipe_as_dict(recipe)
    assert resolve_recipe(_file(tmp_path, yaml.safe_dump(content)), {}).recipe == recipe
    again = resolve_recipe(_file(tmp_path, json.dumps(content)), {})
    assert again.recipe == recipe
    assert resolve_recipe(_file(tmp_path, again.as_yaml()), {}).recipe == recipe
    assert type(again.recipe.format) is type(recipe.format)


def test_every_key_can_be_given_as_a_flags_text(tmp_path: Path) -> None:
    texts = {
        "columns": "question=instruction,yes=no",
        "rank_pattern": "layers.0.mlp.up_proj=4",
        "alpha_pattern": '{"layers.0.mlp.up_proj": 8.5}',
        "stages": json.dumps(recipe_as_dict(FULL)["stages"]),
        "data": "a.jsonl, hf://datasets/org/name@main",
        "report_to": "tensorboard,wandb",
        "gate": "exact_match >= base + 0.1",
    }
    flags = {
        key: str(value)
        for key, value, origin in resolve_recipe(
            _file(tmp_path, yaml.safe_dump(recipe_as_dict(FULL))), {}
        ).rows()
        if origin != "default" and value not in (None, (), [], {})
    }
    assert resolve_recipe(None, {**flags, "eval": "b.jsonl", **texts}).recipe == FULL


@pytest.mark.parametrize(
    ("text", "key", "value", "note"),
    [
        ("lora_r: 8", "r", 8, "lora_r is called r here"),
        ("lora_rank: 8", "r", 8, "lora_rank is called r"),
        ("lora_alpha: 64", "alpha", 64, "lora_alpha is called alpha"),
        ("lora_dropout: 0.1", "dropout", 0.1, "lora_dropout"),
        ("learning_rate: 1e-4", "lr", 1e-4, "learning_rate"),
        ("num_train_epochs: 2", "epochs", 2, "num_train_epochs"),
        ("per_device_train_batch_size: 2", "micro_batch", 2, "per_device_train_batch_size"),
        ("gradient_accumulation_steps: 8", "accumulation", 8, "gradient_accumulation_steps"),
        ("cutoff_len: 1024", "max_length", 1024, "cutoff_len"),
        ("max_seq_length: 1024", "max_length", 1024, "max_seq_length"),
        ("use_rslora: true", "rslora", True, "use_rslora"),
        ("use_dora: yes", "dora", True, "use_dora"),
        ("target_modules: [q_proj, v_proj]", "targets", "q_proj,v_proj", "target_modules is called targets"),
        ("targets: [q_proj, v_proj]", "targets", "q_proj,v_proj", None),
        ("lora_target: all", "preset", ("language",), "lora_target all is preset language"),
        ("lr_scheduler_type: linear", "scheduler", "linear", "lr_scheduler_type"),
        ("optim: adamw_torch", "optimizer", "adamw", "optim is called optimizer"),
        ("gradient_checkpointing: true", "activation_checkpointing", True, "gradient_checkpointing"),
        ("bf16: true", "precision", "bf16", "bf16 is called precision bf16"),
        ("precision: bfloat16", "precision", "bf16", "precision bfloat16 is called bf16"),
        ("fp16: false", "precision", "auto", "fp16 is left out"),
        ("bias: none", "r", 16, "bias is left out"),
        ("modules_to_save: null", "r", 16, "modules_to_save is left out"),
        ("warmup_steps: 3", "warmup_steps", 3, None),
        ("warmup_ratio: 0.1", "warmup_ratio", 0.1, None),
        ("image_max_pixels: 262144", "max_pixels", 262144, "image_max_pixels"),
        ("report_to: none", "report_to", (), "report_to"),
    ],
)
def test_names_of_other_trainers_are_read_with_a_note(
    tmp_path: Path, text: str, key: str, value: object, note: str | None
) -> None:
    resolved = resolve_recipe(_file(tmp_path, text), {})
    assert getattr(resolved.recipe, key) == value
    if note is None:
        assert resolved.notes == ()
    else:
        assert note in resolved.notes[0] and "recipe.yaml:1" in resolved.notes[0]


def test_older_names_work_inside_parts_and_as_flags() -> None:
    resolved = resolve_recipe(None, {"preset": "merger", "merger.lora_r": "4", "learning_rate": "1e-4"})
    assert resolved.recipe.merger.r == 4 and resolved.recipe.lr == 1e-4
    assert len(resolved.notes) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lerning_rate: 1e-4", "unknown key 'lerning_rate'; did you mean lr?"),
        ("alhpa: 3", "did you mean alpha?"),
        ("merger: {rank: 8, lrr: 1}", "unknown key 'merger.lrr'"),
        ("merger: 8", "merger maps r, alpha and lr to values"),
        ("r: 8\nalpha: 3\nr: 16", "recipe.yaml:3: r is given twice, first in line 1"),
        ("merger: {r: 8, r: 9}", "merger.r is given twice"),
        ("stages:\n- {parts: [merger], epochs: 1, epochs: 2}", "stages.1.epochs is given twice"),
        ("r: 8\nlora_r: 8", "lora_r is r, which is given already  (recipe.yaml:2, recipe.yaml:1)"),
        ("r: 8.5", "r holds 8.5; it is a whole number"),
        ('r: "8"', "r holds '8' (text); it is a whole number"),
        ("r: true", "r holds True; it is a whole number"),
        ("r: 0", "r is 0; it must be at least 1 (rank)"),
        ("r: 1000000", "at most 1024"),
        (f"micro_batch: {10**40}", "at most 9007199254740992"),
        ("r:", "r holds nothing; it is a whole number (rank)"),
        ("lr: .nan", "lr holds nan; it is a finite number"),
        ("lr: .inf", "it is a finite number"),
        ("lr: fast", "lr holds 'fast' (text); it is a finite number"),
        ("lr: 0", "lr is 0; it must be above 0"),
        ("lr: 2", "lr is 2; it must be at most 1"),
        ("dropout: 1", "must be below 1"),
        ("eval_split: -0.1", "at least 0"),
        ("alpha: -1", "above 0"),
        (f"seed: {'9' * 400}", "at most 4294967295"),
        (f"lr: {'9' * 400}", "it is a finite number"),
        (f"r: {'9' * 5000}", "is no YAML"),
        ("rslora: 1", "rslora holds 1; it is true or false"),
        ("preset: [langauge]", "it is one of language, attention, qv, merger, vision, all"),
        ("preset: [merger, merger]", "names one thing twice"),
        ("preset: []", "preset is empty"),
        ("format: parquet", "it is one of alpaca"),
        ("data: 3", "data holds 3; it is a list"),
        ("columns: [a]", "it maps names to values"),
        ("columns: {a: 1}", "holds 1; it is text"),
        ("rank_pattern: {q_proj: 0}", "must be at least 1"),
        ("precision: fp16", "fp16 is refused: activations of Qwen2.5-VL exceed its range of 65,504"),
        ("precision: float16", "exceed its range"),
        ("fp16: true", "exceed its range"),
        ("bias: all", "any bias but none is refused: it would change the base that all adapters share"),
        ("modules_to_save: [lm_head]", "would change the base"),
        ("init_lora_weights: pissa", "step 0 is the base"),
        ("load_in_8bit: true", "the base is in 4 bits"),
        ("freeze_vision_tower: false", "add the preset vision"),
        ("epochs: 1\nmax_steps: 3", "epochs and max_steps are both given"),
        ("warmup_ratio: 0.1\nwarmup_steps: 3", "warmup_ratio and warmup_steps are both given"),
        ("targets: q_proj\npreset: [language]", "targets and preset are both given"),
        ("eval: [a.jsonl]\neval_split: 0.2", "eval_split has no effect where eval names files"),
        ("eval_split: 0\nearly_stopping: 2", "early_stopping needs held-out rows"),
        ("eval_split: 0\ngate: [exact_match >= 0.5]", "gate needs held-out rows"),
        ("min_pixels: 4000\nmax_pixels: 3000", "min_pixels 4000 is above max_pixels 3000"),
        ("merger: {lr: 1e-4}", "merger has values of its own, but no preset reaches it"),
        ("name: ../x", "letters, digits, dot, dash"),
        ("name: base", "the base's own"),
        ("stages: [{parts: [merger], epochs: 1}]", "stage 1 trains merger, which no preset reaches"),
        ("stages: [{parts: [language]}]", "exactly one of epochs and max_steps"),
        ("stages: [{parts: [language], epochs: 1, max_steps: 1}]", "exactly one of epochs and max_steps"),
        ("stages: [{epochs: 1}]", "stage 1 names no parts"),
        ("stages: [{parts: [language], epochs: 1, lrr: 1}]", "stage 1 has the unknown key 'lrr'"),
        ("stages: [{parts: [language], epochs: 0}]", "stage 1: epochs is 0; it must be above 0"),
        ("stages: [{parts: [language], epochs: 1, rates: {merger: 1e-4}}]", "a rate for merger, which it does not"),
        ("stages: [{parts: [language], epochs: 1}]\nepochs: 2", "stages and epochs are both given"),
        (
            "preset: [language, merger]\nstages: [{parts: [merger], epochs: 1}]",
            "no stage trains language",
        ),
        ("stages: 3", "it is a list of stages"),
        ("[1, 2]", "it must map keys to values"),
        ("r: [", "is no YAML"),
        ("a: &x 3\nr: *x", "anchors and aliases"),
        ("r: !!python/object/apply:os.system ['true']", "is no YAML"),
        ("when: 2024-13-45", "is no YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_it_should_be(tmp_path: Path, text: str, says: str) -> None:
    assert says in _problems(tmp_path, text)


def test_everything_wrong_is_said_at_once_with_its_line(tmp_path: Path) -> None:
    problems = _problems(tmp_path, "r: 0\nfoo: 1\nfp16: true\n", alpha="x").splitlines()
    assert len(problems) == 4
    assert [re.findall(r"\((recipe\.yaml:\d|flag --\S+)\)", problem)[0] for problem in problems] == [
        "recipe.yaml:2", "recipe.yaml:3", "recipe.yaml:1", "flag --alpha",
    ]  # fmt: skip


def test_a_length_in_the_file_and_another_as_a_flag_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    text = _problems(tmp_path, "epochs: 2", max_steps="5")
    assert "--epochs none takes the file's away" in text
    assert "(recipe.yaml:1, flag --max-steps)" in text
    resolved = resolve_recipe(_file(tmp_path, "epochs: 2"), {"max_steps": "5", "epochs": "none"})
    assert (resolved.recipe.epochs, resolved.recipe.max_steps) == (None, 5)


def test_a_file_that_is_not_there_names_the_bundled_ones() -> None:
    with pytest.raises(RecipeError, match="there is no recipe nothing: give a file, or one of"):
        resolve_recipe(Path("nothing"), {})


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert resolve_recipe(_file(tmp_path, "# nothing yet\n"), {}).recipe == Recipe()


def test_the_names_of_formats_are_the_readers_own() -> None:
    assert set(get_args(FormatName)) == {str(known.value) for known in Format}
    assert get_args(OnBadName) == get_args(OnBad)


@pytest.mark.parametrize("owner", [Recipe, PartRecipe, Stage])
def test_every_field_says_its_unit_and_reason(owner: type) -> None:
    for field in fields(owner):
        doc = doc_of(owner, field.name)
        assert doc.unit and doc.reason.endswith("."), field.name


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted(KEYS)), value=_VALUES, is_flag=st.booleans())
def test_any_value_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: object, is_flag: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump({key: value}), encoding="utf-8")
    problem = ""
    try:
        resolved = resolve_recipe(None, {key: str(value)}) if is_flag else resolve_recipe(path, {})
    except RecipeError as error:
        problem = str(error)
    if problem:
        assert key.partition(".")[0] in problem
    else:
        assert resolved.origins[key] != "default"


OTHERS = {
    "llama_factory": """
model_name_or_path: pocket
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: rows.jsonl
template: qwen2_vl
cutoff_len: 1024
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
bf16: true
ddp_timeout: 180000000
eval_strategy: steps
""",
    "axolotl": """
base_model: pocket
processor_type: AutoProcessor
sample_packing: false
chat_template: qwen2_vl
datasets:
  - path: rows.jsonl
    type: chat_template
adapter: lora
sequence_len: 1024
lora_r: 8
gradient_accumulation_steps: 8
micro_batch_size: 1
num_epochs: 3
learning_rate: 0.0001
bf16: true
tf32: true
wandb_project:
""",
    "swift": """
model: pocket
train_type: lora
dataset: rows.jsonl
torch_dtype: bfloat16
num_train_epochs: 3
per_device_train_batch_size: 1
learning_rate: 1e-4
lora_rank: 8
target_modules: all-linear
freeze_vit: true
gradient_accumulation_steps: 8
max_length: 1024
dataloader_num_workers: 4
""",
}


def test_whole_recipes_of_other_trainers_are_read(tmp_path: Path) -> None:
    read = []
    for name, text in OTHERS.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        resolved = resolve_recipe(path, {})
        assert any("is left out" in note for note in resolved.notes)
        read.append(resolved.recipe)
    assert (read[0].data, read[0].preset, read[0].r, read[0].precision) == (
        ("rows.jsonl",),
        ("language",),
        8,
        "bf16",
    )
    assert read[0] == read[1] == read[2]
    (tmp_path / "samples.yaml").write_text("max_samples: 1000", encoding="utf-8")
    with pytest.raises(RecipeError, match="max_samples"):  # it would train on other rows
        resolve_recipe(tmp_path / "samples.yaml", {})
