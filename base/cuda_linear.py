"""4-bit linears on CUDA: Nf4Linear in the place of bitsandbytes' where it agrees with them here, one for those of one
input.

Owns: that choice. Place in a request's way: none; once, at load (the linears themselves run in step 8).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from torch.nn import functional

from base.config import CudaKernels
from base.four_bit import quant_state
from base.kernel_check import Case, may_serve
from base.merged_linear import groups, put
from base.ops import nf4
from base.ops.nf4_ahead import DequantiseAhead
from base.ops.nf4_launch import FUSED_ROWS
from base.ops.nf4_linear import Nf4Linear, nf4_linear

TRIED_ROWS: Final = (1, 3, 17, 64)
"""A batch of each size that the product is started with differently: a single row, few, one tile and two."""
NUM_COPIES: Final = 14
"""Copies made ahead are tried over so many products: two layers and more."""

logger = logging.getLogger("lorikeet.base")


def settle_cuda_linears(module: nn.Module, choice: CudaKernels, device: torch.device) -> str:
    """Fix how each 4-bit linear below ``module`` computes: ``triton``, ``bitsandbytes``, or ``none`` where there are no
    such linears. Changes ``module`` in place; a replaced linear's memory is free at once.

    Raises KernelRefused, and leaves bitsandbytes' linears, where ``triton`` was insisted on and does not serve.
    """
    linears = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, Linear4bit) and nf4.can_lay_out(quant_state(child))
    }
    if not linears:
        return "none"
    products = groups(linears)
    tried = [[linears[name] for name in names] for names in products]
    if not may_serve("linear", lambda: try_linears(tried), choice, device):
        return "bitsandbytes"
    tried.clear()
    ours = []
    for names in products:
        ours.append(nf4_linear([linears.pop(name) for name in names], is_fused=True))
        put(module, names, ours[-1])
    _share_copies(ours, choice, device)
    logger.info("base.cuda_linears triton=%d products=%d", sum(map(len, products)), len(ours))
    return "triton"


def _share_copies(linears: list[Nf4Linear], choice: CudaKernels, device: torch.device) -> None:
    """Prompts' products take 16-bit copies made ahead, if that agrees with copies made when they are wanted."""
    dtypes = {linear.dtype for linear in linears}
    if len(dtypes) > 1:
        return
    ahead = DequantiseAhead([linear.nf4 for linear in linears], dtypes.pop())
    if may_serve("copies", lambda: try_copies(linears[:NUM_COPIES], ahead), choice, device):
        for linear in linears:
            linear.take_copies_from(ahead)


def try_linears(products: Sequence[Sequence[Linear4bit]]) -> Iterator[Case]:
    """One product of each shape, its numbers laid out anew, beside bitsandbytes' numbers in torch's products."""
    shapes = {_shape(linears): linears for linears in reversed(products)}
    for num_rows in (0, *TRIED_ROWS):
        for linears in reversed(shapes.values()):
            ours, weights = nf4_linear(linears, is_fused=True), [_weight(one) for one in linears]
            what = f"[{ours.out_features}, {ours.in_features}] times {num_rows} rows"
            if not num_rows:
                yield f"the copy of {what}", ours.dequantised_weight(), torch.cat(weights)
                continue
            x = _rows(num_rows, ours.in_features, weights[0])
            expected = [functional.linear(x, *each) for each in zip(weights, _biases(linears), strict=True)]
            yield what, ours(x), torch.cat(expected, 1)


def _shape(linears: Sequence[Linear4bit]) -> tuple[object, ...]:
    first = linears[0]
    return first.in_features, first.bias is None, *(one.out_features for one in linears)


def _biases(linears: Sequence[Linear4bit]) -> list[Tensor | None]:
    return [None if one.bias is None else one.bias.to(_dtype(one)) for one in linears]


def try_copies(linears: list[Nf4Linear], ahead: DequantiseAhead) -> Iterator[Case]:
    """Twice through the linears in order, products in the way, as prompts go; then one out of order."""
    for linear in (*linears, *linears, *islice(reversed(linears), 3)):
        expected = linear.dequantised_weight()
        x = _rows(FUSED_ROWS + 1, linear.in_features, expected)
        what = f"[{linear.out_features}, {linear.in_features}] copied ahead"
        yield what, functional.linear(x, ahead.take(linear.nf4)), functional.linear(x, expected)


def _weight(linear: Linear4bit) -> Tensor:
    weight: Tensor = dequantize_4bit(linear.weight.data, quant_state(linear))
    return weight.to(_dtype(linear))


def _dtype(linear: Linear4bit) -> torch.dtype:
    return linear.compute_dtype or torch.bfloat16


def _rows(num_rows: int, width: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, width, generator=generator).to(like.device, like.dtype)
