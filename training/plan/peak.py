"""The peak: which of the formulas meet at the moment when most is held, and whether that goes into a device.

Figures are bytes that tensors hold (``torch.cuda.max_memory_allocated``). Does not know: what to change where it does
not fit (`ladder.py`). Place in a training run: under the plan; no torch.

Peak = resident (weights, adapter, optimizer) + gradients + what was kept at that moment + the larger of the head, one
layer's backward pass, or the frozen tower's forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.plan.activations import (
    Load,
    backward_bytes,
    head_bytes,
    language_layer_bytes,
    merger_bytes,
    vision_block_bytes,
    vision_forward_bytes,
)
from training.plan.shape import BaseShape
from training.plan.weights import adapter_bytes, weight_bytes
from training.recipe.recipe import Part, Recipe
from training.targets.targets import Target, Targets, resolve_targets_on

Device = Literal["cuda", "cpu"]
CONTEXT_BYTES = 512 << 20
"""Of the CUDA runtime, beside the tensors."""
WORKSPACE_BYTES = 32 << 20
"""Of cuBLAS, which torch allocates beside the tensors (Hopper's default; 8 MiB elsewhere)."""
SLACK = 1.05
"""The allocator's gaps."""


@dataclass(frozen=True, slots=True)
class Row:
    """The largest row of the data."""

    tokens: int
    image_tokens: int
    labels: int


def fits(total_bytes: int, memory_bytes: int) -> bool:
    """Whether a peak, with the runtime's context and the allocator's gaps, goes into a device."""
    return total_bytes * SLACK + CONTEXT_BYTES <= memory_bytes


def peak_parts(shape: BaseShape, recipe: Recipe, row: Row, device: Device) -> dict[str, int]:
    """Part -> bytes at the peak. Raises TargetsError."""
    targets = resolve_targets_on(recipe, shape.sites())
    is_half = recipe.precision == "bf16" or (recipe.precision == "auto" and device == "cuda")
    load = Load(
        tokens=row.tokens * recipe.micro_batch,
        image_tokens=row.image_tokens * recipe.micro_batch,
        labels=row.labels * recipe.micro_batch,
        element=2 if is_half else 4,
        mask=1 if device == "cuda" else 4,
    )
    resident = {
        **weight_bytes(shape, load.element, is_four_bit=device == "cuda" or is_half),
        **adapter_bytes(targets, recipe),
    }
    return resident | _moment(shape, recipe, targets, load)


def _moment(shape: BaseShape, recipe: Recipe, targets: Targets, load: Load) -> dict[str, int]:
    """What is held at the worst moment beside the resident part: where the backward pass begins, or in the tower."""
    layers = _by_layer(targets, "language")
    kept = [language_layer_bytes(shape, layers.get(i, ()), recipe, load) for i in range(shape.layers)]
    pictures = _pictures_kept(shape, recipe, targets, load)
    stream = (
        load.tokens * (load.element + 4 * 2) * shape.hidden
    )  # embeddings; the final norm's input and result
    working = backward_bytes(shape.hidden, shape.mlp, shape.hidden * shape.mlp, load.tokens, recipe, load)
    if recipe.activation_checkpointing:
        held = shape.layers * load.tokens * load.element * shape.hidden
        working += max(kept)
    else:
        held = sum(kept)
    worst = max(working, head_bytes(shape, load))
    tower = vision_forward_bytes(shape, load) if not pictures else 0
    return {
        "kept by the language layers": held + stream,
        "kept for pictures": pictures,
        "at work": max(worst, tower - held - stream) + (WORKSPACE_BYTES if load.mask == 1 else 0),
    }


def _pictures_kept(shape: BaseShape, recipe: Recipe, targets: Targets, load: Load) -> int:
    """Of the tower and the merger, where they learn; a frozen one keeps nothing."""
    total = merger_bytes(shape, targets.of("merger"), recipe, load) if targets.of("merger") else 0
    blocks = _by_layer(targets, "vision")
    if not blocks:
        return total
    kept = [
        vision_block_bytes(shape, blocks.get(i, ()), recipe, load)
        for i in range(min(blocks), shape.vision.depth)
    ]
    if recipe.activation_checkpointing:
        return total + len(kept) * load.patches(shape) * load.element * shape.vision.hidden + max(kept)
    return total + sum(kept)


def _by_layer(targets: Targets, part: Part) -> dict[int, list[Target]]:
    found: dict[int, list[Target]] = {}
    for target in targets.of(part):
        index = next(int(token) for token in target.name.split(".") if token.isdigit())
        found.setdefault(index, []).append(target)
    return found
