"""NativeAttention: TorchAttention's twin by the compiled kernel (ops/native/attention.c), beside compiled linears.

One call a layer rotates all rows, stores keys and values, and attends for every sequence of one row (decodes), over
its block table, in float32 and rounded once. Sequences of several rows (prompts and their pieces) are attended as
TorchAttention does, segment by segment. A row's bits depend on its own context alone.

Owns: the layout of the C structures, made once a step. Place in a request's way: step 8, under the decoder.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from base.attention import AttentionPlan, segments_of
from base.native_linear import TYPES
from base.ops.native_library import native_library
from base.rotary import Rotary
from base.torch_attention import attend_segment

CHUNK: Final = 256
"""Keys that one thread attends to at a time; the kernel's own number."""
MOST_DIM: Final = 256
DIM_STEP: Final = 16
_NUMBER, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS: Final = (
    _ADDRESS,  # the step
    *(_ADDRESS, _NUMBER, _ADDRESS, _NUMBER, _ADDRESS, _NUMBER),  # query, key and value, each with its stride
    *(_ADDRESS, _ADDRESS, _ADDRESS),  # the layer's keys and values, the result
    *(ctypes.c_double, _NUMBER),  # scaling, threads
)
_Table: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
_Numbers: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class NativeAttention:
    """A PagedAttention. Whoever makes one has asked ``suits_attention``."""

    num_heads: int
    num_kv_heads: int
    dim: int

    def begin(self, plan: AttentionPlan, dtype: torch.dtype) -> NativeStep:
        """Raises ValueError for another dtype than the cache's, NativeMissing where there is no kernel."""
        if dtype not in TYPES or any(cache.dtype != dtype for cache in plan.key_cache[:1]):
            raise ValueError(f"compiled attention takes no {dtype} over this cache")
        return NativeStep(self, plan, dtype)


def suits_attention(dim: int, dtype: torch.dtype) -> bool:
    return dtype in TYPES and dim % DIM_STEP == 0 and dim <= MOST_DIM


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """A step's sequences of one row, as the kernel reads them."""

    decodes: _Table  # [N, 4]: row, first block in tables, keys, first chunk
    chunks: _Table  # [C, 2]: decode, first key
    tables: _Table  # the blocks of one after another
    num_keys: int  # of all of them

    @classmethod
    def of(cls, plan: AttentionPlan) -> Decodes:
        starts = plan.query_starts
        members = [i for i in range(len(starts) - 1) if starts[i + 1] - starts[i] == 1]
        lengths = [plan.context_lens[i] for i in members]
        tables = [plan.block_tables[i][: -(-plan.context_lens[i] // plan.block_size)] for i in members]
        first_blocks = accumulate((len(table) for table in tables), initial=0)
        first_chunks = accumulate((-(-length // CHUNK) for length in lengths), initial=0)
        rows = [
            (starts[i], block, length, chunk)
            for i, block, length, chunk in zip(members, first_blocks, lengths, first_chunks, strict=False)
        ]
        chunks = [(number, key) for number, length in enumerate(lengths) for key in range(0, length, CHUNK)]
        return cls(
            np.array(rows, dtype=np.int32).reshape(-1, 4),
            np.array(chunks, dtype=np.int32).reshape(-1, 2),
            np.array([block for table in tables for block in table], dtype=np.int32),
            sum(lengths),
        )


class NativeStep:
    """One step's attention, layer by layer. Valid for its plan only."""

    def __init__(self, attention: NativeAttention, plan: AttentionPlan, dtype: torch.dtype) -> None:
        self._plan = plan
        self._dtype = dtype
        self._num_rows = plan.query_starts[-1]
        self._row_shapes = (attention.num_heads, attention.dim), (attention.num_kv_heads, attention.dim)
        self._long = segments_of(plan, fewest_rows=2)
        self._decodes = Decodes.of(plan)
        self._slots = plan.slot_mapping.contiguous()
        sizes = (attention.num_heads, attention.num_kv_heads, attention.dim, plan.block_size, TYPES[dtype])
        self._shape: _Numbers = np.array(sizes, dtype=np.int64)
        self._described: tuple[Rotary, _Numbers, int] | None = None
        self._call = native_library().lorikeet_attend
        self._call.argtypes = _ARGUMENTS

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, scaling: float
    ) -> Tensor:
        """As ``LayerAttention``'s. Raises ValueError for tensors of other shapes or dtypes than the plan's."""
        self._check(query, key, value)
        query, key, value = (_with_heads_together(heads) for heads in (query, key, value))
        keys, values = self._plan.key_cache[layer], self._plan.value_cache[layer]
        heads = query.new_empty(query.shape)
        failed = self._call(
            self._step_of(rotary), query.data_ptr(), query.stride(0), key.data_ptr(), key.stride(0),
            value.data_ptr(), value.stride(0), keys.data_ptr(), values.data_ptr(), heads.data_ptr(),
            scaling, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory to attend to {self._decodes.num_keys} keys")
        for segment in self._long:  # until here its rows are the rotated queries
            heads[segment.begin : segment.end] = attend_segment(heads, keys, values, segment, scaling)
        return heads

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        rows, (ours, theirs) = self._num_rows, self._row_shapes
        for heads, shape in ((query, ours), (key, theirs), (value, theirs)):
            if heads.shape != (rows, *shape) or heads.dtype != self._dtype:
                raise ValueError(f"{tuple(heads.shape)} {heads.dtype} are not {rows} rows of {shape} heads")

    def _step_of(self, rotary: Rotary) -> int:
        """The address of the C structure; made at a step's first layer, for all share one rotary."""
        if self._described is None or self._described[0] is not rotary:
            turns, num_rows = rotary.cos, self._num_rows
            if turns.dtype != self._dtype or turns.shape != (num_rows, self._row_shapes[0][1]):
                raise ValueError(f"{tuple(turns.shape)} {turns.dtype} turn no {num_rows} rows")
            own = self._decodes
            addresses = (self._shape, own.decodes, own.chunks, own.tables)
            fields = (
                *(table.ctypes.data for table in addresses),
                *(tensor.data_ptr() for tensor in (self._slots, rotary.cos, rotary.sin)),
                *(self._num_rows, len(own.decodes), len(own.chunks), own.num_keys),
            )
            step: _Numbers = np.array(fields, dtype=np.int64)
            self._described = (rotary, step, step.ctypes.data)
        return self._described[2]


def _with_heads_together(heads: Tensor) -> Tensor:
    """Rows may lie apart, a row's numbers may not."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()
