"""add_lora by the compiled kernel of ``native/lora.c``: the adapters of a whole batch in one call, on x86 with AVX2.

The C file is part of the library that base.ops.native_library loads, which whoever builds the engine hands over.
adapters.ops.torch_ops is what it is compared with, and serves where there is no such library.

Owns: the layout of the C structures. Knows neither the bank nor routings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from adapters.ops.torch_ops import Rounding

PANEL_ROWS: Final = 64
"""Most rows of one slot that are computed together (lora.c has room for no more): their part of x stays in the
second-level cache."""
TYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
_ROUNDINGS: Final = {Rounding.DELTA: 0, Rounding.SUM: 1}
_NUMBER, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS: Final = (
    *(_ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _NUMBER),  # linears, panels, how many, order, rows
    *(_ADDRESS, _NUMBER, _NUMBER),  # y, its stride and type
    *(_ADDRESS, _NUMBER, _NUMBER),  # x, its stride and type
    *(_NUMBER, _NUMBER),  # numbers in a hidden row, threads
)
_Int64s: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
_Int32s: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True, eq=False)
class Panels:
    """A step's rows, sorted by slot and cut into panels; rows of the base are in none."""

    table: _Int32s  # [panels, 3] slot, start in order, count
    order: _Int32s  # [rows], places in x and y
    num_rows: int  # of x and y
    addresses: tuple[int, int]
    """Of table and order: to ask numpy at each call takes a microsecond."""

    @classmethod
    def of(cls, segments: Sequence[tuple[int, int]]) -> Panels:
        """segments: runs of (rows, slot) in row order, -1 for the base."""
        rows: dict[int, list[range]] = {}
        end = 0
        for num_rows, slot in segments:
            if slot >= 0 and num_rows:
                rows.setdefault(slot, []).append(range(end, end + num_rows))
            end += num_rows
        order: list[int] = []
        table: list[tuple[int, int, int]] = []
        for slot in sorted(rows):
            first = len(order)
            for run in rows[slot]:
                order.extend(run)
            starts = range(first, len(order), PANEL_ROWS)
            table += [(slot, start, min(PANEL_ROWS, len(order) - start)) for start in starts]
        tables = np.array(table, dtype=np.int32).reshape(-1, 3), np.array(order, dtype=np.int32)
        return cls(*tables, end, (tables[0].ctypes.data, tables[1].ctypes.data))


class NativeSites:
    """Sites that share an input and lie side by side in the output, as the kernel sees them."""

    def __init__(
        self,
        library: ctypes.CDLL,
        entries: Tensor,
        num_in: int,
        widths: Sequence[int],
        bias: Tensor | None,
        rounding: Rounding,
        max_rank: int,
    ) -> None:
        """entries [sites, slots, 4] int64, as adapters.ops.entries keeps it on the CPU: read at each call. bias
        [sum of widths], the base's. Both are kept. Raises TypeError for a bias that is neither float32 nor bfloat16.
        """
        self.num_in = num_in
        self.num_out = sum(widths)
        self._call = library.lorikeet_add_adapters
        self._call.argtypes = _ARGUMENTS
        self._hidden_stride = len(widths) * max_rank
        self._kept = (entries, bias)
        self._sites = _sites(widths, bias)
        addresses = (entries.data_ptr(), self._sites.ctypes.data)
        sizes = (len(widths), entries.shape[1], num_in, _ROUNDINGS[rounding])
        self._linears: _Int64s = np.array([*addresses, *sizes], dtype=np.int64)
        self._address = self._linears.ctypes.data

    def add(self, y: Tensor, x: Tensor, panels: Panels) -> None:
        """Add every row's adapters to y [T, sum of out], the base's output for x [T, in], in place.

        Rows of y and x may lie apart, the numbers of a row may not. Raises TypeError for other dtypes than float32 and
        bfloat16, ValueError for other shapes than the panels', MemoryError where a widened copy of x finds no room.
        """
        if y.shape != (panels.num_rows, self.num_out) or x.shape != (panels.num_rows, self.num_in):
            raise ValueError(
                f"{tuple(y.shape)} and {tuple(x.shape)} are not {panels.num_rows} rows of these linears"
            )
        if y.stride(1) != 1 or x.stride(1) != 1:
            raise ValueError("the numbers of a row must lie side by side")
        y_type, x_type = _type(y), _type(x)
        failed = self._call(
            self._address, panels.addresses[0], len(panels.table), panels.addresses[1], len(panels.order),
            y.data_ptr(), y.stride(0), y_type,
            x.data_ptr(), x.stride(0), x_type,
            self._hidden_stride, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for {len(panels.order)} rows of {self.num_in} inputs")


def _sites(widths: Sequence[int], bias: Tensor | None) -> _Int64s:
    """[sites, 4]: first column, width, address and type of the bias."""
    if bias is not None and not bias.is_contiguous():
        raise ValueError("the bias must be contiguous")
    rows, first = [], 0
    for width in widths:
        address = 0 if bias is None else bias.data_ptr() + first * bias.element_size()
        rows.append((first, width, address, 0 if bias is None else _type(bias)))
        first += width
    return np.array(rows, dtype=np.int64)


def _type(tensor: Tensor) -> int:
    code = TYPES.get(tensor.dtype)
    if code is None:
        raise TypeError(f"the compiled adapters compute in float32 and bfloat16, not in {tensor.dtype}")
    return code
