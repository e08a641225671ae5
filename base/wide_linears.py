"""wide_linears: linears of a CPU that sum in float32, in the place of what the loader left; those of one input merged.

Two products do it: NativeLinear (compiled here, weights in 4 bits or bfloat16) and Float32Linear (oneDNN's, weights in
float32), which also takes the shapes and dtypes that the first does not. Place in a request's way: none; once, at load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from base.float32_linear import Float32Linear
from base.four_bit import computed_state
from base.merged_linear import groups, put
from base.native_linear import FourBitRows, NativeLinear, suits_four_bit, suits_plain


def widen_linears(module: nn.Module, *, is_native: bool) -> Counter[str]:
    """Replace every linear below ``module``; how many of them each product has. A head that shares the embeddings
    leaves them as they are.

    is_native: by the compiled product where it takes the weight.
    """
    linears = {name: one for name, one in module.named_modules() if isinstance(one, nn.Linear)}
    kinds: Counter[str] = Counter()
    for names in groups(linears):
        product = _product([linears.pop(name) for name in names], is_native=is_native)
        put(module, names, product)
        kinds["native" if isinstance(product, NativeLinear) else "float32"] += len(names)
    return kinds


def _product(linears: Sequence[nn.Linear], *, is_native: bool) -> NativeLinear | Float32Linear:
    """All 4-bit or all plain, all or none with a bias."""
    biases: list[Tensor] = [one.bias for one in linears if one.bias is not None]
    bias = torch.cat(biases) if biases else None
    four_bit = [one for one in linears if isinstance(one, Linear4bit)]
    states = [computed_state(one) for one in four_bit]
    if is_native and four_bit and all(suits_four_bit(state) for state in states):
        rows = [FourBitRows.of(one.weight.data, state) for one, state in zip(four_bit, states, strict=True)]
        return NativeLinear(FourBitRows.side_by_side(rows), bias)
    weights: list[Tensor] = [
        dequantize_4bit(one.weight.data, computed_state(one))
        if isinstance(one, Linear4bit)
        else one.weight.detach()
        for one in linears
    ]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if is_native and not four_bit and suits_plain(weight):
        return NativeLinear(weight, bias)
    return Float32Linear(weight, bias, is_quantised=bool(four_bit))
