"""The two pieces of a PEFT LoRA layer that ours does otherwise: its scale, and its dropout.

Does not know: layers, bases. Place in a training run: inside every adapted linear.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

_STEPS: Final = 1 << 16


class ScaledLinear(nn.Linear):
    """PEFT's ``lora_B`` with the scale folded in before the product, as the server does, instead of after it.

    So scales that are no power of two round alike here and there; and what is multiplied is the small factor.
    """

    def __init__(self, weight: nn.Parameter, scale: float) -> None:
        """``weight`` [out, r], kept."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self.scale: Final = scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., r] -> [..., out]"""
        return functional.linear(x, self.weight * self.scale)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU from 16 random bits an element, which takes 0.6 ms where torch's takes 1.5 (192k elements,
    one core) and would be a fifth of a small base's step. There ``p`` is as near as a 65,536th."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return super().forward(x)
        num_dropped = round(self.p * _STEPS)
        keep = random_int16(x.shape) >= num_dropped - _STEPS // 2
        return x * keep.to(x.dtype).mul_(_STEPS / (_STEPS - num_dropped))


def random_int16(shape: torch.Size) -> Tensor:
    """Uniform over all of int16, from torch's CPU generator."""
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    return words.view(torch.int16)[: shape.numel()].view(shape)
