"""Nf4Launch: the sizes that the fused 4-bit product is started with, by shape; never tuned within a request.

Made from the card's limits; a bench may replace it: ``Nf4Launch`` is what it measures and hands over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WANTED_PROGRAMS: Final = 264
"""Two for each of an H100's 132 multiprocessors, so that one loads while the other multiplies."""
MAX_PARTS: Final = 8
"""Partial sums are written and read in float32: beyond eight they weigh as much as the weights."""
FUSED_ROWS: Final = 128
"""Beyond, dequantise and multiply. To be replaced by what is measured."""


@dataclass(frozen=True, slots=True)
class Nf4Launch:
    block_m: int
    block_n: int
    parts: int
    warps: int
    stages: int


def nf4_launch(num_rows: int, num_in: int, num_out: int) -> Nf4Launch:
    """More rows take wider programs, since each reads all of x; narrow outputs are split along the input."""
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    block_n, warps = (128, 4) if num_rows <= 32 else (256, 8)
    num_programs = -(-num_out // block_n) * -(-num_rows // block_m)
    wanted = max(1, min(MAX_PARTS, WANTED_PROGRAMS // num_programs))
    num_blocks = num_in // 64
    per_part = -(-num_blocks // wanted)
    return Nf4Launch(block_m, block_n, -(-num_blocks // per_part), warps, stages=4)
