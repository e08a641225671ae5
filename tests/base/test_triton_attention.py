"""Paged decode attention and rotate-and-store equal the plain way, in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import rotate_half

from base.attention import AttentionPlan, attend_paged, segments_of
from base.ops.attention_ops import AttentionLaunch, attend_decodes, attention_launch, rotate_and_store
from base.rotary import Rotary
from tests.support.rotaries import random_rotary

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@dataclass(frozen=True)
class Paged:
    """A cache with a sequence of each length in scattered blocks, and what is not theirs full of NaN."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], kv_heads: int, dim: int, dtype: torch.dtype) -> Paged:
        needed = [-(-length // BLOCK_SIZE) for length in lengths]
        order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(1)).tolist()
        shape = (len(order), BLOCK_SIZE, kv_heads, dim)
        keys, values = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
        tables = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
        for row, length in enumerate(lengths):
            mine = [order.pop() for _ in range(needed[row])]
            tables[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            for place in range(length):
                where = mine[place // BLOCK_SIZE], place % BLOCK_SIZE
                keys[where] = torch.randn(kv_heads, dim)
                values[where] = torch.randn(kv_heads, dim)
        device_lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        return cls(keys.to(DEVICE, dtype), values.to(DEVICE, dtype), tables.to(DEVICE), device_lengths)


def plain(query: Tensor, paged: Paged, row: int, scaling: float) -> Tensor:
    """One row, in fp64: [heads, dim]."""
    length = int(paged.lengths[row])
    blocks = paged.tables[row, : -(-length // BLOCK_SIZE)].long()
    keys, values = (
        cache[blocks].flatten(0, 1)[:length].transpose(0, 1).double() for cache in (paged.keys, paged.values)
    )
    group = query.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = (query[row].double()[:, None] @ keys.mT).squeeze(1) * scaling
    return (scores.softmax(-1)[:, None] @ values).squeeze(1)


LENGTHS = {"one key": [1], "a full block": [16], "mixed": [5, 0, 70, 33], "long beside short": [120, 1]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "splits"), [(14, 2, 64, 3), (8, 1, 128, 1)])
def test_decodes_equal_the_plain_way(
    lengths: Sequence[int], dtype: torch.dtype, heads: int, kv_heads: int, dim: int, splits: int
) -> None:
    paged = Paged.of(lengths, kv_heads, dim, dtype)
    query = randn(len(lengths), heads, dim, dtype=dtype)
    launch = AttentionLaunch(splits, block_keys=32)
    found = attend_decodes(query, paged.keys, paged.values, paged.tables, paged.lengths, 0.11, launch)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}[dtype]
    for row, length in enumerate(lengths):
        expected = plain(query, paged, row, 0.11) if length else torch.zeros(heads, dim, device=DEVICE)
        torch.testing.assert_close(found[row].double(), expected.double(), rtol=tolerance, atol=tolerance)


class Layer(nn.Module):
    layer_idx = 0


def test_decodes_equal_the_engines_plain_attention() -> None:
    """``attend_paged`` with one new token a sequence, which it also stores."""
    lengths = [40, 3, 17]
    paged = Paged.of(lengths, 2, 64, torch.float32)
    query, key, value = (randn(1, heads, 3, 64, dtype=torch.float32, seed=heads) for heads in (8, 2, 2))
    slots = [
        int(paged.tables[row, (length - 1) // BLOCK_SIZE]) * BLOCK_SIZE + (length - 1) % BLOCK_SIZE
        for row, length in enumerate(lengths)
    ]
    plan = AttentionPlan(
        query_starts=(0, 1, 2, 3),
        context_lens=tuple(lengths),
        block_tables=tuple(tuple(row) for row in paged.tables.tolist()),
        slot_mapping=torch.tensor(slots, device=DEVICE),
        key_cache=(paged.keys,),
        value_cache=(paged.values,),
        block_size=BLOCK_SIZE,
    )
    expected, _ = attend_paged(
        Layer(), query, key, value, None, plan=plan, segments=segments_of(plan), scaling=0.125
    )
    rows = query[0].transpose(0, 1).contiguous()
    found = attend_decodes(
        rows, paged.keys, paged.values, paged.tables, paged.lengths, 0.125, AttentionLaunch(2)
    )
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it_and_follows_the_device() -> None:
    paged = Paged.of([70, 21, 50], 2, 64, torch.float16)
    query, launch = randn(3, 6, 64, dtype=torch.float16), AttentionLaunch(2, block_keys=32)
    args = (paged.keys, paged.values, paged.tables, paged.lengths)
    together = attend_decodes(query, *args, 0.1, launch)
    for row in range(3):
        one = slice(row, row + 1)
        alone = attend_decodes(
            query[one], paged.keys, paged.values, paged.tables[one], paged.lengths[one], 0.1, launch
        )
        assert torch.equal(alone[0], together[row])
    paged.lengths[0] = 30
    shorter = attend_decodes(query, *args, 0.1, launch)
    assert not torch.equal(shorter[0], together[0])
    assert torch.equal(shorter[1:], together[1:])
    torch.testing.assert_close(shorter[0].double(), plain(query, paged, 0, 0.1), rtol=2e-3, atol=2e-3)


def test_heads_that_do_not_fit_are_refused() -> None:
    paged = Paged.of([3], 1, 64, torch.float16)
    with pytest.raises(ValueError, match="17 query heads"):
        attend_decodes(
            randn(1, 17, 64, dtype=torch.float16), paged.keys, paged.values, paged.tables, paged.lengths, 1.0
        )


@pytest.mark.parametrize(("rows", "kv_heads"), [(1, 2), (16, 4), (64, 2), (128, 4)])
def test_splits_fill_the_device_and_no_more(rows: int, kv_heads: int) -> None:
    splits = attention_launch(rows, kv_heads).splits
    assert 1 <= splits <= 16
    assert splits == 1 or rows * kv_heads * splits <= 264


HEAD_COUNTS = {
    "grouped": (6, 2),
    "the 7B's": (28, 4),
    "one each": (1, 1),
    "an odd number of key heads": (9, 3),
}


def projected(num_rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values, slices of one merged output."""
    merged = randn(num_rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    parts = merged.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    return tuple(part.unflatten(1, (-1, dim)) for part in parts)


@pytest.mark.parametrize(("heads", "kv_heads"), HEAD_COUNTS.values(), ids=HEAD_COUNTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate_and_store_is_transformers_rotary_and_the_plain_store(
    dtype: torch.dtype, heads: int, kv_heads: int
) -> None:
    num_rows, dim = 5, 32
    query, key, value = projected(num_rows, heads, kv_heads, dim, dtype)
    before = [part.clone() for part in (query, key, value)]
    angles = torch.randn(num_rows, dim // 2).repeat(1, 2).to(DEVICE)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    new_query, new_key = (each * cos[:, None] + rotate_half(each) * sin[:, None] for each in (query, key))
    slots = torch.tensor([35, 0, -1, 17, 18], device=DEVICE)
    shape = (3, BLOCK_SIZE, kv_heads, dim)
    key_cache, value_cache = (torch.full(shape, 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    rotary = Rotary(cos, sin)
    found = rotate_and_store(query, key, value, rotary.cos, rotary.sin, slots, key_cache, value_cache)
    assert torch.equal(found, new_query)
    assert torch.equal(rotary(query), new_query) and torch.equal(rotary(key), new_key)
    used = slots >= 0
    keys, values = key_cache.flatten(0, 1), value_cache.flatten(0, 1)
    assert torch.equal(keys[slots[used]], new_key[used])
    assert torch.equal(values[slots[used]], value[used])
    keys[slots[used]], values[slots[used]] = 7.0, 7.0
    assert (keys == 7.0).all() and (values == 7.0).all()  # nothing else was written
    for part, old in zip((query, key, value), before, strict=True):
        assert torch.equal(part, old)


def test_heads_and_turns_that_do_not_fit_are_refused() -> None:
    query, key, value = projected(3, 2, 1, 32, torch.float16)
    rotary = random_rotary(3, 32, torch.float16, DEVICE)
    slots = torch.arange(3, device=DEVICE)
    caches = [torch.zeros(1, BLOCK_SIZE, 1, 32, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    across = query.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="heads of 32 numbers"):
        rotate_and_store(across, key, value, rotary.cos, rotary.sin, slots, *caches)
    with pytest.raises(ValueError, match=r"\[3, 32\] expected"):
        rotate_and_store(query, key, value, rotary.cos[:2], rotary.sin, slots, *caches)
