"""Names of older releases and of other trainers, and what becomes of them: renamed with a note, dropped, or refused.

Owns: that table. What would silently differ here is refused with the reason (fp16, ``bias``, ``modules_to_save``);
What this trainer always does is dropped with a note. Does not know: types, ranges. Place in a training run: under
`sources.py`; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training.recipe.values import FP16_REASON, ValueRefused, shown

RENAMED: Mapping[str, str] = {
    "lora_r": "r", "lora_rank": "r", "rank": "r", "lora_dim": "r",
    "lora_alpha": "alpha", "lora_dropout": "dropout",
    "use_rslora": "rslora", "use_dora": "dora", "loraplus_lr_ratio": "lora_plus",
    "target_modules": "targets", "lora_target": "targets", "lora_target_modules": "targets",
    "target_preset": "preset", "presets": "preset",
    "learning_rate": "lr", "merger_lr": "merger.lr", "vision_lr": "vision.lr", "vit_lr": "vision.lr",
    "num_train_epochs": "epochs", "num_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch", "micro_batch_size": "micro_batch", "batch_size": "micro_batch",
    "gradient_accumulation_steps": "accumulation", "grad_accum": "accumulation",
    "lr_scheduler_type": "scheduler", "lr_scheduler": "scheduler", "optim": "optimizer",
    "gradient_checkpointing": "activation_checkpointing", "use_gradient_checkpointing": "activation_checkpointing",
    "max_gradient_norm": "max_grad_norm", "gradient_clipping": "max_grad_norm",
    "cutoff_len": "max_length", "max_seq_length": "max_length", "max_seq_len": "max_length",
    "model_max_length": "max_length", "sequence_len": "max_length",
    "image_max_pixels": "max_pixels", "image_min_pixels": "min_pixels",
    "logging_steps": "log_steps", "save_total_limit": "keep_checkpoints", "eval_every": "eval_steps",
    "early_stopping_patience": "early_stopping",
    "model_name_or_path": "base", "base_model": "base", "model": "base", "model_revision": "revision",
    "train_file": "data", "dataset": "data", "datasets": "data",
    "validation_file": "eval", "eval_dataset": "eval", "eval_data": "eval",
    "val_size": "eval_split", "val_set_size": "eval_split", "test_size": "eval_split",
    "torch_dtype": "precision", "image_folder": "data_root", "media_dir": "data_root", "adapter_name": "name",
}  # fmt: skip

_BASE_IS_SHARED = (
    "it would change the base that all adapters share, and the adapter could not be served beside others"
)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A name whose value is fixed here."""

    neutral: tuple[object, ...]
    """Values that say what is done anyway."""
    reason: str


FIXED: Mapping[str, Fixed] = {
    "bias": Fixed(("none", None, False), f"any bias but none is refused: {_BASE_IS_SHARED}"),
    "modules_to_save": Fixed((None, [], "", "none"), f"modules_to_save is refused: {_BASE_IS_SHARED}"),
    "additional_target": Fixed((None, [], ""), f"whole modules are not trained: {_BASE_IS_SHARED}"),
    "trainable_token_indices": Fixed((None, [], {}), f"embeddings are not trained: {_BASE_IS_SHARED}"),
    "lora_bias": Fixed((False, None), "biases of B are not trained: not every server adds them"),
    "init_lora_weights": Fixed(
        (True, "default", "kaiming"),
        "A starts at random and B at 0, so that step 0 is the base; PiSSA, OLoRA and their like begin by changing it",
    ),
    "fp16": Fixed((False, None), FP16_REASON),
    "load_in_4bit": Fixed((True,), "the base is in 4 bits, as it is served"),
    "load_in_8bit": Fixed((False, None), "the base is in 4 bits, as it is served"),
    "quantization_bit": Fixed((4,), "the base is in 4 bits, as it is served"),
    "bnb_4bit_quant_type": Fixed(("nf4",), "the base is in NF4, as it is served"),
    "bnb_4bit_use_double_quant": Fixed((True,), "the base's scales are quantised too, as it is served"),
    "freeze_vision_tower": Fixed((True,), "to train the tower add the preset vision"),
    "freeze_multi_modal_projector": Fixed((True,), "to train the merger add the preset merger"),
    "train_on_inputs": Fixed(
        (False, None), "only answers are learnt; mark a turn in the data to learn or skip it"
    ),
    "task_type": Fixed(("CAUSAL_LM", None), "the adapter is of a language model"),
    "peft_type": Fixed(("LORA", None), "the adapter is a LoRA"),
    "adapter": Fixed(("lora", "qlora"), "the adapter is a LoRA on a 4-bit base"),
    "finetuning_type": Fixed(("lora",), "the adapter is a LoRA on a 4-bit base"),
    "train_type": Fixed(("lora",), "the adapter is a LoRA on a 4-bit base"),
    "freeze_vit": Fixed((True,), "to train the tower add the preset vision"),
    "freeze_aligner": Fixed((True,), "to train the merger add the preset merger"),
    "stage": Fixed(("sft",), "training is supervised; stretches of a run are called stages"),
    "do_train": Fixed((True,), "the command trains"),
    "group_by_length": Fixed((True,), "batches are grouped by length always"),
    "remove_unused_columns": Fixed((False, None), "the data's own reader decides on columns"),
    "sample_packing": Fixed(
        (True, False, None), "rows of a batch are packed without attending to one another always"
    ),
    "chat_template": Fixed(("qwen2_vl", "qwen2_5_vl", "qwen2-vl"), "the chat template is the base's own"),
    "template": Fixed(("qwen2_vl", "qwen2_5_vl", "qwen2-vl"), "the chat template is the base's own"),
}
"""Other trainers' switches with only one position here."""

