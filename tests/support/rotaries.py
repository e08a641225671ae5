"""A Rotary of any step: every row at an angle of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from base.rotary import Rotary


def random_turns(
    num_rows: int, dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, dim] of angles within some turns of a circle, as transformers' embedding gives them."""
    angles = (3 * torch.randn(num_rows, dim // 2, generator=torch.Generator().manual_seed(5))).repeat(1, 2)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def random_rotary(num_rows: int, dim: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Rotary:
    return Rotary(*random_turns(num_rows, dim, dtype, device))
