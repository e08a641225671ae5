"""NativeLinear: a linear of the base by the compiled kernel (ops/native/linear.c), its weight in 4 bits or bfloat16.

The mathematics is Float32Linear's: the weight's own values, those that bitsandbytes dequantises to, x widened to
float32, sums in float32, one rounding. The weight is widened in the processor's registers, so that a step reads an
eighth (4 bits) or half (bfloat16) of the bytes. In ms, 4864 x 896 on two AVX2 cores, beside oneDNN over float32:

    rows                   1      2      4      8     16     32     64    256
    4 bits              0.28   0.37   0.52   0.82   1.58   2.69   4.35   18.1
    oneDNN, float32     0.83   0.89   1.13   1.39   2.11   3.13   5.23   17.7

A row has the same bits for every number of rows and of threads.

Place in a request's way: step 8, as every linear.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from torch import Tensor, nn

from base.ops.native_library import native_library
from base.ops.nf4 import BLOCK, can_lay_out

OUTS: Final = 8
"""Outputs that lie together in the 4-bit layout; the number of outputs must be a multiple."""
LANES: Final = 8
TYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
_FOUR_BIT, _FOUR_BIT_WIDE, _BFLOAT16 = 0, 1, 2
"""linear.c's formats."""
_INPUTS: Final = (2, 2, 2, 2, LANES // 2)
"""A block's 64 inputs, outermost first: half of a byte, pair of steps, step of the pair, half of the lanes, lane."""
_TO_BYTES: Final = (2, 5, 3, 6, 4)
"""Their order in bytes: half of a byte, half of the lanes, pair, lane, step of the pair; two dimensions come before."""
_TO_INPUTS: Final = (0, 2, 4, 1, 3)
"""And back."""
_INVERTED: Final = torch.tensor([0, 8], dtype=torch.uint8).view(2, 1)
"""In lanes 4 to 7 the fourth bit of a code is inverted."""
_NUMBER, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS: Final[list[type[ctypes.c_int64] | type[ctypes.c_void_p]]] = [
    *(_ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS),
    *(_NUMBER, _NUMBER, _NUMBER, _NUMBER),
]
"""The linear; x, its stride and type; y, its stride and type; rows, threads."""


class FourBitRows:
    """A 4-bit weight as the kernel reads it: [out / 8, in / 64, 8 outputs, ...], one stretch of memory a step.

    Where the 64 inputs under one scale lie in their 32 bytes, linear.c says.
    """

    def __init__(self, codes: Tensor, scales: Tensor, values: Tensor, dtype: torch.dtype) -> None:
        """codes [out/8, in/64, 8, 32] uint8, scales [out/8, in/64, 8] and values [16] float32; dtype: the weights'."""
        self.codes, self.scales, self.values, self.dtype = codes, scales, values, dtype

    @classmethod
    def of(cls, data: Tensor, state: QuantState) -> FourBitRows:
        """From bitsandbytes' unpacked codes [out * in / 2, 1] uint8. The weight must suit (``suits_four_bit``)."""
        num_out, num_in = state.shape
        pairs = data.reshape(-1)
        steps = torch.stack((pairs >> 4, pairs & 0xF), -1).reshape(num_out, num_in // BLOCK, *_INPUTS)
        low, high = (steps ^ _INVERTED).permute(0, 1, *_TO_BYTES).unbind(2)
        return cls(
            _grouped((low | high << 4).reshape(num_out, num_in // BLOCK, BLOCK // 2)),
            _grouped(_scales(state).reshape(num_out, num_in // BLOCK)),
            state.code.float().contiguous(),
            state.dtype,
        )

    @classmethod
    def side_by_side(cls, weights: Sequence[FourBitRows]) -> FourBitRows:
        """One weight of several with the same input. Raises ValueError if their codes or dtypes mean other things."""
        first = weights[0]
        if any(one.dtype != first.dtype or not torch.equal(one.values, first.values) for one in weights):
            raise ValueError("weights laid side by side need the same kind of 4 bits")
        codes, scales = torch.cat([one.codes for one in weights]), torch.cat([one.scales for one in weights])
        return cls(codes, scales, first.values, first.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0] * OUTS, self.codes.shape[1] * BLOCK

    def dense(self) -> Tensor:
        """[out, in] in its dtype, a new tensor: to the bit what bitsandbytes dequantises to."""
        halves = torch.stack((self.codes & 0xF, self.codes >> 4), -2)  # [out/8, in/64, 8, 2, 32 bytes]
        steps = halves.unflatten(-1, (2, 2, LANES // 2, 2)).permute(0, 1, 2, *(3 + dim for dim in _TO_INPUTS))
        nibbles = (steps ^ _INVERTED).int()  # indices
        scaled = self.values[nibbles.flatten(3)] * self.scales.unsqueeze(-1)  # [out/8, in/64, 8, 64]
        return scaled.transpose(1, 2).reshape(self.shape).to(self.dtype)


def suits_four_bit(state: QuantState) -> bool:
    """Whether the kernel reads such a weight: blocks of 64 within rows, and a dtype that it rounds to."""
    return can_lay_out(state) and state.shape[0] % OUTS == 0 and state.dtype in TYPES


def suits_plain(weight: Tensor) -> bool:
    """The same of a weight that was never in 4 bits."""
    return weight.dtype == torch.bfloat16 and weight.shape[0] % OUTS == 0 and weight.shape[1] % LANES == 0


class NativeLinear(nn.Module):
    """[..., in] -> [..., out], in the dtype of the input (float32 or bfloat16); for serving only (no gradient)."""

    def __init__(self, weight: FourBitRows | Tensor, bias: Tensor | None) -> None:
        """weight: in 4 bits, or [out, in] bfloat16, kept and not copied; bias [out], of any float dtype, is copied.

        Raises NativeMissing where there is no kernel, ValueError for a weight that does not suit.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.is_quantised = isinstance(weight, FourBitRows)
        if isinstance(weight, Tensor) and not (suits_plain(weight) and weight.is_contiguous()):
            raise ValueError(f"the compiled linear takes no {tuple(weight.shape)} weight of {weight.dtype}")
        # no parameters: a module that moved or cast them would leave the kernel with what was there before
        self._weight = weight
        self._bias = None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
        self._call = native_library().lorikeet_linear
        self._call.argtypes = _ARGUMENTS
        self._linear = self._described()
        self._address = self._linear.ctypes.data

    def _described(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        weight, bias = self._weight, 0 if self._bias is None else self._bias.data_ptr()
        sizes = (self.in_features, self.out_features)
        if isinstance(weight, FourBitRows):
            kind = _FOUR_BIT if weight.dtype == torch.bfloat16 else _FOUR_BIT_WIDE
            pointers = (weight.codes.data_ptr(), weight.scales.data_ptr(), bias, weight.values.data_ptr())
            return np.array([*pointers, *sizes, kind], dtype=np.int64)
        return np.array([weight.data_ptr(), 0, bias, 0, *sizes, _BFLOAT16], dtype=np.int64)

    @property
    def weight(self) -> Tensor:
        """[out, in] bfloat16, or the codes of a 4-bit weight, which only ``dequantised_weight`` reads."""
        return self._weight.codes if isinstance(self._weight, FourBitRows) else self._weight

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it keeps."""
        weight = self._weight
        kept = (weight.codes, weight.scales, weight.values) if isinstance(weight, FourBitRows) else (weight,)
        return kept if self._bias is None else (*kept, self._bias)

    def dequantised_weight(self, start: int = 0, stop: int | None = None) -> Tensor:
        """[out, in] float32, a new tensor; or of the outputs from start to stop."""
        dense = self._weight.dense() if isinstance(self._weight, FourBitRows) else self._weight
        return dense[start:stop].to(torch.float32, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError for rows of another width, TypeError for other dtypes, MemoryError where a widened copy of
        x finds no room."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"rows of {x.shape[-1]} do not suit a linear of {self.in_features} inputs")
        is_flat = x.dim() == 2  # a step's rows: what each view costs is paid a hundred times a step
        rows = x if is_flat else x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        kind = TYPES.get(x.dtype)
        if kind is None:
            raise TypeError(f"the compiled linear takes float32 and bfloat16, not {x.dtype}")
        y = rows.new_empty((rows.shape[0], self.out_features))
        failed = self._call(
            self._address, rows.data_ptr(), rows.stride(0), kind, y.data_ptr(), self.out_features, kind,
            rows.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for {rows.shape[0]} rows of {self.in_features} inputs")
        return y if is_flat else y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        kind = "4 bits" if self.is_quantised else "bfloat16"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self._bias is not None}, {kind}"


def _grouped(rows: Tensor) -> Tensor:
    """[out, in/64, ...] -> [out/8, in/64, 8, ...]."""
    return rows.reshape(-1, OUTS, *rows.shape[1:]).transpose(1, 2).contiguous()


def _scales(state: QuantState) -> Tensor:
    """One a block, float32, as bitsandbytes has them before it multiplies."""
    scales: Tensor = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.float()
