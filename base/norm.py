"""Norm: RMS norm as transformers rounds it, in fewer operations. Place in a request's way: step 8, in every layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Norm:
    """The row scaled in float32, rounded, then weighted."""

    def __init__(self, module: nn.Module) -> None:
        """Over the weight of transformers' norm, which is not copied. Raises TypeError for another module."""
        weight, epsilon = module.weight, module.variance_epsilon
        if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
            raise TypeError(f"{type(module).__name__} is no RMS norm")
        self._weight = weight
        self._epsilon = epsilon

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> a new [T, H]."""
        wide = x.to(torch.float32)
        scale = wide.square().mean(-1, keepdim=True).add_(self._epsilon).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self._weight)

    def after(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of both [T, H], in the memory of ``delta``, and its norm, a new one; without delta, hidden's."""
        total = hidden if delta is None else delta.add_(hidden)
        return total, self(total)
