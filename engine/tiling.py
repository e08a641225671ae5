"""Tiling: where a sequence's tokens may be cut into pieces. Pure; the scheduler, the batch and the prefix keys ask it.

On a CPU the rounding of a row's attention depends on which rows and how many keys are computed in one call. So the
calls are made the same whoever else is in the step and wherever a chunk ends: prompts are attended in tiles that end at
multiples of ``size``, generated tokens one by one, also when a preempted sequence computes them again. A row's bits
then depend on its sequence alone, chunks may end at any tile, and a cached prefix is what would be computed.

On a GPU, where rounding depends on the number of rows in other products too, chunks are attended whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CPU_TILE = 32
"""Tokens: as fast as 256 (bench/LOG.md, 2026-11-29), and the least that a prompt can delay others by."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """``num_prompt`` is the sequence's prompt length; positions count from its first token."""

    size: int = CPU_TILE
    is_exact: bool = True
    """Whether attention is computed tile by tile."""

    def is_cut(self, position: int, num_prompt: int) -> bool:
        """Whether a chunk may begin or end there; the end of what exists is always one."""
        return position >= num_prompt or position % self.size == 0

    def cut_after(self, position: int, num_prompt: int) -> int:
        """The next cut."""
        return min(num_prompt, self.tile_end(position)) if position < num_prompt else position + 1

    def cut_within(self, position: int, limit: int, num_prompt: int) -> int:
        """The last cut from ``position`` on, at most ``limit``; ``position`` itself where there is none."""
        end = limit if limit >= num_prompt else limit // self.size * self.size
        return max(position, end)

    def tile_end(self, position: int) -> int:
        """Where the tile of the token at ``position`` ends, in a prompt that is long enough."""
        return (position // self.size + 1) * self.size

    def pieces(self, begin: int, end: int, num_prompt: int) -> Iterator[tuple[int, int]]:
        """``[begin, end)`` as the pieces that are attended in one call each."""
        if not self.is_exact:
            yield begin, end
            return
        while begin < end:
            piece_end = min(end, self.cut_after(begin, num_prompt))
            yield begin, piece_end
            begin = piece_end
