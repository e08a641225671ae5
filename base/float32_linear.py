"""Float32Linear: a linear of the base kept in float32, for CPUs whose bfloat16 product is an imitation.

Without AVX512-BF16 a bfloat16 product costs three to five times a float32 one from four rows up. So the weight's own
values, whatever they came from, are kept in float32; x is widened, the sum is float32's, and the result is rounded once
to the dtype of x: the same mathematics as the bfloat16 product, with sums in another order.

The product is oneDNN's over a weight in oneDNN's own block order. In ms, 896 x 4864 on two AVX2 cores:

    rows                            1      4      8     16     64    256
    oneDNN, weight in blocks     0.56   0.75    1.3    1.8    4.9   17.6
    F.linear (MKL)               1.36   3.0     3.2    3.7    8.4   20.3
    weight @ x.T (MKL)           1.3    1.2     2.1    1.8    5.1   18.4
    F.linear in bfloat16         0.64   1.9     4.0    7.9

and its blocked kernels give a row the same bits for every number of rows, so nothing is padded. Where oneDNN has none
for this processor (3.10, torch 2.11's, on AVX2: its rows change with their number), the product is MKL's in whole tiles
of rows, which gives them the same bits too (tests/base/test_float32_linear.py).

Place in a request's way: step 8, as every linear.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED_FOR_ROWS = 16
"""The number of rows that the block order is asked for; the answer was the same for 1 to 256."""
ROW_TILE = 8 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 4
"""MKL's product of so many rows, or a multiple, is the same row by row; of fewer it is another kernel's."""


def has_float32_product() -> bool:
    """Whether this build of torch has the product that Float32Linear needs (x86 and Arm builds do)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def has_blocked_rows() -> bool:
    """Whether oneDNN's product over its own order gives a row the same bits for every number of rows; tried, once."""
    dice = torch.Generator().manual_seed(0)
    weight, x = torch.randn(128, 256, generator=dice), torch.randn(16, 256, generator=dice)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
    whole = _blocked(x, packed, None)
    return all(torch.equal(_blocked(x[:num], packed, None), whole[:num]) for num in (1, 2, 3, 5, 8))


def _blocked(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result


def _tiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    padded = F.pad(rows, (0, 0, 0, -len(rows) % ROW_TILE))
    return F.linear(padded, weight, bias)[: len(rows)].view(*x.shape[:-1], weight.shape[0])


class Float32Linear(nn.Module):
    """[..., in] -> [..., out], in the dtype of the input; for serving only (no gradient)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, is_quantised: bool) -> None:
        """``weight`` [out, in] and ``bias`` [out], of any float dtype; both are copied.

        ``is_quantised`` says that the weight has 4 bits' worth of values: adapters round around it as around a 4-bit
        linear.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.is_quantised = is_quantised
        dense = weight.detach().to(torch.float32).contiguous()
        self._is_blocked = has_blocked_rows()
        # no parameter: modules of its layout can neither be moved nor counted by storage
        self._packed: Tensor = (
            torch.ops.mkldnn._reorder_linear_weight(dense, PACKED_FOR_ROWS)
            if self._is_blocked
            else dense.clone()
        )
        self._bias = None if bias is None else bias.detach().to(torch.float32, copy=True)

    @property
    def weight(self) -> Tensor:
        """[out, in] float32, where it can in oneDNN's layout, which only ``dequantised_weight`` reads."""
        return self._packed

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    @property
    def num_bytes(self) -> int:
        return 4 * (self.out_features * self.in_features + (0 if self._bias is None else self.out_features))

    def dequantised_weight(self, start: int = 0, stop: int | None = None) -> Tensor:
        """[out, in] float32, a new tensor with the values that were given; or of the outputs from start to stop."""
        if not self._is_blocked:
            return self._packed[start:stop].clone()
        dense = self._packed.to_dense()
        return dense if (start, stop) == (0, None) else dense[start:stop].clone()

    def forward(self, x: Tensor) -> Tensor:
        product = _blocked if self._is_blocked else _tiled
        return product(x.to(torch.float32), self._packed, self._bias).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
