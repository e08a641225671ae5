"""LoraLaunch: the sizes that Triton's LoRA kernels are started with, chosen by shape and never tuned within a request.

A chunk of the input depends on the linear's width alone, so that a row's sums have one order in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SHORT_ROWS: Final = 256
"""Up to as many rows, chunks run in programs of their own; beyond, the rows alone fill the device."""
MAX_CHUNKS: Final = 16
"""An expand reads every chunk's partial sums: more would cost it more than they save the shrink."""


@dataclass(frozen=True, slots=True)
class LoraLaunch:
    block_k: int
    """Inputs of one product."""
    chunk: int
    """Inputs summed apart, a multiple of ``block_k``."""
    block_n: int
    """Outputs of one program of expand."""
    shrink_warps: int = 4
    shrink_stages: int = 3
    expand_warps: int = 4

    def num_chunks(self, num_in: int) -> int:
        return -(-num_in // self.chunk)

    def parts(self, num_in: int, num_rows: int) -> int:
        """Programs along the input; either all chunks apart or one program for all."""
        return self.num_chunks(num_in) if num_rows <= SHORT_ROWS else 1


def lora_launch(num_in: int) -> LoraLaunch:
    """By the linear's input width: chunks of at least 256, at most 16 of them."""
    block_k = 128
    least = -(-num_in // MAX_CHUNKS)
    return LoraLaunch(block_k=block_k, chunk=max(2 * block_k, -(-least // block_k) * block_k), block_n=128)
