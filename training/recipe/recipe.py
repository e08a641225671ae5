"""Recipe: everything that decides what an adapter becomes, as one frozen value.

Owns the fields, each with its one default, its unit, its range and the reason for it: flags, YAML and docs/recipes.md
are generated from here. Does not know: YAML, flags, where a value came from (`sources.py`), what contradicts
what (`check.py`), which modules a preset means (`targets.py`), whether a value is wise (`linter.py`).
Place in a training run: made once before its first phase, handed down to every one, and written into the package.
"""
# ruff: noqa: RUF009  (the makers of fields below are called in their class's body on purpose, once)

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from training.data.dataset import OnBad
    from training.data.formats import Format

Part = Literal["language", "merger", "vision"]
Preset = Literal["language", "attention", "qv", "merger", "vision", "all"]
Precision = Literal["auto", "bf16", "fp32"]
Augmentation = Literal["none", "ocr", "natural"]
Scheduler = Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"]
Reporter = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """What a field's metadata says beside its type and default."""

    group: str
    unit: str
    reason: str
    low: float | None = None
    """Smallest value."""
    above: float | None = None
    """Values lie above it."""
    high: float | None = None
    """Largest value."""
    below: float | None = None
    """Values lie below it."""


def _group(group: str) -> Callable[..., Any]:
    """A maker of fields of one group; Any, as ``dataclasses.field`` returns, so that it fits each annotation."""

    def described(default: object, unit: str, reason: str, **limits: float) -> Any:
        doc = {"doc": FieldDoc(group, unit, reason, **limits)}
        if isinstance(default, dict):
            return field(default_factory=dict, metadata=doc)
        return field(default=default, metadata=doc)

    return described


MAX_RANK = 1024
"""The largest that our server can be set to."""
MAX_ALPHA = 1e6
"""As ``adapters.manifest.MAX_ALPHA``."""

_made = _group("What is made, from what")
_lora = _group("The adapter")
_loop = _group("The loop")
_kept = _group("What is kept and shown")
_judged = _group("Judging")


@dataclass(frozen=True, slots=True)
class PartRecipe:
    """What one part has otherwise than the rest; None is as the rest."""

    # fmt: off
    r: int | None = _lora(None, "rank", "This part's; none is as the rest.", low=1, high=MAX_RANK)
    alpha: float | None = _lora(None, "number", "This part's; none is as the rest.", above=0, high=MAX_ALPHA)
    lr: float | None = _loop(None, "a step", "This part's peak rate; none is as the rest.", above=0, high=1)
    # fmt: on


@dataclass(frozen=True, slots=True)
class Stage:
    """One stretch of the run: which parts learn, how fast, how long. Parts that do not learn keep what they know."""

    # fmt: off
    parts: tuple[Part, ...] = _loop((), "language, merger, vision", "What learns in this stage.")
    lr: float | None = _loop(None, "a step", "Of all its parts; none is each part's own, else the recipe's.",
                             above=0, high=1)
    rates: Mapping[Part, float] = _loop({}, "part: rate", "Of single parts; wins over the stage's lr.", above=0, high=1)
    epochs: float | None = _loop(None, "passes over the data", "Its length; this or max_steps, not both.", above=0)
    max_steps: int | None = _loop(None, "optimizer steps", "Its length; this or epochs, not both.", low=1)
    # fmt: on


