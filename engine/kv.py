"""KVCache: the tensors that hold keys and values, in blocks. It does not know who owns a block."""

from __future__ import annotations

import torch
from torch import Tensor

from base.spec import BaseSpec


def kv_bytes_per_token(spec: BaseSpec, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize


class KVCache:
    """Per layer two tensors ``[num_blocks, block_size, num_kv_heads, head_dim]`` in the base's dtype."""

    def __init__(
        self, spec: BaseSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        # zeros: on a CPU the pages are then taken from the system only when a block is first written
        self.keys: tuple[Tensor, ...] = tuple(
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)
        )
        self.values: tuple[Tensor, ...] = tuple(
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)
        )
        self.num_blocks = num_blocks
        self.block_size = block_size

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))
