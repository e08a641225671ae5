"""load_training_base: the base that serves, with linears that PEFT can wrap and a precision that trains.

The language linears are quantised exactly as served. Where the device multiplies bfloat16 natively they stay in 4
bits. On other CPUs everything is computed in fp32, 6 to 8 times faster, from the dequantised weight itself.

Does not know: adapters, data. Place in a training run: after the plan, before anything is attached.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final, Literal

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from base.config import BaseConfig
from base.linear import dequantised_weight, multiplies_bf16
from base.loader import load_base
from base.model import BaseModel
from training.recipe.recipe import Recipe

logger = logging.getLogger("lorikeet.training")
DEQUANTISED_BYTES_LIMIT: Final = 8 << 30
"""Of fp32 weights that are kept in place of 4-bit ones on a CPU; a larger base dequantises at each call."""


class FrozenLinear(nn.Linear):
    """A 4-bit linear's weight, dequantised to fp32 and kept: a plain linear, so PEFT wraps it."""

    is_quantised: Final = True
    """Its weight has 4 bits' worth of values."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` [out, in] float32, ``bias`` [out]; both are kept, not copied."""
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)


def load_training_base(recipe: Recipe, device: str = "auto") -> BaseModel:
    """Load what ``recipe`` names. Raises as ``load_base``."""
    config = BaseConfig(
        source=recipe.base,
        revision=recipe.revision,
        device=device,
        min_pixels=recipe.min_pixels,
        max_pixels=recipe.max_pixels,
        cpu_linear="unpacked",  # packing is for serving: it has no gradient and rounds scales
        cuda_kernels="torch",  # ours have no gradient
    )
    base = load_base(replace(config, dtype=training_dtype(recipe, device)))
    if base.device.type == "cpu" and base.dtype == torch.float32:
        keep_dequantised(base.module)
    return base


def training_dtype(recipe: Recipe, device: str = "auto") -> Literal["bfloat16", "float32"]:
    """What ``recipe.precision`` means on this machine."""
    if recipe.precision == "bf16":
        return "bfloat16"
    if recipe.precision == "fp32":
        return "float32"
    return "bfloat16" if _multiplies_bf16(device) else "float32"


def _multiplies_bf16(device: str) -> bool:
    """Whether the device has instructions for it, rather than an imitation."""
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.get_device_capability(None if device == "auto" else device) >= (8, 0)
    return multiplies_bf16()


def keep_dequantised(module: nn.Module, max_bytes: int = DEQUANTISED_BYTES_LIMIT) -> None:
    """Replace each 4-bit linear below ``module`` by a FrozenLinear of the same values, if all together fit."""
    linears = {name: child for name, child in module.named_modules() if isinstance(child, Linear4bit)}
    num_bytes = sum(4 * linear.in_features * linear.out_features for linear in linears.values())
    if num_bytes > max_bytes:
        logger.info("train.linears unpacked=%d bytes_if_kept=%d limit=%d", len(linears), num_bytes, max_bytes)
        return
    for name, linear in linears.items():
        module.set_submodule(name, FrozenLinear(dequantised_weight(linear), linear.bias))
