"""TritonAttention: paged attention beside CUDA. One kernel of base.ops rotates and stores, one attends for decodes;
prompts and their pieces go to ``varlen_attn`` where this torch has it, segment by segment to
scaled_dot_product_attention where not.

base.attention is the plain twin. It is begun once a step (index tensors for all layers) and then called once a layer,
in order. A step of decodes alone only launches kernels when it is called, so that it can be captured.

Place in a request's way: step 8.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from base.attention import AttentionPlan, PlanTensors, Segment, segments_of
from base.ops.attention_ops import attend_decodes, rotate_and_store
from base.rotary import Rotary

CAUSAL: Final = (-1, 0)
"""``varlen_attn``'s window: all keys before a row, none after, the last row seeing all."""


class Varlen(Protocol):
    """Causal attention of sequences laid end to end; ``torch.nn.attention.varlen.varlen_attn`` behind one spelling."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float) -> Tensor:
        """query [Tq, heads, dim], key and value [Tk, kv_heads, dim] -> as query."""


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """The segments of several rows, end to end: Tq rows over Tk keys."""

    rows: Tensor | None  # [Tq] int64 among the step's T; None: all of them, in order
    places: Tensor  # [Tk] int64: where each key lies in the flat cache
    query_starts: Tensor  # [segments + 1] int32
    key_starts: Tensor  # [segments + 1] int32
    max_rows: int
    max_keys: int


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """The segments of one row."""

    rows: Tensor | None  # [S] int64 among the step's T; None: all of them, in order
    block_tables: Tensor  # [S, max_blocks] int32
    context_lens: Tensor  # [S] int32


def find_varlen() -> Varlen | None:
    """torch's ``varlen_attn``, if this torch's has causal windows and grouped heads; its signature still moves."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known or "scale" not in known or "enable_gqa" not in known:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scaling: float) -> Tensor:
        result = varlen_attn(
            query,
            key,
            value,
            pack.query_starts,
            pack.key_starts,
            pack.max_rows,
            pack.max_keys,
            scale=scaling,
            window_size=CAUSAL,
            enable_gqa=True,
        )
        return result[0] if isinstance(result, tuple) else result

    return attend


class TritonAttention:
    """Chosen when the decoder is built; stateless."""

    def __init__(self, varlen: Varlen | None) -> None:
        """varlen: for prompts, such as ``find_varlen()``; None: scaled_dot_product_attention, one call a segment."""
        self._varlen = varlen

    def begin(self, plan: AttentionPlan, dtype: torch.dtype) -> TritonStep:
        """What all layers of a step share; ``dtype`` is the queries'. ``varlen_attn`` takes 16 bits only."""
        return TritonStep(plan, self._varlen if dtype in (torch.bfloat16, torch.float16) else None)

    def begin_decodes(
        self, tensors: PlanTensors, key_cache: Sequence[Tensor], value_cache: Sequence[Tensor]
    ) -> TritonDecodes:
        """A step of one row a sequence, which a CUDA graph may capture."""
        return TritonDecodes(tensors, key_cache, value_cache)


class TritonDecodes:
    """Steps of decodes alone, over tensors that are refilled in place: its calls only launch kernels."""

    def __init__(
        self, tensors: PlanTensors, key_cache: Sequence[Tensor], value_cache: Sequence[Tensor]
    ) -> None:
        self._slots = tensors.slot_mapping
        self._decodes = Decodes(None, tensors.block_table, tensors.context_lens)
        self._keys, self._values = tuple(key_cache), tuple(value_cache)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, scaling: float
    ) -> Tensor:
        """As ``LayerAttention``'s."""
        keys, values = self._keys[layer], self._values[layer]
        query = rotate_and_store(query, key, value, rotary.cos, rotary.sin, self._slots, keys, values)
        return _attend_decodes(query, keys, values, self._decodes, scaling)


