"""TimePlan: how long a run takes, from what it multiplies.

Owns the count of floating-point operations, two a multiply-add: a frozen weight is used forward and for the gradient of
its input, never for its own, so 4 a weight and token instead of 6. Does not know: how fast a device is, beyond what the
caller says or `measured_rate` finds. Place in a training run: beside the memory plan.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from training.plan.shape import BaseShape
from training.plan.weights import language_parameters, vision_parameters
from training.recipe.linter import DEFAULT_EPOCHS, num_steps
from training.recipe.recipe import Recipe
from training.targets.targets import resolve_targets_on

EFFICIENCY: Final = 0.4
"""Share of a large matrix product's rate that a whole training step reaches: 4-bit weights are unpacked at each use,
and norms, attention and the adapters are bound by memory. A rough figure; the run's own progress replaces it."""


@dataclass(frozen=True, slots=True)
class DataSize:
    """Of the rows that are learnt from; means are over them."""

    rows: int
    tokens: float
    """Mean of a row, pictures included."""
    image_tokens: float = 0.0
    labels: float | None = None
    """None is a quarter of the tokens."""


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Of the whole run, evaluations left out."""

    steps: int
    tokens: int
    flops: float
    seconds: float | None
    """None where no rate is known."""

    def text(self) -> str:
        took = "" if self.seconds is None else f", about {_span(self.seconds)}"
        return f"{self.steps:,} steps, {self.tokens:,} tokens, {self.flops:.2e} operations{took}"

    def as_json(self) -> dict[str, object]:
        return {"steps": self.steps, "tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}


def plan_time(
    shape: BaseShape, recipe: Recipe, data: DataSize, *, flops_per_s: float | None = None
) -> TimePlan:
    """``flops_per_s``: what a large matrix product reaches on the device, in the precision that trains.

    Raises TargetsError.
    """
    steps = num_steps(recipe, data.rows)
    rows = min(steps * recipe.rows_per_step, _rows_of_epochs(recipe, data.rows))
    language = rows * language_flops(shape, recipe, data)
    seen = (
        rows
        if _is_tower_trained(recipe, shape)
        else min(rows, data.rows if recipe.vision_cache_mib else rows)
    )
    total = language + seen * vision_flops(shape, recipe, data.image_tokens)
    seconds = None if flops_per_s is None else total / (flops_per_s * EFFICIENCY)
    return TimePlan(steps, int(rows * data.tokens), total, seconds)


def language_flops(shape: BaseShape, recipe: Recipe, data: DataSize) -> float:
    """Of one row: 4 a weight and token, 6 with layers computed twice; 6 a number of the adapter; causal attention
    2 T Q a layer and token forward and 2.5 times that back; the head on labelled rows."""
    passes = 6 if recipe.activation_checkpointing else 4
    targets = resolve_targets_on(recipe, shape.sites())
    adapter = sum(t.num_parameters for t in targets.of("language"))
    attention = (
        shape.layers * 2 * data.tokens * shape.query_width * (4.5 if recipe.activation_checkpointing else 3.5)
    )
    a_token = passes * language_parameters(shape) + 6 * adapter + attention
    labels = data.tokens / 4 if data.labels is None else data.labels
    return data.tokens * a_token + labels * 6 * shape.vocab * shape.hidden


def vision_flops(shape: BaseShape, recipe: Recipe, image_tokens: float) -> float:
    """Of one row's pictures: 2 a weight and patch where the tower is frozen, 4 or 6 where it learns."""
    passes = 2
    if _is_tower_trained(recipe, shape):
        passes = 6 if recipe.activation_checkpointing else 4
    return image_tokens * shape.vision.merge**2 * passes * vision_parameters(shape)


def measured_rate(device: str = "cpu", dtype: str = "float32", side: int = 1024) -> float:
    """Operations a second of a square matrix product here; takes well under a second. Imports torch."""
    import torch

    left = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        (left @ left).sum().item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _rows_of_epochs(recipe: Recipe, rows: int) -> int:
    if recipe.max_steps is not None or any(stage.max_steps is not None for stage in recipe.stages):
        return num_steps(recipe, rows) * recipe.rows_per_step
    epochs = sum(stage.epochs or 0.0 for stage in recipe.stages) if recipe.stages else recipe.epochs
    return int(rows * (DEFAULT_EPOCHS if epochs is None else epochs))


def _is_tower_trained(recipe: Recipe, shape: BaseShape) -> bool:
    return bool(resolve_targets_on(recipe, shape.sites()).of("vision"))


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
