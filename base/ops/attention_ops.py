"""Attention of decodes over a paged cache, and rotate-and-store, started on a step's device tensors.

base.attention is the plain twin. Everything that changes between steps is read on the device, and memory comes from
torch's allocator, so that calls can be captured in a CUDA graph whose tensors are then refilled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

WANTED_PROGRAMS: Final = 264
"""Two for each of an H100's 132 multiprocessors."""
MAX_SPLITS: Final = 16
MAX_GROUP: Final = 16


@dataclass(frozen=True, slots=True)
class AttentionLaunch:
    splits: int
    """Programs along the keys of one sequence."""
    block_keys: int = 64
    warps: int = 4
    stages: int = 3


def attention_launch(num_rows: int, num_kv_heads: int) -> AttentionLaunch:
    """By rows and heads alone: how long a sequence is, only the device knows when a graph is replayed."""
    return AttentionLaunch(max(1, min(MAX_SPLITS, WANTED_PROGRAMS // (num_rows * num_kv_heads))))


def attend_decodes(
    query: Tensor,  # [S, heads, dim]
    key_cache: Tensor,  # [num_blocks, block_size, kv_heads, dim]
    value_cache: Tensor,
    block_tables: Tensor,  # [S, max_blocks] int32, each covering its length
    context_lens: Tensor,  # [S] int32
    scaling: float,
    launch: AttentionLaunch | None = None,
) -> Tensor:
    """Each sequence's one new token over all its keys, its own among them: [S, heads, dim], zeros where there is none.

    Raises ValueError for heads that do not fit the kernel.
    """
    from base.ops.kernels import attention as kernels
    from base.ops.kernels.rounding import ELEMENTS, IS_INTERPRETED

    num_rows, num_heads, dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1], key_cache.shape[2]
    group = num_heads // num_kv_heads
    if group > MAX_GROUP or dim & (dim - 1) or dim < 16 or query.stride(1) != dim or query.stride(2) != 1:
        raise ValueError(
            f"{group} query heads of {dim} to a key head, or how they lie in memory, do not fit the kernel"
        )
    sizes = launch or attention_launch(num_rows, num_kv_heads)
    sums = torch.empty((num_rows, num_heads, sizes.splits, dim), dtype=torch.float32, device=query.device)
    tops = torch.empty((2, num_rows, num_heads, sizes.splits), dtype=torch.float32, device=query.device)
    out = torch.empty((num_rows, num_heads, dim), dtype=query.dtype, device=query.device)
    dtype = ELEMENTS[query.dtype]
    kernels.attend[(num_rows, num_kv_heads, sizes.splits)](
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        sums,
        tops,
        block_tables.stride(0),
        num_heads,
        query.stride(0),
        scaling * math.log2(math.e),
        GROUP=group,
        DIM=dim,
        DTYPE=dtype,
        STRIDE_SLOT=num_kv_heads * dim,
        BLOCK_SIZE=block_size,
        SPLITS=sizes.splits,
        BLOCK_N=sizes.block_keys,
        UPCAST=IS_INTERPRETED,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    kernels.join[(num_rows * num_heads,)](
        sums,
        tops,
        out,
        num_rows * num_heads * sizes.splits,
        DIM=dim,
        DTYPE=dtype,
        SPLITS=sizes.splits,
        UPCAST=IS_INTERPRETED,
        num_warps=1,
    )
    return out


def rotate_and_store(
    query: Tensor,  # [T, heads, dim]
    key: Tensor,  # [T, kv_heads, dim]
    value: Tensor,  # [T, kv_heads, dim]
    cos: Tensor,  # [T, dim], of the query's dtype, sections of the multimodal rotary put together
    sin: Tensor,  # [T, dim], the first half negative, as base.rotary has it
    slot_mapping: Tensor,  # [T] int64, -1 for a row that goes nowhere
    key_cache: Tensor,  # [num_blocks, block_size, kv_heads, dim]
    value_cache: Tensor,
) -> Tensor:
    """Write rotated keys, and values, to the cache; the rotated queries [T, heads, dim], a new tensor.

    Rows may be slices of one merged output. To the bit ``base.rotary`` and a plain store. Raises ValueError where
    heads, or how they lie in memory, do not fit the kernel.
    """
    from base.ops.kernels import attention as kernels
    from base.ops.kernels.rounding import ELEMENTS, IS_INTERPRETED

    num_rows, num_heads, dim = query.shape
    num_kv_heads = key.shape[1]
    if dim & (dim - 1) or any(rows.stride(1) != dim or rows.stride(2) != 1 for rows in (query, key, value)):
        raise ValueError(f"heads of {dim} numbers, or how they lie in memory, do not fit the kernel")
    if not (cos.is_contiguous() and sin.is_contiguous()) or not cos.shape == sin.shape == (num_rows, dim):
        raise ValueError(f"cosines and sines of [{num_rows}, {dim}] expected, not {tuple(cos.shape)}")
    out = torch.empty((num_rows, num_heads, dim), dtype=query.dtype, device=query.device)
    kernels.rotate_store[(num_rows, 3)](
        out,
        query,
        key,
        value,
        cos,
        sin,
        slot_mapping,
        key_cache,
        value_cache,
        STRIDE_Q=query.stride(0),
        STRIDE_K=key.stride(0),
        STRIDE_V=value.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        TILE=1 << (num_heads - 1).bit_length(),
        KV_TILE=1 << (num_kv_heads - 1).bit_length(),
        DIM=dim,
        DTYPE=ELEMENTS[query.dtype],
        UPCAST=IS_INTERPRETED,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
