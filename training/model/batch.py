"""Batch: several examples end to end, as one forward pass takes them. No padding, so no row pays for a longer one.

T tokens, S sequences, P patches. Does not know: how it is filled (`collator.py`), what is computed (`model.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from base.prompt import Grid
from training.data.faults import Origin
from training.data.labels import IGNORED


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """S sequences of T tokens together."""

    ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64: ids[i], or IGNORED; whoever computes the loss shifts, within a sequence
    positions: Tensor  # [3, T] int64
    starts: tuple[int, ...]
    """S + 1 offsets into T."""
    pixels: Tensor  # [P, patch_dim] float32; P is 0 without pictures
    grids: tuple[Grid, ...]
    """Of each picture, in order; their tokens are the image tokens of ``ids`` in order."""
    digests: tuple[str, ...]
    """Of each picture: content of its patches."""
    origins: tuple[Origin, ...]
    """S: where each sequence was read."""

    @property
    def num_tokens(self) -> int:
        return int(self.ids.numel())

    @property
    def num_labels(self) -> int:
        """Positions that carry loss; never zero in a batch of checked rows."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        return replace(
            self,
            ids=self.ids.to(device),
            labels=self.labels.to(device),
            positions=self.positions.to(device),
            pixels=self.pixels.to(device),
        )
