"""Nf4Linear: a 4-bit linear that multiplies few rows straight from its codes, and many from a 16-bit copy.

Owns the laid-out weight (bitsandbytes' own is not kept) and the choice between the two ways. Place in a request's way:
step 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from torch.nn import functional

from base.ops import nf4, nf4_ops
from base.ops.nf4 import Nf4Weight
from base.ops.nf4_ahead import DequantiseAhead
from base.ops.nf4_launch import FUSED_ROWS


class Nf4Linear(nn.Module):
    is_quantised: Final = True
    """Adapters round around it as around any 4-bit linear."""

    def __init__(
        self,
        weight: Nf4Weight,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        copies: DequantiseAhead | None = None,
        fused_rows: int = FUSED_ROWS,
        is_fused: bool | None = None,
    ) -> None:
        """fused_rows: up to as many rows are multiplied from the codes. is_fused: whether Triton is used at all; by
        default on CUDA.
        """
        super().__init__()
        self.nf4 = weight
        self.in_features, self.out_features = weight.num_in, weight.num_out
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.fused_rows = fused_rows
        self.is_fused = weight.codes.is_cuda if is_fused is None else is_fused
        self._copies = copies

    def take_copies_from(self, copies: DequantiseAhead) -> None:
        """It makes the copies for many rows from now on; it knows all of a model's weights, so it comes after them."""
        self._copies = copies

    @property
    def copy_buffers(self) -> Sequence[Tensor]:
        """Where it takes its copies from, shared with other linears; none if it makes its own."""
        return () if self._copies is None else self._copies.buffers

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of ``x``."""
        rows = x.reshape(-1, self.in_features).to(self.dtype)
        if self.is_fused and rows.shape[0] <= self.fused_rows:
            result = nf4_ops.matmul(rows, self.nf4, self.bias)
        else:
            result = functional.linear(rows, self._copy(), self.bias)
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantised_weight(self, start: int = 0, stop: int | None = None) -> Tensor:
        """[out, in] in the compute dtype, to the bit bitsandbytes'; or of the outputs from start to stop. New."""
        weight = self.nf4 if (start, stop) == (0, None) else nf4.outputs(self.nf4, start, stop)
        return nf4_ops.dequantise(weight, self.dtype) if self.is_fused else nf4.dequantise(weight, self.dtype)

    def _copy(self) -> Tensor:
        return self.dequantised_weight() if self._copies is None else self._copies.take(self.nf4)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def nf4_linear(
    linears: Sequence[Linear4bit], *, copies: DequantiseAhead | None = None, is_fused: bool | None = None
) -> Nf4Linear:
    """One linear, outputs side by side, of 4-bit linears with the same input (one, or q, k and v, or gate and up).

    New tensors; the linears stay as they are. Raises ValueError where bitsandbytes has not quantised yet, or in a way
    that cannot be laid out (see ``nf4.can_lay_out``), and if only some have a bias.
    """
    weights = []
    for linear in linears:
        state = getattr(linear.weight, "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            raise ValueError("a linear to be laid out must be quantised by bitsandbytes, and not packed")
        weights.append(nf4.lay_out(linear.weight.data, state))
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    if biases and len(biases) != len(linears):
        raise ValueError("either all linears laid side by side have a bias, or none")
    weight = weights[0] if len(weights) == 1 else nf4.side_by_side(weights)
    dtype = linears[0].compute_dtype or torch.bfloat16
    return Nf4Linear(weight, torch.cat(biases) if biases else None, dtype, copies=copies, is_fused=is_fused)
