"""4-bit linears on CUDA: Nf4Linear in the place of bitsandbytes' where it agrees with them here.

Owns: that choice. Place in a request's way: none; once, at load (the linears themselves run in step 8).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Final

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from torch.nn import functional

from base.config import CudaKernels
from base.kernel_check import Case, may_serve
from base.linear import quant_state
from base.ops import nf4
from base.ops.nf4_ahead import DequantiseAhead
from base.ops.nf4_launch import FUSED_ROWS
from base.ops.nf4_linear import Nf4Linear, nf4_linear

TRIED_ROWS: Final = (1, 3, 17, 64)
"""A batch of each size that the product is started with differently: a single row, few, one tile and two."""
NUM_COPIES: Final = 14
"""Copies made ahead are tried over so many linears: two layers."""

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
    if not may_serve("linear", lambda: try_linears(list(linears.values())), choice, device):
        return "bitsandbytes"
    ours = []
    for name in list(linears):
        ours.append(nf4_linear([linears.pop(name)], is_fused=True))
        module.set_submodule(name, ours[-1])
    _share_copies(ours, choice, device)
    logger.info("base.cuda_linears triton=%d", len(ours))
    return "triton"


def _share_copies(linears: list[Nf4Linear], choice: CudaKernels, device: torch.device) -> None:
    """Prompts' products take 16-bit copies made ahead, if that agrees with copies made when they are wanted."""
    dtypes = {linear.dtype for linear in linears}
    if len(dtypes) > 1:
        return
    ahead = DequantiseAhead([linear.nf4 for linear in linears], dtypes.pop())
    if may_serve("copies", lambda: try_copies(linears[:NUM_COPIES], ahead), choice, device):
        for linear in linears:
            linear.take_copies_from(ahead.take)


def try_linears(linears: list[Linear4bit]) -> Iterator[Case]:
    """One linear of each shape, its numbers laid out anew, beside bitsandbytes' numbers in torch's product."""
    shapes = {(one.in_features, one.out_features, one.bias is None): one for one in reversed(linears)}
    for num_rows in (0, *TRIED_ROWS):
        for linear in reversed(shapes.values()):
            ours, weight = nf4_linear([linear], is_fused=True), _weight(linear)
            what = f"[{linear.out_features}, {linear.in_features}] times {num_rows} rows"
            if not num_rows:
                yield f"the copy of {what}", ours.dequantised_weight(), weight
                continue
            x = _rows(num_rows, linear.in_features, weight)
            bias = None if linear.bias is None else linear.bias.to(weight.dtype)
            yield what, ours(x), functional.linear(x, weight, bias)


def try_copies(linears: list[Nf4Linear], ahead: DequantiseAhead) -> Iterator[Case]:
    """Twice through the linears in order, products in the way, as prompts go; then one out of order."""
    for linear in (*linears, *linears, *islice(reversed(linears), 3)):
        expected = linear.dequantised_weight()
        x = _rows(FUSED_ROWS + 1, linear.in_features, expected)
        what = f"[{linear.out_features}, {linear.in_features}] copied ahead"
        yield what, functional.linear(x, ahead.take(linear.nf4)), functional.linear(x, expected)


def _weight(linear: Linear4bit) -> Tensor:
    weight: Tensor = dequantize_4bit(linear.weight.data, quant_state(linear))
    return weight.to(linear.compute_dtype or torch.bfloat16)


def _rows(num_rows: int, width: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, width, generator=generator).to(like.device, like.dtype)
