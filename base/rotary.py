"""Rotary: how far a step's queries and keys are turned by their positions, and the plain way to turn them.

Whoever attends turns them: ``LayerAttention`` gets heads as they were projected, and this beside them, so that a kernel
may turn and store in one go.

Place in a request's way: step 8, under the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """cos and sin of a step's positions, made once for all layers. T tokens, D the head's size."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        """Both [T, D], as transformers' rotary embedding makes them: each half twice."""
        self._half = cos.shape[-1] // 2
        self.cos = cos.contiguous()
        """[T, D]"""
        # the sign of the rotated half, moved from the heads to the sines: the same bits, one operation less a layer
        self.sin = torch.cat([-sin[:, : self._half], sin[:, self._half :]], dim=-1)
        """[T, D], its first half negative: heads * cos + heads with their halves swapped * sin."""

    def __call__(self, heads: Tensor) -> Tensor:
        """[T, heads, D] -> a new one. Rounds where transformers' apply_rotary_pos_emb does."""
        turned = torch.cat([heads[..., self._half :], heads[..., : self._half]], dim=-1)
        return (heads * self.cos.unsqueeze(1)).add_(turned.mul_(self.sin.unsqueeze(1)))
