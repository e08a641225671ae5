"""NativeSelection: a row's token by the compiled kernel (base/ops/native/selection.c), on a CPU.

The same tokens as ``select_tokens``, to the bit: its sums are of integers, and its exponential is engine.exponential's,
operation by operation.

Place in a request's way: step 9, where the sampler chooses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from base.ops.native_library import has_native_library, native_library
from engine.sampling import SamplingParams
from engine.selection import Select, select_tokens

_NUMBER, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS: Final[list[type[ctypes.c_int64] | type[ctypes.c_void_p]]] = [
    *(_ADDRESS, _NUMBER, _ADDRESS, _ADDRESS),  # logits and their stride, what is asked, ids
    *(_NUMBER, _NUMBER, _NUMBER),  # rows, width, threads
]
MAX_VOCABULARY: Final = 1 << 23
"""From there on sums of weights would not be exact."""


class NativeSelection:
    """A ``Select`` for float32 rows on a CPU, by torch's threads, a row to each."""

    def __init__(self) -> None:
        """Raises NativeMissing where there is no kernel."""
        self._call = native_library().lorikeet_choose
        self._call.argtypes = _ARGUMENTS

    def __call__(self, rows: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
        num_rows, width = rows.shape
        if rows.dtype != torch.float32 or rows.device.type != "cpu" or not 0 < width < MAX_VOCABULARY:
            raise ValueError(
                f"the compiled selection takes no {tuple(rows.shape)} {rows.dtype} on {rows.device}"
            )
        if not num_rows == len(params) == len(uniforms):
            raise ValueError(f"{num_rows} rows, {len(params)} parameters and {len(uniforms)} random numbers")
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        asks = torch.tensor([_ask(p, u) for p, u in zip(params, uniforms, strict=True)], dtype=torch.float64)
        ids = torch.empty(num_rows, dtype=torch.int64)
        if self._call(
            rows.data_ptr(), rows.stride(0), asks.data_ptr(), ids.data_ptr(),
            num_rows, width, torch.get_num_threads(),
        ):  # fmt: skip
            raise MemoryError("there is no memory to choose tokens in")
        return ids


def _ask(params: SamplingParams, uniform: float) -> tuple[float, ...]:
    """selection.c's Ask."""
    temperature = 0.0 if params.is_greedy else params.temperature
    return temperature, params.top_p, params.min_p, float(params.top_k), uniform


def selection_on(device: torch.device) -> Select:
    """The fastest that chooses the same tokens."""
    return NativeSelection() if device.type == "cpu" and has_native_library() else select_tokens
