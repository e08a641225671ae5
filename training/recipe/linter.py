"""Advice on a recipe: each value against what is known to work, with the value and the reason.

Owns the guidance: ranks, scales, dropout by number of rows, rates, and the classic recipes that disappoint. Advice of
level error is about a value that cannot do what it says; the others leave the choice to the user. Does not know: a
base, data beyond its number of rows. Place in a training run: printed with the resolved recipe, before the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from adapters.sites import PARTS
from training.recipe.check import contradictions, parts_of
from training.recipe.recipe import Part, Recipe
from training.recipe.values import FP16_REASON

Level = Literal["note", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Advice:
    """One remark."""

    level: Level
    key: str
    """The dotted key that it is about."""
    text: str
    """The value, the reason, and what to do."""

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


Rule = Callable[[Recipe, int | None], Iterator[Advice]]
DEFAULT_EPOCHS = 3.0


def advise(recipe: Recipe, num_rows: int | None = None) -> tuple[Advice, ...]:
    """Remarks on ``recipe``, errors first; ``num_rows`` to learn from, None when not known yet."""
    rules: tuple[Rule, ...] = (
        _contradictions, _precision, _ranks, _scales, _targets, _dropout, _rates, _length, _steps, _pictures, _kinds,
    )  # fmt: skip
    found = [advice for rule in rules for advice in rule(recipe, num_rows)]
    order: tuple[Level, ...] = ("error", "warning", "note")
    return tuple(sorted(found, key=lambda advice: order.index(advice.level)))


def _contradictions(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    """For recipes that were not read from a file or flags: what is set beside its rival."""
    given = ("epochs", "max_steps", "warmup_steps", "stages", "early_stopping", "eval_steps")
    for problem in contradictions(recipe, given):
        yield Advice("error", problem.split()[0].rstrip(":"), problem)


def _precision(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    if str(recipe.precision) in ("fp16", "float16", "half"):
        yield Advice("error", "precision", FP16_REASON)


def _ranks(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    for key, r in _each(recipe, "r"):
        if r > 64:
            yield Advice(
                "warning", key,
                f"{key} {r:g} is rarely worth it: 8 to 16 do for simple or small data, 32 to 64 for style and hard "
                "tasks; servers often take no more than 64",
            )  # fmt: skip
        elif r > 16 and num_rows is not None and num_rows < 1000:
            yield Advice(
                "note", key,
                f"{key} {r:g} for {num_rows} rows: 8 to 16 are enough for small data and overfit later",
            )  # fmt: skip
        elif r < 4:
            yield Advice(
                "note", key, f"{key} {r:g} is very small: it can hold a switch of format, hardly a skill"
            )


def _scales(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    for part in (None, *(parts_of(recipe) or ())):
        own = recipe.of(part) if part else None
        if own is not None and own.r is None and own.alpha is None:
            continue
        r = own.r if own is not None and own.r is not None else recipe.r
        alpha = own.alpha if own is not None and own.alpha is not None else recipe.alpha
        yield from _scale(f"{part}.alpha" if part else "alpha", r, alpha, recipe.rslora)


def _scale(key: str, r: int, alpha: float, is_rslora: bool) -> Iterator[Advice]:
    scale = alpha / math.sqrt(r) if is_rslora else alpha / r
    how = f"alpha {alpha:g} / {'sqrt(r)' if is_rslora else 'r'} with r {r} is a scale of {scale:.3g}"
    if is_rslora and scale > 8:
        yield Advice(
            "warning", key, f"{how}: with rsLoRA take alpha near sqrt(r), or learning becomes unstable"
        )
    elif is_rslora:
        return
    elif scale > 4:
        yield Advice("warning", key, f"{how}: above 4 learning becomes unstable; 2 is strong: alpha {2 * r}")
    elif scale > 2:
        yield Advice(
            "note", key, f"{how}: stronger than the usual 2, and in use at r 8; if the loss jumps, take alpha {2 * r}"
        )  # fmt: skip
    elif scale < 0.25:
        yield Advice(
            "warning", key, f"{how}: below 0.25 the adapter hardly acts at usual rates; alpha {r} to {2 * r}"
        )
    elif scale < 1:
        yield Advice(
            "note", key, f"{how}: cautious, much of the base stays; if it learns too little, take alpha {r} to {2 * r}"
        )  # fmt: skip


def _targets(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    names = {name.strip() for name in (recipe.targets or "").split(",")}
    if names == {"q_proj", "v_proj"} or (recipe.targets is None and set(recipe.preset) == {"qv"}):
        yield Advice(
            "warning", "targets" if recipe.targets else "preset",
            "q and v only: the first LoRA paper's choice; at equal size all linears of the language model learn more "
            "(preset language), and q and v alone lag on new skills at any rank",
        )  # fmt: skip
    present = parts_of(recipe) or ()
    if present == ("merger",) and not recipe.stages:
        yield Advice(
            "note", "preset",
            "merger alone shifts how pictures are seen and cannot teach new answers: language,merger for those",
        )  # fmt: skip
    if "vision" in present and num_rows is not None and num_rows < 1000:
        yield Advice(
            "warning", "preset",
            f"vision with {num_rows} rows: the tower knows more than they can teach and is easily spoilt; "
            "try language,merger first",
        )  # fmt: skip


def _dropout(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    if num_rows is None:
        return
    low, high, size = (
        (0.1, 0.3, "under 1,000 rows") if num_rows < 1000
        else (0.05, 0.1, "1,000 to 10,000 rows") if num_rows <= 10_000
        else (0.0, 0.05, "over 10,000 rows")
    )  # fmt: skip
    if not low <= recipe.dropout <= high:
        what = "little data overfits" if recipe.dropout < low else "more of it only slows learning"
        level: Level = "warning" if recipe.dropout > 0.5 else "note"
        yield Advice(
            level, "dropout",
            f"dropout {recipe.dropout:g} with {num_rows:,} rows: {low:g} to {high:g} suits {size}; {what}",
        )  # fmt: skip


def _rates(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    rates = dict(_each(recipe, "lr"))
    for index, stage in enumerate(recipe.stages, start=1):
        rates |= {f"stages.{index}.{part}": recipe.rate_of(part, stage) for part in stage.parts}
    for key, rate in rates.items():
        low, high = (1e-5, 5e-4) if key.startswith("vision") or key.endswith(".vision") else (1e-4, 5e-4)
        high = 2e-3 if "merger" in key else high
        if rate > 2 * high:
            yield Advice(
                "warning", key, f"{key} {rate:g}: above {high:g} adapters diverge or forget the base"
            )
        elif rate < low:
            yield Advice(
                "note", key, f"{key} {rate:g}: LoRA wants {low:g} to {high:g}, ten times what full training takes"
            )  # fmt: skip
    present = parts_of(recipe) or ()
    if {"language", "merger"} <= set(present) and recipe.rate_of("merger") < recipe.rate_of("language"):
        yield Advice(
            "note", "merger.lr", "the merger's rate is below the language model's: it wants somewhat more"
        )
    if recipe.lora_plus is not None and recipe.lora_plus > 32:
        yield Advice(
            "warning", "lora_plus", f"lora_plus {recipe.lora_plus:g}: its authors use 16; more is unstable"
        )


def _length(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    epochs = sum(stage.epochs or 0.0 for stage in recipe.stages) if recipe.stages else recipe.epochs
    if epochs is not None and epochs > 10 and (num_rows is None or num_rows > 100):
        yield Advice(
            "warning",
            "epochs",
            f"{epochs:g} epochs: beyond 10 rows are learnt by heart; watch the held-out loss",
        )
    if num_rows is None or recipe.stages:
        return
    steps = num_steps(recipe, num_rows)
    if steps < 20:
        yield Advice(
            "warning", "epochs",
            f"{num_rows} rows in steps of {recipe.rows_per_step} make {steps} steps: too few to learn from; "
            "more epochs, or a smaller accumulation",
        )  # fmt: skip


def num_steps(recipe: Recipe, num_rows: int) -> int:
    """Optimizer steps of the whole run, stages together."""
    per_epoch = max(1, math.ceil(num_rows / recipe.rows_per_step))
    if recipe.stages:
        return sum(stage.max_steps or math.ceil(per_epoch * (stage.epochs or 0.0)) for stage in recipe.stages)
    return recipe.max_steps or math.ceil(per_epoch * (recipe.epochs or DEFAULT_EPOCHS))


def _steps(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    if num_rows is not None and recipe.rows_per_step > num_rows:
        yield Advice(
            "warning", "accumulation",
            f"a step of {recipe.rows_per_step} rows holds all {num_rows}: take smaller steps for more of them",
        )  # fmt: skip
    if (
        recipe.warmup_steps is not None
        and num_rows is not None
        and recipe.warmup_steps >= num_steps(recipe, num_rows)
    ):
        yield Advice(
            "error", "warmup_steps",
            f"warmup_steps {recipe.warmup_steps} is as long as the run of {num_steps(recipe, num_rows)} steps: "
            "the rate would never reach its peak",
        )  # fmt: skip
    if recipe.scheduler == "constant" and (recipe.warmup_steps or recipe.warmup_ratio > 0.03):
        yield Advice("warning", "scheduler", "constant has no warmup: name constant_with_warmup")


def _pictures(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    if recipe.max_pixels is not None and recipe.max_pixels // 784 > recipe.max_length - 32:
        yield Advice(
            "warning", "max_pixels",
            f"max_pixels {recipe.max_pixels} is {recipe.max_pixels // 784} tokens a picture, and max_length leaves no "
            f"room for text in {recipe.max_length}: larger pictures would be faults",
        )  # fmt: skip


def _kinds(recipe: Recipe, num_rows: int | None) -> Iterator[Advice]:
    if recipe.dora:
        yield Advice("note", "dora", "dora is slower to train and to serve; try plain LoRA first and compare")
    if recipe.rslora and recipe.r <= 16:
        yield Advice(
            "note", "rslora", f"rslora at r {recipe.r}: it matters at high ranks; plain alpha / r does here"
        )


def _each(recipe: Recipe, field: Literal["r", "lr"]) -> Iterator[tuple[str, float]]:
    """(dotted key, value) of the recipe and of each part that has its own."""
    yield field, recipe.r if field == "r" else recipe.lr
    parts: tuple[Part, ...] = PARTS
    for part in parts:
        value = recipe.of(part).r if field == "r" else recipe.of(part).lr
        if value is not None:
            yield f"{part}.{field}", value
