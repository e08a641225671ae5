"""AttentionPlan, what one step's attention needs; the seam of those who compute it; and the reference.

``PagedAttention`` is the seam: chosen when the decoder is built (base/torch_attention.py here, kernels on a GPU), begun
once a step, called once a layer.

The reference is a function registered with transformers under ``LORIKEET_PAGED`` and reached by every language layer's
own attention module; the plan comes to it as a keyword argument of the forward call, so nothing is kept between steps.
It first writes the step's keys and values to the cache, then lets each segment attend, causally, to its own keys
gathered by block table. Each segment is computed on its own, so a row's result does not depend on its neighbours.

Does not know: requests, adapters, who allocates blocks. Place in a request's way: step 8, under the runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from base.rotary import Rotary

LORIKEET_PAGED: Final = "lorikeet_paged"


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """What one step's attention needs. S segments (sequences), flattened into T tokens in segment order."""

    query_starts: tuple[int, ...]
    """S + 1 offsets into T."""
    context_lens: tuple[int, ...]
    """S: keys visible to each segment's last token, that is cached ones and this step's."""
    block_tables: tuple[tuple[int, ...], ...]
    """S rows of block ids; each covers its context length."""
    slot_mapping: Tensor  # [T] int64: block id * block_size + offset, where each token's K and V go
    key_cache: tuple[Tensor, ...]  # L of [num_blocks, block_size, num_kv_heads, head_dim]; written in place
    value_cache: tuple[Tensor, ...]  # as key_cache
    block_size: int


@dataclass(frozen=True, slots=True, eq=False)
class PlanTensors:
    """A plan's facts on its device, in the form that kernels read. S segments, padded to the widest block table.

    A CUDA graph reads them where they lay at its capture: give it buffers of the bucket's size, refilled in place. Rows
    beyond the step's own need a slot of a block that nobody reads, and one key, in that block.
    """

    block_table: Tensor  # [S, max_blocks] int32; 0 beyond a segment's own blocks
    context_lens: Tensor  # [S] int32
    query_starts: Tensor  # [S + 1] int32
    slot_mapping: Tensor  # [T] int64


class LayerAttention(Protocol):
    """One step's attention, called once a layer in order of the layers."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, scaling: float
    ) -> Tensor:
        """Rotate query and key, write key and value to the layer's cache, then attend.

        query [T, num_heads, head_dim], key and value [T, num_kv_heads, head_dim], as they were projected -> as query,
        a new one. A row's heads lie side by side, and rows may be slices of wider ones. None of the three is changed.
        """


class PagedAttention(Protocol):
    """How attention over the paged cache is computed; chosen when the decoder is built, and stateless."""

    def begin(self, plan: AttentionPlan, dtype: torch.dtype) -> LayerAttention:
        """Make what all layers of a step share: index tensors, masks. ``dtype`` is the queries'.

        For a CUDA graph this is what happens before the capture; the result's calls only launch kernels.
        """


@runtime_checkable
class DecodeAttention(Protocol):
    """What a PagedAttention is besides if steps of decodes alone can be captured in a CUDA graph."""

    def begin_decodes(
        self, tensors: PlanTensors, key_cache: Sequence[Tensor], value_cache: Sequence[Tensor]
    ) -> LayerAttention:
        """One row a sequence. Everything that changes between steps is read from ``tensors``, whenever it is called."""


def register_attention() -> None:
    """Make the function known to transformers. Idempotent."""
    AttentionInterface.register(LORIKEET_PAGED, attend_paged)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One sequence's part of a step, as every layer will want it."""

    begin: int
    end: int
    """Its rows among the step's T."""
    length: int
    """Keys visible to its last row."""
    blocks: Tensor  # [ceil(length / block_size)] int64, on the cache's device
    mask: Tensor | None  # [end - begin, length] bool where causality needs one

    @property
    def is_causal(self) -> bool:
        """Whether it is a whole prompt of several tokens, so that plain causality says it all."""
        return 1 < self.end - self.begin == self.length


def segments_of(plan: AttentionPlan, fewest_rows: int = 1) -> tuple[Segment, ...]:
    """The plan's segments of so many rows or more, made once a step for all layers."""
    device = plan.slot_mapping.device
    rows = zip(plan.query_starts, plan.query_starts[1:], plan.context_lens, plan.block_tables, strict=False)
    return tuple(
        Segment(
            begin=begin,
            end=end,
            length=length,
            blocks=torch.tensor(table[: -(-length // plan.block_size)], dtype=torch.int64, device=device),
            mask=_mask(end - begin, length, device),
        )
        for begin, end, length, table in rows
        if end - begin >= fewest_rows
    )


def _mask(num_new: int, length: int, device: torch.device) -> Tensor | None:
    """Bottom-right causality: the last of ``num_new`` rows sees all ``length`` keys."""
    if not 1 < num_new < length:
        return None
    return torch.ones(num_new, length, dtype=torch.bool, device=device).tril(length - num_new)


def attend_paged(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, T, head_dim]
    key: Tensor,  # [1, num_kv_heads, T, head_dim]
    value: Tensor,  # as key
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan,
    segments: tuple[Segment, ...],
    scaling: float,
    **_: object,  # transformers passes what other implementations need: dropout, position_ids, sliding_window
) -> tuple[Tensor, None]:
    """One layer's attention over the flattened step: [1, T, num_heads, head_dim]. Writes the layer's cache."""
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise TypeError("the attention module has no layer index")
    key_cache, value_cache = plan.key_cache[layer], plan.value_cache[layer]
    _store(key_cache, plan.slot_mapping, key)
    _store(value_cache, plan.slot_mapping, value)
    outputs = [_attend(query, key_cache, value_cache, segment, scaling) for segment in segments]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _store(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write rows [1, heads, T, dim] into the cache at flat ``slots`` [T]."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, rows[0].transpose(0, 1).to(cache.dtype))


def _attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, segment: Segment, scaling: float
) -> Tensor:
    """Causal attention of one segment's rows over all its keys: [1, num_heads, rows, head_dim]."""
    return functional.scaled_dot_product_attention(
        query[:, :, segment.begin : segment.end],
        _gather(key_cache, segment),
        _gather(value_cache, segment),
        attn_mask=segment.mask,
        is_causal=segment.is_causal,
        scale=scaling,
        enable_gqa=True,
    )


def _gather(cache: Tensor, segment: Segment) -> Tensor:
    """One segment's rows of the cache: [1, heads, length, dim]."""
    rows = cache.index_select(0, segment.blocks).flatten(0, 1)[: segment.length]
    return rows.transpose(0, 1).unsqueeze(0)
