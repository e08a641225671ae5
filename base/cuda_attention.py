"""Attention on CUDA: TritonAttention where it agrees with TorchAttention here.

Owns: that choice. Place in a request's way: none; once, at load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from base.attention import AttentionPlan, PagedAttention
from base.config import CudaKernels
from base.kernel_check import Case, may_serve
from base.rotary import Rotary
from base.torch_attention import TorchAttention
from base.triton_attention import TritonAttention, Varlen, find_varlen

BLOCK_SIZE: Final = 16
"""Tokens of a KV block: the engine's."""
Segments = Sequence[tuple[int, int]]
"""(rows, visible keys) of each sequence of a step."""
DECODES: Final[tuple[Segments, ...]] = (
    ((1, 1),),
    ((1, 700), (1, 33), (1, 16)),
    tuple((1, 1 + 97 * place) for place in range(17)),
    ((1, 40), (19, 19), (1, 9), (5, 300)),
)
PROMPTS: Final[tuple[Segments, ...]] = (((19, 19),), ((5, 300), (130, 130)), ((1, 40), (19, 19), (5, 300)))


@dataclass(frozen=True, slots=True)
class Heads:
    """A base's attention."""

    num_heads: int
    num_kv_heads: int
    dim: int


def choose_attention(
    heads: Heads, dtype: torch.dtype, choice: CudaKernels, device: torch.device
) -> tuple[PagedAttention, dict[str, str]]:
    """The attention to build the decoder over, and who computes what of it.

    Raises KernelRefused where ``triton`` was insisted on and does not serve.
    """
    if not may_serve("attention", lambda: try_attention(None, DECODES, heads, dtype, device), choice, device):
        return TorchAttention(), {"attention": "torch", "prompts": "torch"}
    varlen = find_varlen()
    if varlen is None or dtype == torch.float32:
        return TritonAttention(None), {"attention": "triton", "prompts": "torch"}
    if not may_serve("prompts", lambda: try_attention(varlen, PROMPTS, heads, dtype, device), choice, device):
        return TritonAttention(None), {"attention": "triton", "prompts": "torch"}
    return TritonAttention(varlen), {"attention": "triton", "prompts": "varlen"}


def try_attention(
    varlen: Varlen | None,
    steps: Sequence[Segments],
    heads: Heads,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Case]:
    """Each step over a paged cache of its own, by both; what they wrote to it is compared too."""
    ours, plain = TritonAttention(varlen), TorchAttention()
    for number, segments in enumerate(steps):
        plan = _plan(segments, heads, dtype, device, number)
        twin = replace(
            plan, key_cache=(plan.key_cache[0].clone(),), value_cache=(plan.value_cache[0].clone(),)
        )
        num_rows, scaling = plan.query_starts[-1], heads.dim**-0.5
        query, key, value = _projected(num_rows, heads, dtype, device)
        rotary = _rotary(num_rows, heads.dim, dtype, device)
        found = ours.begin(plan, dtype)(0, query, key, value, rotary, scaling)
        what = f"{len(segments)} sequences of {num_rows} rows"
        yield what, found, plain.begin(twin, dtype)(0, query, key, value, rotary, scaling)
        yield f"the keys of {what}", plan.key_cache[0], twin.key_cache[0]
        yield f"the values of {what}", plan.value_cache[0], twin.value_cache[0]


def _plan(
    segments: Segments, heads: Heads, dtype: torch.dtype, device: torch.device, seed: int
) -> AttentionPlan:
    """Blocks scattered over a cache that is full of numbers."""
    needed = [-(-keys // BLOCK_SIZE) for _, keys in segments]
    num_blocks = sum(needed) + 2
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    ends = list(accumulate(needed))
    tables = tuple(tuple(order[end - count : end]) for end, count in zip(ends, needed, strict=True))
    slots = [
        table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
        for table, (rows, keys) in zip(tables, segments, strict=True)
        for place in range(keys - rows, keys)
    ]
    shape = (num_blocks, BLOCK_SIZE, heads.num_kv_heads, heads.dim)
    return AttentionPlan(
        query_starts=(0, *accumulate(rows for rows, _ in segments)),
        context_lens=tuple(keys for _, keys in segments),
        block_tables=tables,
        slot_mapping=torch.tensor(slots, device=device),
        key_cache=(_numbers(shape, 3).to(device, dtype),),
        value_cache=(_numbers(shape, 4).to(device, dtype),),
        block_size=BLOCK_SIZE,
    )


def _projected(num_rows: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Queries, keys and values [rows, heads, dim], side by side in memory as one product leaves them."""
    counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    merged = _numbers((num_rows, sum(counts), heads.dim), 0).to(device, dtype)
    return tuple(merged.split(counts, 1))


def _rotary(num_rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> Rotary:
    angles = 3 * _numbers((num_rows, dim // 2), 1).repeat(1, 2)
    return Rotary(angles.cos().to(device, dtype), angles.sin().to(device, dtype))


def _numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
