"""MemoryPlan: what a training run takes of a device's memory, by part, before anything is loaded.

Owns: the plan as a value and as text, and the floor. Figures are bytes that tensors hold
(``torch.cuda.max_memory_allocated``); the runtime's own context comes beside them. Does not know: a device's free
memory (the caller gives it), time (`time.py`). Place in a training run: after the data's check, before the base is
loaded; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from training.plan.ladder import Step, climb
from training.plan.peak import Device, Row, fits, peak_parts
from training.plan.shape import BaseShape
from training.recipe.recipe import Recipe

GIB = 1 << 30
MEGAPIXEL = 1_000_000
TOKEN_PIXELS = 28 * 28
LABEL_SHARE = 0.25
"""Of a row's tokens, where the data has not been counted: an answer is rarely more."""


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


def _row(recipe: Recipe, max_tokens: int | None, image_tokens: int | None, num_labels: int | None) -> Row:
    tokens = recipe.max_length if max_tokens is None else max_tokens
    pixels = recipe.max_pixels or MEGAPIXEL
    pictures = min(tokens, pixels // TOKEN_PIXELS) if image_tokens is None else image_tokens
    labels = max(1, int(tokens * LABEL_SHARE)) if num_labels is None else num_labels
    return Row(tokens, pictures, labels)
