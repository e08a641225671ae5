"""What bitsandbytes knows of a 4-bit linear's weight. Place in a request's way: none; at load."""

from __future__ import annotations

from copy import copy

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit


def quant_state(linear: Linear4bit) -> QuantState:
    """Scales and shape of a 4-bit linear's weight. Raises ValueError when it has not been quantised yet."""
    state = getattr(linear.weight, "quant_state", None)
    if not isinstance(state, QuantState):
        raise ValueError("the 4-bit linear has not been quantised: move it to a device first")
    return state


def computed_state(linear: Linear4bit) -> QuantState:
    """A copy of its state that dequantises as bitsandbytes computes: straight to the compute dtype."""
    state = copy(quant_state(linear))
    state.dtype = linear.compute_dtype or torch.bfloat16
    return state
