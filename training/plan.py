"""MemoryPlan: what a training run takes of a device's memory, by part, before anything is loaded.

Owns: which of the formulas meet at the peak, and the ladder of changes when it does not fit. Figures are bytes that
tensors hold (``torch.cuda.max_memory_allocated``); the runtime's own context comes beside them. Does not know: a
device's free memory (the caller gives it), time (`plan_time.py`). Place in a training run: after the data's check,
before the base is loaded; no torch.

Peak = resident (weights, adapter, optimizer) + gradients + what was kept at that moment + the larger of the head, one
layer's backward pass, or the frozen tower's forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from training.plan_activations import (
    Load,
    backward_bytes,
    head_bytes,
    language_layer_bytes,
    merger_bytes,
    vision_block_bytes,
    vision_forward_bytes,
)
from training.plan_shape import BaseShape
from training.plan_weights import adapter_bytes, weight_bytes
from training.recipe import Part, Recipe
from training.targets import Target, Targets, resolve_targets_on

Device = Literal["cuda", "cpu"]
GIB = 1 << 30
CONTEXT_BYTES = 512 << 20
"""Of the CUDA runtime, beside the tensors."""
WORKSPACE_BYTES = 32 << 20
"""Of cuBLAS, which torch allocates beside the tensors (Hopper's default; 8 MiB elsewhere)."""
SLACK = 1.05
"""The allocator's gaps."""
MEGAPIXEL = 1_000_000
TOKEN_PIXELS = 28 * 28
LABEL_SHARE = 0.25
"""Of a row's tokens, where the data has not been counted: an answer is rarely more."""


@dataclass(frozen=True, slots=True)
class Step:
    """One rung of the ladder: a change on top of all before it."""

    change: str
    cost: str
    recipe: Recipe
    total_bytes: int
    does_fit: bool


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The peak, by part."""

    base: str
    parts: Mapping[str, int]
    """Part -> bytes, at the peak; they sum up to the total."""
    floor_bytes: int
    """The same base and adapter with one row of 2,048 tokens and one picture of a megapixel at a time, layers computed
    twice: little can be saved below it but by a smaller adapter."""
    tokens: int
    """In one micro-batch."""
    image_tokens: int
    memory_bytes: int | None
    """Of the device, where it is known."""
    ladder: tuple[Step, ...] = ()
    """Changes that make it fit, each on top of the last; empty when it fits or the memory is not known."""

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def does_fit(self) -> bool:
        return self.memory_bytes is None or fits(self.total_bytes, self.memory_bytes)

    def text(self) -> str:
        """A line a part, the verdict, and the ladder."""
        width = max(map(len, self.parts))
        lines = [f"{name:<{width}}  {num_bytes / GIB:8.3f} GiB" for name, num_bytes in self.parts.items()]
        lines.append(f"{'peak':<{width}}  {self.total_bytes / GIB:8.3f} GiB")
        lines.append(
            f"at {self.tokens:,} tokens ({self.image_tokens:,} of pictures) at once; "
            f"this base's floor is {self.floor_bytes / GIB:.1f} GiB"
        )
        return "\n".join([*lines, *self._verdict()])

    def _verdict(self) -> list[str]:
        if self.memory_bytes is None:
            return []
        if self.does_fit:
            return [f"fits in {self.memory_bytes / GIB:.1f} GiB"]
        lines = [f"does not fit in {self.memory_bytes / GIB:.1f} GiB; one after the other:"]
        for step in self.ladder:
            fit = "fits" if step.does_fit else "not yet"
            lines.append(f"  {step.change}: {step.total_bytes / GIB:.2f} GiB, {fit} ({step.cost})")
        if not (self.ladder and self.ladder[-1].does_fit):
            lines.append("  it does not fit even so: take a smaller base or a larger device")
        return lines

    def as_json(self) -> dict[str, object]:
        return {
            "base": self.base,
            "parts": dict(self.parts),
            "total_bytes": self.total_bytes,
            "floor_bytes": self.floor_bytes,
            "tokens": self.tokens,
            "image_tokens": self.image_tokens,
            "memory_bytes": self.memory_bytes,
            "fits": self.does_fit,
            "ladder": [
                {"change": s.change, "cost": s.cost, "total_bytes": s.total_bytes, "fits": s.does_fit}
                for s in self.ladder
            ],
        }


def fits(total_bytes: int, memory_bytes: int) -> bool:
    """Whether a peak, with the runtime's context and the allocator's gaps, goes into a device."""
    return total_bytes * SLACK + CONTEXT_BYTES <= memory_bytes


def plan_memory(
    shape: BaseShape,
    recipe: Recipe,
    *,
    max_tokens: int | None = None,
    image_tokens: int | None = None,
    num_labels: int | None = None,
    device: Device = "cuda",
    memory_bytes: int | None = None,
) -> MemoryPlan:
    """The peak of a run. ``max_tokens``, ``image_tokens`` and ``num_labels`` are of the largest row; left out, they are
    the recipe's limits: ``max_length``, a picture of ``max_pixels`` (a megapixel if none), a quarter of the tokens.

    Raises TargetsError.
    """
    from training.plan_ladder import climb

    row = _row(recipe, max_tokens, image_tokens, num_labels)
    parts = peak_parts(shape, recipe, row, device)
    lean = replace(recipe, micro_batch=1, accumulation=1, activation_checkpointing=True)
    floor_row = Row(2048, MEGAPIXEL // TOKEN_PIXELS, 512)
    floor = sum(peak_parts(shape, lean, floor_row, device).values())
    total = sum(parts.values())
    ladder: tuple[Step, ...] = ()
    if memory_bytes is not None and not fits(total, memory_bytes):
        ladder = climb(shape, recipe, row, device, memory_bytes)
    tokens, pictures = row.tokens * recipe.micro_batch, row.image_tokens * recipe.micro_batch
    return MemoryPlan(shape.name, parts, floor, tokens, pictures, memory_bytes, ladder)


@dataclass(frozen=True, slots=True)
class Row:
    """The largest row of the data."""

    tokens: int
    image_tokens: int
    labels: int


def _row(recipe: Recipe, max_tokens: int | None, image_tokens: int | None, num_labels: int | None) -> Row:
    tokens = recipe.max_length if max_tokens is None else max_tokens
    pixels = recipe.max_pixels or MEGAPIXEL
    pictures = min(tokens, pixels // TOKEN_PIXELS) if image_tokens is None else image_tokens
    labels = max(1, int(tokens * LABEL_SHARE)) if num_labels is None else num_labels
    return Row(tokens, pictures, labels)


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
