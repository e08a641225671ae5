"""Nf4Weight: a 4-bit weight laid out for the fused kernel, from bitsandbytes' state, and back to 16 bits exactly.

bitsandbytes keeps [out, in] row by row, two codes a byte, one scale for 64 inputs, and scales in 8 bits with one
float32 for 256 of them. Here the same numbers lie block by block: ``codes`` [in / 64, out, 32], so that the tile of a
program (64 inputs of neighbouring outputs) is one stretch of memory, and byte j of 32 holds inputs j (high half) and
j + 32 (low half), so that each half of a byte makes a tile of its own without shuffling. Nothing is rounded anew, and
nothing grows but 8 bytes a row: 0.516 bytes a parameter.

Linears that share an input may be laid side by side along their outputs (q, k and v; gate and up).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

BLOCK: Final = 64
"""Inputs under one scale; bitsandbytes' default, and the only size that is laid out here."""
SCALE_BLOCK: Final = 256
"""Scales under one scale of scales."""


@dataclass(frozen=True, slots=True, eq=False)
class Nf4Weight:
    """N outputs of K inputs, K a multiple of 64."""

    codes: Tensor  # [K / 64, N, 32] uint8
    scales: Tensor  # [K / 64, N] uint8 with ``outer``, float32 without
    code: Tensor  # [16] float32: what the 16 codes stand for
    outer: OuterScales | None
    values: tuple[float, ...] = field(init=False)
    """``code`` on the host, read once: to ask a device for it would wait for the device."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.code.tolist()))

    @property
    def num_in(self) -> int:
        return self.codes.shape[0] * BLOCK

    @property
    def num_out(self) -> int:
        return self.codes.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it takes on the device, tables that weights may share included."""
        outer = self.outer
        nested = () if outer is None else (outer.code, outer.scales, outer.starts, outer.offsets)
        return (self.codes, self.scales, self.code, *nested)

    @property
    def num_bytes(self) -> int:
        outer = () if self.outer is None else (self.outer.scales, self.outer.starts, self.outer.offsets)
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, *outer))


@dataclass(frozen=True, slots=True, eq=False)
class OuterScales:
    """What turns a row's 8-bit scales into numbers: code[q] * scales[(starts[row] + block) // 256] + offsets[row]."""

    code: Tensor  # [256] float32
    scales: Tensor  # [*] float32
    starts: Tensor  # [N] int32
    offsets: Tensor  # [N] float32


def can_lay_out(state: QuantState) -> bool:
    """Whether the weight is in blocks of 64 that do not run from one row into the next."""
    nested = not state.nested or state.state2.blocksize == SCALE_BLOCK
    return nested and state.blocksize == BLOCK and len(state.shape) == 2 and state.shape[1] % BLOCK == 0


def lay_out(data: Tensor, state: QuantState) -> Nf4Weight:
    """From bitsandbytes' unpacked codes [out * in / 2, 1] uint8 and their state; new tensors on the codes' device.

    Raises ValueError for a weight that ``can_lay_out`` refuses.
    """
    if not can_lay_out(state):
        raise ValueError(
            f"a 4-bit weight of {tuple(state.shape)} in blocks of {state.blocksize} cannot be laid out"
        )
    num_out, num_in = state.shape
    num_blocks = num_in // BLOCK
    pairs = data.reshape(num_out, num_blocks, BLOCK // 2)
    values = torch.stack((pairs >> 4, pairs & 0xF), -1).reshape(num_out, num_blocks, 2, BLOCK // 2)
    codes = (values[:, :, 0] << 4) | values[:, :, 1]
    outer = _outer(state, num_out, num_blocks) if state.nested else None
    scales = state.absmax if state.nested else state.absmax.float()
    return Nf4Weight(
        codes.transpose(0, 1).contiguous(),
        scales.reshape(num_out, num_blocks).T.contiguous(),
        state.code.float().to(data.device),
        outer,
    )


def _outer(state: QuantState, num_out: int, num_blocks: int) -> OuterScales:
    device = state.absmax.device
    starts = torch.arange(num_out, dtype=torch.int32, device=device) * num_blocks
    offsets = state.offset.float().reshape(1).to(device).repeat(num_out)
    return OuterScales(state.state2.code.float(), state.state2.absmax.float(), starts, offsets)


def side_by_side(weights: Sequence[Nf4Weight]) -> Nf4Weight:
    """One weight [sum of N, K] of several with the same input. Raises ValueError if their tables of codes differ."""
    first = weights[0]
    for other in weights[1:]:
        if other.num_in != first.num_in or not torch.equal(other.code, first.code):
            raise ValueError("weights laid side by side need the same input and the same kind of 4 bits")
        if (other.outer is None) != (first.outer is None):
            raise ValueError("weights laid side by side need scales of the same kind")
    return Nf4Weight(
        torch.cat([each.codes for each in weights], 1),
        torch.cat([each.scales for each in weights], 1),
        first.code,
        _outers_side_by_side([each.outer for each in weights if each.outer is not None]),
    )


def outputs(weight: Nf4Weight, start: int, stop: int | None) -> Nf4Weight:
    """The weight of some of its outputs; new tensors, tables apart."""
    chosen, outer = slice(start, stop), weight.outer
    return Nf4Weight(
        weight.codes[:, chosen].contiguous(),
        weight.scales[:, chosen].contiguous(),
        weight.code,
        None if outer is None else replace(outer, starts=outer.starts[chosen], offsets=outer.offsets[chosen]),
    )


def _outers_side_by_side(outers: Sequence[OuterScales]) -> OuterScales | None:
    if not outers:
        return None
    if any(not torch.equal(each.code, outers[0].code) for each in outers):
        raise ValueError("weights laid side by side need the same code of scales")
    starts, before = [], 0
    for each in outers:
        starts.append(each.starts + before * SCALE_BLOCK)
        before += each.scales.numel()
    return OuterScales(
        outers[0].code,
        torch.cat([each.scales for each in outers]),
        torch.cat(starts),
        torch.cat([each.offsets for each in outers]),
    )


def dequantise(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """[N, K] in ``dtype``, to the bit what bitsandbytes dequantises: a float32 product, rounded once. The plain way."""
    scales = _scales(weight)[:, :, None]  # [K / 64, N, 1]
    high, low = weight.code[(weight.codes >> 4).int()], weight.code[(weight.codes & 0xF).int()]
    blocks = torch.cat((high * scales, low * scales), 2).to(dtype)  # [K / 64, N, 64]
    return blocks.transpose(0, 1).reshape(weight.num_out, weight.num_in)


def _scales(weight: Nf4Weight) -> Tensor:
    """[K / 64, N] float32."""
    outer = weight.outer
    if outer is None:
        return weight.scales
    blocks = torch.arange(weight.scales.shape[0], device=weight.scales.device)[:, None]
    places = (outer.starts.long()[None, :] + blocks) // SCALE_BLOCK
    return outer.code[weight.scales.int()] * outer.scales[places] + outer.offsets