class TritonStep:
    """One step's attention. Valid for its plan only."""

    def __init__(self, plan: AttentionPlan, varlen: Varlen | None) -> None:
        self._plan = plan
        self._varlen = varlen
        sizes = [end - begin for begin, end in pairwise(plan.query_starts)]
        self._decodes = _decodes(plan, [index for index, size in enumerate(sizes) if size == 1])
        is_long = [size > 1 for size in sizes]
        self._segments: list[Segment] = []
        self._pack: Pack | None = None
        if any(is_long) and varlen is not None:
            self._pack = _pack(plan, [index for index, long in enumerate(is_long) if long])
        elif any(is_long):
            self._segments = [one for one, long in zip(segments_of(plan), is_long, strict=True) if long]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, scaling: float
    ) -> Tensor:
        """As ``LayerAttention``'s."""
        keys, values = self._plan.key_cache[layer], self._plan.value_cache[layer]
        slots = self._plan.slot_mapping
        query = rotate_and_store(query, key, value, rotary.cos, rotary.sin, slots, keys, values)
        if self._decodes is not None and self._decodes.rows is None:
            return _attend_decodes(query, keys, values, self._decodes, scaling)
        output = torch.empty_like(query)
        if self._decodes is not None and self._decodes.rows is not None:
            rows = self._decodes.rows
            attended = _attend_decodes(query.index_select(0, rows), keys, values, self._decodes, scaling)
            output.index_copy_(0, rows, attended)
        if self._pack is not None and self._varlen is not None:
            self._attend_pack(output, query, keys, values, self._pack, self._varlen, scaling)
        for segment in self._segments:
            output[segment.begin : segment.end] = _attend_segment(query, keys, values, segment, scaling)
        return output

    def _attend_pack(
        self,
        output: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        pack: Pack,
        varlen: Varlen,
        scaling: float,
    ) -> None:
        rows = query if pack.rows is None else query.index_select(0, pack.rows)
        key, value = (cache.flatten(0, 1).index_select(0, pack.places) for cache in (keys, values))
        attended = varlen(rows, key, value, pack, scaling)
        if pack.rows is None:
            output.copy_(attended)
        else:
            output.index_copy_(0, pack.rows, attended)


def _attend_decodes(query: Tensor, keys: Tensor, values: Tensor, decodes: Decodes, scaling: float) -> Tensor:
    return attend_decodes(query, keys, values, decodes.block_tables, decodes.context_lens, scaling)


def _attend_segment(query: Tensor, keys: Tensor, values: Tensor, segment: Segment, scaling: float) -> Tensor:
    """[rows, heads, dim]: one segment's rows over its own keys, causally."""
    own_keys, own_values = (
        cache.index_select(0, segment.blocks).flatten(0, 1)[: segment.length].transpose(0, 1).unsqueeze(0)
        for cache in (keys, values)
    )
    attended = functional.scaled_dot_product_attention(
        query[segment.begin : segment.end].transpose(0, 1).unsqueeze(0),
        own_keys,
        own_values,
        attn_mask=segment.mask,
        is_causal=segment.is_causal,
        scale=scaling,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


def _decodes(plan: AttentionPlan, indices: Sequence[int]) -> Decodes | None:
    if not indices:
        return None
    device = plan.slot_mapping.device
    tables = [plan.block_tables[index] for index in indices]
    width = max(map(len, tables))
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    lengths = [plan.context_lens[index] for index in indices]
    return Decodes(
        _rows([plan.query_starts[index] for index in indices], plan),
        torch.tensor(padded, dtype=torch.int32, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def _pack(plan: AttentionPlan, indices: Sequence[int]) -> Pack:
    device, size = plan.slot_mapping.device, plan.block_size
    places: list[Tensor] = []
    rows: list[int] = []
    query_starts, key_starts = [0], [0]
    for index in indices:
        length, begin, end = plan.context_lens[index], plan.query_starts[index], plan.query_starts[index + 1]
        blocks = torch.tensor(plan.block_tables[index][: -(-length // size)])
        places.append((blocks[:, None] * size + torch.arange(size)).flatten()[:length])
        rows += range(begin, end)
        query_starts.append(len(rows))
        key_starts.append(key_starts[-1] + length)
    return Pack(
        rows=_rows(rows, plan),
        places=torch.cat(places).to(device),
        query_starts=torch.tensor(query_starts, dtype=torch.int32, device=device),
        key_starts=torch.tensor(key_starts, dtype=torch.int32, device=device),
        max_rows=max(end - begin for begin, end in pairwise(query_starts)),
        max_keys=max(plan.context_lens[index] for index in indices),
    )


def _rows(rows: Sequence[int], plan: AttentionPlan) -> Tensor | None:
    if list(rows) == list(range(plan.query_starts[-1])):
        return None
    return torch.tensor(rows, dtype=torch.int64, device=plan.slot_mapping.device)