_OPTIMIZERS: Mapping[str, str] = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adam": "adamw",
    "adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_8bit",
}  # fmt: skip
_PRECISIONS: Mapping[str, str] = {"bfloat16": "bf16", "float32": "fp32", "32": "fp32", "bf16-mixed": "bf16"}

_SPEED = "it decides how fast rows are read or multiplied, not what is learnt"
_PLACE = "the run folder is --out, and --overwrite empties it"
_OWN = "the base, its processor and its chat template are read as they are served"
_PERIODS = "evaluations are eval_steps apart, else at the end of each pass; checkpoints are save_steps apart"
_SHOWN = "the log, the plot and report_to say what is shown"
IDLE: Mapping[str, str] = {
    **dict.fromkeys(("preprocessing_num_workers", "dataset_num_proc", "dataloader_num_workers"), _SPEED),
    **dict.fromkeys(("dataloader_pin_memory", "overwrite_cache", "tf32", "ddp_timeout"), _SPEED),
    **dict.fromkeys(("flash_attention", "flash_attn", "attn_impl", "attn_implementation"), _SPEED),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size", "pad_to_sequence_len"), _SPEED),
    **dict.fromkeys(("output_dir", "overwrite_output_dir"), _PLACE),
    **dict.fromkeys(("trust_remote_code", "processor_type", "skip_prepare_dataset"), _OWN),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "save_strategy"), _PERIODS),
    **dict.fromkeys(("plot_loss", "logging_first_step", "wandb_project", "wandb_name", "run_name"), _SHOWN),
}
"""Other trainers' keys that decide nothing of the adapter: in a file they are left out with a note."""
_ROW_FILE = frozenset({"path", "type", "ds_type"})


@dataclass(frozen=True, slots=True)
class Renamed:
    """What a key means here; ``key`` None: nothing, it is dropped."""

    key: str | None
    value: object
    note: str | None = None


def translate(key: str, value: object) -> Renamed:
    """``key`` and ``value`` in this release's words; those of this release come back as they are.

    Raises ValueRefused where the value cannot be had here.
    """
    if key in FIXED:
        return _fixed(key, value)
    if key in IDLE:
        return Renamed(None, value, f"{key} is left out: {IDLE[key]}")
    if key == "bf16":
        return _bf16(value)
    if RENAMED.get(key) == "targets" and value in ("all", "all-linear"):
        return Renamed(
            "preset", ["language"], f"{key} {value} is preset language here: the tower stays frozen"
        )
    part, dot, own = key.rpartition(".")
    name = RENAMED.get(key) or (f"{part}.{RENAMED[own]}" if dot and own in RENAMED else key)
    note = f"{key} is called {name} here" if name != key else None
    translated = _value(name, value)
    if translated != value and note is None and not isinstance(value, list | tuple):
        note = f"{key} {value} is called {translated} here"
    return Renamed(name, translated, note)


def _fixed(key: str, value: object) -> Renamed:
    fixed = FIXED[key]
    spellings = {str(neutral).lower() for neutral in fixed.neutral}
    if value in fixed.neutral or (isinstance(value, str) and value.lower() in spellings):
        return Renamed(None, value, f"{key} is left out: {fixed.reason}")
    raise ValueRefused(f"{key} {shown(value)}: {fixed.reason}")


def _bf16(value: object) -> Renamed:
    if str(value).lower() in ("true", "yes"):
        return Renamed("precision", "bf16", "bf16 is called precision bf16 here")
    return Renamed(None, value, "bf16 false is left out: precision auto finds what the device multiplies")


def _value(name: str, value: object) -> object:
    if name in ("data", "eval") and isinstance(value, list) and value:
        return _files(value)
    if name == "targets" and isinstance(value, list | tuple):
        return ",".join(str(item) for item in value)
    if name == "optimizer":
        return _OPTIMIZERS.get(str(value), value)
    if name == "precision":
        return _PRECISIONS.get(str(value), value)
    if name == "report_to" and value in ("none", ["none"]):
        return []
    return value


def _files(items: list[object]) -> list[object]:
    """Of axolotl's ``{path: rows.jsonl, type: ...}`` the path: a file's format is found from its rows."""
    return [
        item["path"] if isinstance(item, Mapping) and "path" in item and set(item) <= _ROW_FILE else item
        for item in items
    ]