@dataclass(frozen=True, slots=True)
class Recipe:
    """See docs/recipes.md: each field with its unit, default and reason. Steps are optimizer steps throughout."""

    # fmt: off
    # ---- what is made, from what
    name: str = _made("", "name", "What it is served as: letters, digits, dot, dash, underscore; one slash after an "
                      "owner's.")
    data: tuple[str, ...] = _made((), "files, comma between", "Rows to learn from; also hf://datasets/org/name"
                                  "[@revision][/file]. docs/training-data.md has the formats.")
    eval: tuple[str, ...] = _made((), "files, comma between", "Rows to be judged on; none holds out a share of data.")
    eval_split: float = _made(0.1, "share of the rows", "Held out where eval names no file; 0 holds out none, and "
                              "then nothing can be judged.", low=0, below=1)
    data_root: Path | None = _made(None, "folder", "Pictures must lie in it; none is each data file's own folder.")
    format: Format | None = _made(None, "format", "None finds it from each file's first good row.")
    columns: Mapping[str, str] = _made({}, "theirs: ours", "Renames columns: question: instruction.")
    on_bad: OnBad = _made("error", "error, skip, quarantine", "A bad row is a bug in the data until someone has "
                          "looked; skip leaves it out, quarantine also writes it to a file.")
    base: str = _made("pocket", "name, hub id or folder", "The embedded base trains without a download.")
    revision: str | None = _made(None, "branch, tag or commit", "Pins a hub id; none takes its default branch.")

    # ---- the adapter
    preset: tuple[Preset, ...] = _lora(("language",), "names, comma between", "Several are joined. All linears of the "
                                       "language model learn more at equal size than q and v alone.")
    targets: str | None = _lora(None, "expression or names", "Instead of presets: an anchored regular expression over "
                                "whole module names. Plain names are narrowed to the language model where it and "
                                "the vision tower share them.")
    r: int = _lora(16, "rank", "8 to 16 for simple or small data, 32 to 64 for style and hard tasks, 128 rarely.",
                   low=1, high=MAX_RANK)
    alpha: float = _lora(32.0, "number", "Scale is alpha / r: 0.25 is cautious, 2 strong; 2 r is usual.",
                         above=0, high=MAX_ALPHA)
    dropout: float = _lora(0.05, "share", "On the adapter's input: 0.1 to 0.3 under 1,000 rows, 0.05 to 0.1 up to "
                           "10,000, 0 to 0.05 above.", low=0, below=1)
    rslora: bool = _lora(False, "yes or no", "Scale alpha / sqrt(r) instead: keeps high ranks learning (r over 64).")
    dora: bool = _lora(False, "yes or no", "Learns each output's length apart from its direction; slower.")
    lora_plus: float | None = _lora(None, "times", "LoRA+: how many times A's rate B's is; 16 is its authors' value.",
                                    low=1, high=1024)
    rank_pattern: Mapping[str, int] = _lora({}, "module: rank", "Literal module name or its end; first match wins.",
                                            low=1, high=MAX_RANK)
    alpha_pattern: Mapping[str, float] = _lora({}, "module: alpha", "As rank_pattern.", above=0, high=MAX_ALPHA)
    language: PartRecipe = _lora(PartRecipe(), "part", "The language model's own values.")
    merger: PartRecipe = _lora(PartRecipe(), "part", "The merger's: r 8 or 16, alpha 2 r, a somewhat higher rate.")
    vision: PartRecipe = _lora(PartRecipe(), "part", "The vision tower's: a lower rate, it is easily spoilt.")

    # ---- the loop
    lr: float = _loop(2e-4, "a step", "Peak rate; LoRA wants 1e-4 to 5e-4, ten times full training's.", above=0,
                      high=1)
    epochs: float | None = _loop(None, "passes over the data", "How long; none, without max_steps, is 3.", above=0)
    max_steps: int | None = _loop(None, "optimizer steps", "How long instead of epochs; naming both is an error.",
                                   low=1)
    stages: tuple[Stage, ...] = _loop((), "list", "Stretches of one run, each with its parts, rates and length: merger "
                                      "alone, then merger and language. None is all parts together.")
    micro_batch: int = _loop(4, "rows", "Through the model at once, on one process: decides memory, not the result.",
                             low=1)
    accumulation: int = _loop(4, "micro-batches", "A step, of all processes together; a step sees micro_batch x "
                              "accumulation rows, and counts each label once.", low=1)
    warmup_ratio: float = _loop(0.03, "share of the steps", "The rate rises to its peak over them.", low=0, below=1)
    warmup_steps: int | None = _loop(None, "optimizer steps", "Instead of the ratio; naming both is an error.", low=0)
    scheduler: Scheduler = _loop("cosine", "name", "How the rate falls after its peak.")
    optimizer: Optimizer = _loop("adamw", "name", "8-bit states take 2 bytes a number instead of 8; "
                                 "paged ones need CUDA, and wait in host memory when the device is full.")
    weight_decay: float = _loop(0.0, "share a step, times lr", "An adapter has little to decay to.", low=0, high=1)
    max_grad_norm: float = _loop(1.0, "norm", "A larger gradient is scaled down to it; 0 leaves it.", low=0)
    seed: int = _loop(0, "number", "Of A, the order of rows, dropout and augmentation.", low=0, high=2**32 - 1)
    precision: Precision = _loop("auto", "auto, bf16, fp32", "auto is bf16 where the device multiplies it natively, "
                                 "else fp32. fp16 is refused: Qwen's activations exceed its range.")
    activation_checkpointing: bool = _loop(False, "yes or no", "Computes each layer twice and keeps its input only: a "
                                           "third more time, a fraction of the memory.")
    max_length: int = _loop(2048, "tokens", "Of a row, pictures included; longer rows are faults, none is cut.", low=8)
    min_pixels: int | None = _loop(None, "pixels", "Smallest area of a picture; none is the checkpoint's.", low=1)
    max_pixels: int | None = _loop(None, "pixels", "Largest area of a picture, a token each 28 x 28; none is the "
                                   "checkpoint's. The server must use the same.", low=1)
    augment: Augmentation = _loop("none", "none, ocr, natural", "Label-safe changes of pictures: ocr keeps text "
                                  "readable and upright, natural also moves; boxes move with their picture.")
    vision_cache_mib: int = _loop(512, "MiB of host memory", "Keeps a frozen tower's outputs, so that each picture is "
                                  "encoded once; 0 switches it off.", low=0)

    # ---- what is kept and shown
    log_steps: int = _kept(1, "optimizer steps", "Between lines of the log.", low=1)
    eval_steps: int | None = _kept(None, "optimizer steps", "Between evaluations; none is at each epoch's end.", low=1)
    save_steps: int = _kept(50, "optimizer steps", "Between checkpoints: what a kill can cost.", low=1)
    keep_checkpoints: int = _kept(2, "checkpoints", "Newest ones kept; the best is kept beside them.", low=1)
    early_stopping: int | None = _kept(None, "evaluations", "Without a better held-out loss, after which the run ends "
                                       "with the best.", low=1)
    report_to: tuple[Reporter, ...] = _kept((), "names, comma between", "Any of tensorboard, wandb, mlflow.")

    # ---- judging
    metrics: tuple[str, ...] = _judged((), "names, comma between", "None is all that apply: exact_match, token_f1, "
                                       "bleu, rouge_l, chrf; json_valid only when named.")
    gate: tuple[str, ...] = _judged(("loss <= base",), "rules, comma between", "Must hold before it is deployed: "
                                    "exact_match >= base + 0.1, vision_dependence >= 0.1.")
    eval_rows: int = _judged(200, "rows", "Most held-out rows that answers are written for; the loss is of all.", low=1)
    max_new_tokens: int = _judged(256, "tokens", "Longest answer written in an evaluation.", low=1)
    sample_rows: int = _judged(4, "rows", "Held-out rows whose answers are shown at each evaluation, beside the "
                               "base's.", low=0)
    # fmt: on

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch * self.accumulation

    def of(self, part: Part) -> PartRecipe:
        return {"language": self.language, "merger": self.merger, "vision": self.vision}[part]

    def rate_of(self, part: Part, stage: Stage | None = None) -> float:
        """Peak rate of a part: the stage's for it, the stage's, the part's own, the recipe's; the first that is set."""
        of_stage = (stage.rates.get(part), stage.lr) if stage is not None else (None, None)
        return next((rate for rate in (*of_stage, self.of(part).lr) if rate is not None), self.lr)


def doc_of(owner: type, name: str) -> FieldDoc:
    """A field's unit, reason and range, of Recipe, PartRecipe or Stage. Raises KeyError."""
    doc = {known.name: known for known in fields(owner)}[name].metadata["doc"]
    if not isinstance(doc, FieldDoc):
        raise KeyError(name)
    return doc
