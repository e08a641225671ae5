"""Recipe: everything that decides what an adapter becomes, as one frozen value.

Owns the fields, their defaults and what contradicts what. Does not know: YAML, flags, where a value came from
(`recipe_sources.py`), which modules a preset means (`targets.py`), whether a value is wise (`linter.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from training.dataset import OnBad
from training.formats import Format

Part = Literal["language", "merger", "vision"]
Preset = Literal["language", "attention", "qv", "merger", "vision", "all"]
Precision = Literal["auto", "bf16", "fp32"]
Augmentation = Literal["none", "ocr", "natural"]
Scheduler = Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"]


@dataclass(frozen=True, slots=True)
class PartRecipe:
    """What one part has otherwise than the rest; None is as the rest."""

    r: int | None = None
    alpha: float | None = None
    lr: float | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """One stretch of the run: which parts learn, how fast, how long. Parts that do not learn keep what they know."""

    parts: tuple[Part, ...]
    lr: float | None = None
    """Of all its parts; None is the recipe's."""
    rates: Mapping[Part, float] = field(default_factory=dict)
    """Of single parts; wins over ``lr``."""
    epochs: float | None = None
    max_steps: int | None = None
    """Optimizer steps; exactly one of the two."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """See docs/recipes.md: each field with its unit, default and reason. Steps are optimizer steps throughout."""

    # ---- what is made, from what
    name: str = ""
    """The adapter's name when it is served."""
    data: tuple[str, ...] = ()
    """Files, or ``hf://datasets/org/name[@revision][/file]``."""
    eval: tuple[str, ...] = ()
    eval_split: float = 0.1
    """Share of the rows that is held out where ``eval`` names no file; 0 holds out none."""
    data_root: Path | None = None
    format: Format | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    on_bad: OnBad = "error"
    base: str = "pocket"
    revision: str | None = None

    # ---- the adapter
    preset: tuple[Preset, ...] = ("language",)
    """Several are joined."""
    targets: str | None = None
    """An anchored regular expression over whole module names, instead of presets."""
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    rslora: bool = False
    dora: bool = False
    lora_plus: float | None = None
    """LoRA+: how many times A's rate B's is."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Literal module name or its end -> rank."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    language: PartRecipe = PartRecipe()
    merger: PartRecipe = PartRecipe()
    vision: PartRecipe = PartRecipe()

    # ---- the loop
    lr: float = 2e-4
    epochs: float | None = None
    """None with ``max_steps`` None is 3 epochs."""
    max_steps: int | None = None
    stages: tuple[Stage, ...] = ()
    micro_batch: int = 4
    """Rows that go through the model at once, on one process."""
    accumulation: int = 4
    """Micro-batches a step, of all processes together; so a step sees micro_batch * accumulation rows."""
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    """Wins over the ratio; naming both is an error."""
    scheduler: Scheduler = "cosine"
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: Precision = "auto"
    """``auto``: bf16 where the device multiplies it natively, else fp32."""
    activation_checkpointing: bool = False
    max_length: int = 2048
    """Tokens of a row, pictures included; longer rows are faults, nothing is cut."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    augment: Augmentation = "none"
    vision_cache_mib: int = 512
    """MiB of host memory for a frozen tower's outputs, which then are computed once a picture; 0 switches it off."""

    # ---- what is kept and shown
    log_steps: int = 1
    eval_steps: int | None = None
    """None evaluates at the end of each epoch."""
    save_steps: int = 50
    keep_checkpoints: int = 2
    early_stopping: int | None = None
    """Evaluations without a better held-out loss after which the run ends; the best is kept."""
    report_to: tuple[str, ...] = ()
    """Any of tensorboard, wandb, mlflow."""

    # ---- judging
    metrics: tuple[str, ...] = ()
    """None names all that apply: exact_match, token_f1, bleu, rouge_l, chrf; json_valid only when named."""
    gate: tuple[str, ...] = ("loss <= base",)
    """Rules that must hold: ``metric >= base + 0.1``, ``exact_match >= 0.9``, ``vision_dependence >= 0.1``."""
    eval_rows: int = 200
    """Most held-out rows that answers are generated for; the loss is of all."""
    max_new_tokens: int = 256
    sample_rows: int = 4
    """Held-out rows whose answers are shown at each evaluation, beside the base's."""

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch * self.accumulation

    def of(self, part: Part) -> PartRecipe:
        return {"language": self.language, "merger": self.merger, "vision": self.vision}[part]
