"""TorchAttention: paged attention in plain torch, for every device; what CPUs serve with where nothing is compiled.

It rotates, writes the step's keys and values to the cache, then computes two kinds of segments. Those of several rows
(prompts and their pieces) go one by one. Those of one row (decodes) go together, one call for all whose contexts round
up to the same number of keys: query heads of one key head lie as rows of one product, so keys are not repeated, and
what a row computes has a shape that depends on its own context alone. So its bits do not depend on its neighbours. A
padding key is the row's own first one under a mask, so that nothing another request left behind, a NaN least of all, is
read.

Owns: index tensors and masks, made once a step for all layers. Place in a request's way: step 8, under the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from base.attention import AttentionPlan, Segment, segments_of
from base.rotary import Rotary

MIN_KEYS: Final = 64
"""Contexts of decodes round up to multiples of this, and of an eighth of their size: at most an eighth is padding."""


def padded_length(length: int) -> int:
    """The number of keys, padding included, over which one row with ``length`` visible keys attends; at least it."""
    step = max(MIN_KEYS, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


@dataclass(frozen=True, slots=True, eq=False)
class DecodeGroup:
    """N segments of one row each, whose contexts round up to the same P keys."""

    rows: Tensor | None  # [N] int64 among the step's T; None: all of them, in order
    slots: Tensor  # [N * P] int64: where each key lies in the flat cache
    mask: Tensor  # [N, 1, 1, P] in the queries' dtype: 0 or, at padding, -inf
    num_keys: int


class TorchAttention:
    """A PagedAttention."""

    def begin(self, plan: AttentionPlan, dtype: torch.dtype) -> TorchStep:
        return TorchStep(plan, dtype)


class TorchStep:
    """One step's attention, layer by layer. Valid for its plan only."""

    def __init__(self, plan: AttentionPlan, dtype: torch.dtype) -> None:
        self._plan = plan
        segments = segments_of(plan)
        self._long = [segment for segment in segments if segment.end - segment.begin > 1]
        self._decodes = _decode_groups(plan, dtype)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, scaling: float
    ) -> Tensor:
        """As ``LayerAttention``'s."""
        plan = self._plan
        query, key = rotary(query), rotary(key)
        keys, values = plan.key_cache[layer], plan.value_cache[layer]
        flat_keys, flat_values = keys.view(-1, *keys.shape[2:]), values.view(-1, *values.shape[2:])
        flat_keys.index_copy_(0, plan.slot_mapping, key)
        flat_values.index_copy_(0, plan.slot_mapping, value)
        if len(self._decodes) == 1 and self._decodes[0].rows is None:
            return _attend_decodes(query, flat_keys, flat_values, self._decodes[0], scaling)
        output = torch.empty_like(query)
        for group in self._decodes:
            if group.rows is None:
                raise ValueError("a group of all rows is not alone")
            attended = _attend_decodes(
                query.index_select(0, group.rows), flat_keys, flat_values, group, scaling
            )
            output.index_copy_(0, group.rows, attended)
        for segment in self._long:
            output[segment.begin : segment.end] = attend_segment(query, keys, values, segment, scaling)
        return output


def _attend_decodes(
    query: Tensor, flat_keys: Tensor, flat_values: Tensor, group: DecodeGroup, scaling: float
) -> Tensor:
    """query [N, heads, dim] -> as query."""
    num_rows, num_heads, dim = query.shape
    num_kv_heads = flat_keys.shape[1]
    shape = (num_rows, group.num_keys, num_kv_heads, dim)
    operands: tuple[Tensor, ...] = (
        query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, dim),
        flat_keys.index_select(0, group.slots).view(shape).transpose(1, 2),
        flat_values.index_select(0, group.slots).view(shape).transpose(1, 2),
        group.mask,
    )
    if num_rows * num_kv_heads == 1:
        # a product that has one matrix alone is cut among the threads, and its sums are others: let it have two
        operands = tuple(operand.repeat(2, 1, 1, 1) for operand in operands)
    query, key, value, mask = operands
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return attended[:num_rows].reshape(num_rows, num_heads, dim)


def attend_segment(query: Tensor, keys: Tensor, values: Tensor, segment: Segment, scaling: float) -> Tensor:
    """Causal attention of one segment's rows of query [T, heads, dim]: [rows, heads, dim]."""
    attended = functional.scaled_dot_product_attention(
        query[segment.begin : segment.end].transpose(0, 1).unsqueeze(0),
        _gather(keys, segment),
        _gather(values, segment),
        attn_mask=segment.mask,
        is_causal=segment.is_causal,
        scale=scaling,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


def _gather(cache: Tensor, segment: Segment) -> Tensor:
    """One segment's rows of the cache: [1, heads, length, dim]."""
    rows = cache.index_select(0, segment.blocks).flatten(0, 1)[: segment.length]
    return rows.transpose(0, 1).unsqueeze(0)


def _decode_groups(plan: AttentionPlan, dtype: torch.dtype) -> list[DecodeGroup]:
    """The plan's segments of one row, by padded length."""
    members: dict[int, list[int]] = {}
    for index, (begin, end) in enumerate(zip(plan.query_starts, plan.query_starts[1:], strict=False)):
        if end - begin == 1:
            members.setdefault(padded_length(plan.context_lens[index]), []).append(index)
    return [_decode_group(plan, num_keys, indices, dtype) for num_keys, indices in sorted(members.items())]


def _decode_group(
    plan: AttentionPlan, num_keys: int, indices: Sequence[int], dtype: torch.dtype
) -> DecodeGroup:
    device, size = plan.slot_mapping.device, plan.block_size
    num_blocks = -(-num_keys // size)
    # a row's blocks, then its first one again
    tables = torch.tensor(
        [_padded(plan.block_tables[i][:num_blocks], num_blocks) for i in indices]
    )  # [N, blocks]
    places = (tables.unsqueeze(-1) * size + torch.arange(size)).flatten(1)[:, :num_keys]  # [N, P]
    is_padding = torch.arange(num_keys) >= torch.tensor([plan.context_lens[i] for i in indices]).unsqueeze(1)
    slots = torch.where(is_padding, places[:, :1], places).flatten()
    mask = torch.zeros(places.shape, dtype=dtype).masked_fill_(is_padding, float("-inf"))
    rows = [plan.query_starts[i] for i in indices]
    is_all = rows == list(range(plan.query_starts[-1]))
    return DecodeGroup(
        rows=None if is_all else torch.tensor(rows, device=device),
        slots=slots.to(device),
        mask=mask.to(device)[:, None, None, :],
        num_keys=num_keys,
    )


def _padded(table: Sequence[int], length: int) -> list[int]:
    return [*table, *([table[0]] * (length - len(table)))]
