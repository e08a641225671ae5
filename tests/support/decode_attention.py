"""Paged attention whose decodes read all that changes from tensors, in plain torch: what a recording is tested over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from base.attention import AttentionPlan, LayerAttention, PlanTensors
from base.rotary import Rotary
from base.torch_attention import TorchAttention


@dataclass(frozen=True)
class PlainDecodeAttention:
    """A PagedAttention and a DecodeAttention. Tables are ``max_blocks`` wide: a row has one shape everywhere."""

    max_blocks: int
    lengths_of: Callable[[PlanTensors], Callable[[], Tensor]] = lambda tensors: lambda: tensors.context_lens
    """Where a step's lengths come from, asked once when it begins and then once a layer."""

    def begin(self, plan: AttentionPlan, dtype: torch.dtype) -> LayerAttention:
        if plan.query_starts != tuple(range(len(plan.query_starts))):
            return TorchAttention().begin(plan, dtype)
        tensors = plan_tensors(plan)
        spare = self.max_blocks - tensors.block_table.shape[1]
        table = functional.pad(tensors.block_table, (0, spare))
        return PlainDecodes(
            replace(tensors, block_table=table),
            plan.key_cache,
            plan.value_cache,
            lambda: tensors.context_lens,
        )

    def begin_decodes(
        self, tensors: PlanTensors, key_cache: Sequence[Tensor], value_cache: Sequence[Tensor]
    ) -> LayerAttention:
        return PlainDecodes(tensors, key_cache, value_cache, self.lengths_of(tensors))


class PlainDecodes:
    def __init__(
        self,
        tensors: PlanTensors,
        key_cache: Sequence[Tensor],
        value_cache: Sequence[Tensor],
        lengths: Callable[[], Tensor],
    ) -> None:
        self._tensors = tensors
        self._keys, self._values = key_cache, value_cache
        self._lengths = lengths

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, scaling: float
    ) -> Tensor:
        """A key that is none is the row's first one, under a mask: what others left in a block is not read."""
        query, key = rotary(query), rotary(key)
        keys, values = self._keys[layer].flatten(0, 1), self._values[layer].flatten(0, 1)
        keys.index_copy_(0, self._tensors.slot_mapping, key)
        values.index_copy_(0, self._tensors.slot_mapping, value)
        size = self._keys[layer].shape[1]
        places = self._tensors.block_table.long().unsqueeze(-1) * size + torch.arange(size)
        places = places.flatten(1)  # [S, max_blocks * size]
        is_key = torch.arange(places.shape[1]) < self._lengths().unsqueeze(1)
        places = torch.where(is_key, places, places[:, :1])
        rows = query.unsqueeze(2)  # [S, heads, 1, dim]
        attended = functional.scaled_dot_product_attention(
            rows,
            keys[places].transpose(1, 2),
            values[places].transpose(1, 2),
            attn_mask=is_key[:, None, None],
            scale=scaling,
            enable_gqa=True,
        )
        return attended.squeeze(2)


def plan_tensors(plan: AttentionPlan) -> PlanTensors:
    """New tensors on the plan's device (``slot_mapping`` is the plan's own); one copy to the device each."""
    device = plan.slot_mapping.device
    width = max((len(table) for table in plan.block_tables), default=0)
    padded = [[*table, *([0] * (width - len(table)))] for table in plan.block_tables]
    return PlanTensors(
        block_table=torch.tensor(padded, dtype=torch.int32).reshape(len(padded), width).to(device),
        context_lens=torch.tensor(plan.context_lens, dtype=torch.int32, device=device),
        query_starts=torch.tensor(plan.query_starts, dtype=torch.int32, device=device),
        slot_mapping=plan.slot_mapping,
    )
