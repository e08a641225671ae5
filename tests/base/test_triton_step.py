"""A step's attention beside CUDA equals the reference for decodes, prompts, pieces of prompts and all of them mixed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from base.attention import AttentionPlan, attend_paged, segments_of
from base.triton_attention import Pack, TritonAttention, find_varlen
from tests.support.rotaries import random_rotary

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM, BLOCK_SIZE = 6, 2, 32, 16
STEPS = {
    "decodes": ((1, 20), (1, 1), (1, 33)),
    "a prompt": ((19, 19),),
    "mixed": ((1, 9), (7, 7), (5, 21), (1, 40)),
}
"""Segments as (rows, visible keys)."""


class Layer(nn.Module):
    layer_idx = 0


def plain_varlen(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float) -> Tensor:
    """What ``varlen_attn`` promises, one sequence after the other."""
    parts = []
    bounds = zip(pack.query_starts.tolist(), pack.query_starts.tolist()[1:], strict=False)
    for index, (begin, end) in enumerate(bounds):
        first, last = pack.key_starts[index], pack.key_starts[index + 1]
        rows, keys = end - begin, int(last - first)
        assert rows <= pack.max_rows and keys <= pack.max_keys
        mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
        attended = functional.scaled_dot_product_attention(
            query[begin:end].transpose(0, 1),
            key[first:last].transpose(0, 1),
            value[first:last].transpose(0, 1),
            attn_mask=mask,
            scale=scaling,
            enable_gqa=True,
        )
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)


def step_of(segments: tuple[tuple[int, int], ...], dtype: torch.dtype) -> AttentionPlan:
    """Blocks scattered over a cache that is full of numbers."""
    generator = torch.Generator().manual_seed(3)
    needed = [-(-keys // BLOCK_SIZE) for _, keys in segments]
    order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    tables = [tuple(order.pop() for _ in range(count)) for count in needed]
    slots = [
        table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
        for table, (rows, keys) in zip(tables, segments, strict=True)
        for place in range(keys - rows, keys)
    ]
    shape = (sum(needed) + 2, BLOCK_SIZE, KV_HEADS, DIM)
    caches = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2)]
    starts = [0]
    for rows, _ in segments:
        starts.append(starts[-1] + rows)
    return AttentionPlan(
        query_starts=tuple(starts),
        context_lens=tuple(keys for _, keys in segments),
        block_tables=tuple(tables),
        slot_mapping=torch.tensor(slots, device=DEVICE),
        key_cache=(caches[0],),
        value_cache=(caches[1],),
        block_size=BLOCK_SIZE,
    )


@pytest.mark.parametrize("segments", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize(
    ("dtype", "is_packed"), [(torch.float32, False), (torch.float16, False), (torch.float16, True)]
)
def test_a_step_equals_the_reference(
    segments: tuple[tuple[int, int], ...], dtype: torch.dtype, is_packed: bool
) -> None:
    plan = step_of(segments, dtype)
    num_rows = plan.query_starts[-1]
    generator = torch.Generator().manual_seed(4)
    merged = torch.randn(num_rows, HEADS + 2 * KV_HEADS, DIM, generator=generator).to(DEVICE, dtype)
    query, key, value = merged.split((HEADS, KV_HEADS, KV_HEADS), 1)
    rotary = random_rotary(num_rows, DIM, dtype, DEVICE)
    attention = TritonAttention(plain_varlen if is_packed else None)
    found = attention.begin(plan, dtype)(0, query, key, value, rotary, 0.2)
    stored = [cache[0].clone() for cache in (plan.key_cache, plan.value_cache)]
    heads = [rows.transpose(0, 1).unsqueeze(0) for rows in (rotary(query), rotary(key), value)]
    segments_now = segments_of(plan)
    expected, _ = attend_paged(
        Layer(), heads[0], heads[1], heads[2], None, plan=plan, segments=segments_now, scaling=0.2
    )
    tolerance = 1e-5 if dtype is torch.float32 else 2e-3
    torch.testing.assert_close(found, expected[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(stored[0], plan.key_cache[0]) and torch.equal(stored[1], plan.value_cache[0])


def test_this_torchs_varlen_is_found_or_the_loop_is_taken() -> None:
    """The pinned torch has it; an older one must not be an error."""
    assert find_varlen() is None or callable(find_varlen())


@pytest.mark.gpu
@pytest.mark.parametrize("segments", STEPS.values(), ids=STEPS.keys())
def test_varlen_equals_the_loop(segments: tuple[tuple[int, int], ...]) -> None:
    varlen = find_varlen()
    if varlen is None:
        pytest.skip("this torch has no varlen_attn with grouped heads")
    rows = sum(count for count, _ in segments)
    query, key, value = (
        torch.randn(rows, heads, DIM, device=DEVICE, dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    results = [
        TritonAttention(way).begin(step_of(segments, torch.bfloat16), torch.bfloat16)(
            0, query, key, value, random_rotary(rows, DIM, torch.bfloat16, DEVICE), 0.2
        )
        for way in (varlen, None)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)
