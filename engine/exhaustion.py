"""Out of memory, as torch and Python say it, and Ceiling: how large a step may be after one that found no room.

Knows no request and no tensor. Place in a request's way: step 8, when a step throws.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.step import Chunk, StepPlan

RECOVERY_STEPS = 64
"""So many steps without trouble double the ceiling: what took the memory may have left."""
_PHRASES = ("out of memory", "allocate memory", "ALLOC_FAILED")
"""RuntimeErrors that mean it: CUDA's own, the CPU allocator's, and cuBLAS's."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once could help."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


class Ceiling:
    """Tokens that a step may take. None until a step has run out of memory; then half of that step, growing back."""

    def __init__(self) -> None:
        self.num_tokens: int | None = None
        self._highest = 0
        self._num_quiet = 0

    @property
    def is_lifted(self) -> bool:
        """Whether steps may be as large as they like."""
        return self.num_tokens is None

    def lower(self, num_tokens: int) -> None:
        """A step of so many tokens found no room."""
        if self.num_tokens is None or num_tokens > self._highest:
            self._highest = num_tokens
        self.num_tokens = max(1, num_tokens // 2)
        self._num_quiet = 0

    def note_success(self) -> None:
        """A whole step ran."""
        if self.num_tokens is None:
            return
        self._num_quiet += 1
        if self._num_quiet >= RECOVERY_STEPS:
            self._num_quiet = 0
            self.num_tokens *= 2
            if self.num_tokens >= self._highest:
                self.num_tokens = None

    def parts(self, plan: StepPlan) -> Iterator[StepPlan]:
        """The plan in pieces within the ceiling, in order. A chunk is never cut: it goes alone if it is larger."""
        if self.num_tokens is None or plan.num_tokens <= self.num_tokens:
            yield plan
            return
        piece: list[Chunk] = []
        for chunk in plan.chunks:
            if piece and sum(c.num_tokens for c in piece) + chunk.num_tokens > self.num_tokens:
                yield plan.only(piece)
                piece = []
            piece.append(chunk)
        yield plan.only(piece)


def halves(chunk: Chunk) -> tuple[Chunk, Chunk]:
    """A chunk of two tokens or more as two."""
    middle = chunk.num_tokens // 2
    return (
        Chunk(chunk.sequence, chunk.start, middle),
        Chunk(chunk.sequence, chunk.start + middle, chunk.num_tokens - middle),
    )
