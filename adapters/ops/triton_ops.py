"""add_lora on a GPU: grouped shrink and expand in Triton over device tables.

The twin of torch_ops.add_lora with the same rounding; ``reference`` is the truth for both. Everything that changes
between steps (tiles, addresses, ranks) is read on the device, grids are the worst case of the table, and memory comes
from torch's allocator, so a call can be captured in a CUDA graph and replayed after tables were refilled.

Triton is asked for when the first call is made, so this imports without it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.ops.launch import LoraLaunch, lora_launch
from adapters.ops.tiles import TileTable
from adapters.ops.torch_ops import Rounding


@dataclass(frozen=True, slots=True, eq=False)
class TritonLinear:
    """One linear, or up to three that share an input and lie side by side in the output: what never changes."""

    entries: Tensor  # [n, num_slots, 4] int64, of adapters.ops.entries
    num_in: int
    widths: tuple[int, ...]  # n outputs
    dtype: torch.dtype  # the bank's
    max_rank: int
    """The largest padded rank that the bank may hold."""
    rounding: Rounding
    launch: LoraLaunch = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.widths) <= 3 or self.entries.shape[0] != len(self.widths):
            raise ValueError(f"one to three widths, as many as entries, not {len(self.widths)}")
        object.__setattr__(self, "launch", lora_launch(self.num_in))


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def add_lora(
    y: Tensor, x: Tensor, linear: TritonLinear, table: TileTable, bias: Tensor | None = None
) -> Tensor:
    """The base's output y [T, sum of widths] with every touched row's adapter added, in place; returns y. T may be less
    than the table's rows.

    x [T, in] is the linear's input, bias [sum of widths] the base's (asked for by DoRA alone). Rows that are in no
    tile, and sites that a row's slot leaves alone, keep their bits.
    """
    return expand(y, shrink(x, linear, table), linear, table, bias)


def shrink(x: Tensor, linear: TritonLinear, table: TileTable) -> Tensor:
    """x [T, in] -> sums of x @ A.T by part, [parts, n, table's rows, max_rank] float32; what is in no tile is left.

    Needs nothing of the base's output, so it may run on another stream beside it.
    """
    _check(x, linear.num_in, table)
    from adapters.ops.kernels import lora

    launch = linear.launch
    num_sites, parts = len(linear.widths), launch.parts(linear.num_in, table.num_rows)
    shape = (parts, num_sites, table.num_rows, linear.max_rank)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    lora.shrink[(table.capacity, parts, num_sites)](
        x,
        partial,
        table.tiles,
        table.rows,
        linear.entries,
        table.num_slots,
        table.num_rows,
        A_TYPE=lora.ELEMENTS[linear.dtype],
        NUM_IN=linear.num_in,
        STRIDE_X=x.stride(0),
        NUM_SITES=num_sites,
        MAX_RANK=linear.max_rank,
        BLOCK_M=table.tile_rows,
        BLOCK_K=launch.block_k,
        CHUNK=launch.chunk,
        CHUNKS_PER_PART=launch.num_chunks(linear.num_in) // parts,
        UPCAST=lora.IS_INTERPRETED,
        num_warps=launch.shrink_warps,
        num_stages=launch.shrink_stages,
    )
    return partial


def expand(
    y: Tensor, partial: Tensor, linear: TritonLinear, table: TileTable, bias: Tensor | None = None
) -> Tensor:
    """Add ``shrink``'s partial sums times B to y [T, sum of widths], in place; returns y."""
    _check(y, sum(linear.widths), table)
    from adapters.ops.kernels import lora

    launch = linear.launch
    widths = (*linear.widths, 0, 0)[:3]
    num_blocks = sum(-(-width // launch.block_n) for width in widths)
    lora.expand[(num_blocks, table.capacity)](
        y,
        partial,
        table.tiles,
        table.rows,
        linear.entries,
        y if bias is None else bias,
        table.num_slots,
        table.num_rows,
        A_TYPE=lora.ELEMENTS[linear.dtype],
        STRIDE_Y=y.stride(0),
        NUM_SITES=len(linear.widths),
        WIDTH_0=widths[0],
        WIDTH_1=widths[1],
        WIDTH_2=widths[2],
        PARTS=partial.shape[0],
        MAX_RANK=linear.max_rank,
        BLOCK_M=table.tile_rows,
        BLOCK_N=launch.block_n,
        HAS_BIAS=bias is not None,
        ROUNDS_DELTA=linear.rounding is Rounding.DELTA,
        UPCAST=lora.IS_INTERPRETED,
        num_warps=launch.expand_warps,
    )
    return y


def _check(rows: Tensor, width: int, table: TileTable) -> None:
    if rows.shape[0] > table.num_rows or rows.shape[1] != width or rows.stride(1) != 1:
        raise ValueError(f"up to {table.num_rows} rows of {width} expected, not {tuple(rows.shape)}")
