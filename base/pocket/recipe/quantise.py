"""Training in the numbers the model will be served in: NF4 for the language linears, bf16 for the rest.

Owns: which weights are served in 4 bits, and the swap of master weights for served ones around a forward and
backward pass. The gradient goes straight through to the master weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

SKIPPED = ("model.visual", "lm_head")  # kept in 16 bits, as published 4-bit checkpoints do


def is_served_in_4_bits(name: str) -> bool:
    """Whether the parameter of this name is the weight of a language linear."""
    return "language_model.layers" in name and name.endswith("proj.weight")


def as_served(name: str, weight: Tensor) -> Tensor:
    """The values `weight` has once rounded to bf16 and, for a language linear, to double-quantised NF4."""
    rounded = weight.to(torch.bfloat16)
    if not is_served_in_4_bits(name):
        return rounded.float()
    packed, state = bnb.quantize_4bit(rounded, quant_type="nf4", compress_statistics=True, blocksize=64)
    return bnb.dequantize_4bit(packed, state).float()


@contextmanager
def served_weights(model: nn.Module) -> Iterator[None]:
    """Within, the model's parameters hold their served values; after, their master values again."""
    masters = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = as_served(name, parameter.data)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = masters[name]
