"""head_losses: from the hidden states that predict a label to their cross entropies, without a whole row of logits.

A row of Qwen2.5-VL's logits has 152k numbers, several megabytes for a handful of tokens; the head therefore runs on
positions that predict a label, and on a few hundred of those at a time, whose logits are made again for the gradient.

Does not know: layers, adapters. Place in a training run: last thing of every forward pass.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from training.data.labels import IGNORED
from training.model.batch import Batch

HEAD_ROWS: Final = 256
"""Most rows that go through the head at once: 150 MiB of fp32 logits with a vocabulary of 152k."""


def label_positions(batch: Batch) -> Tensor:
    """[num_labels] int64 into T. Raises ValueError when there is none, or one that no token comes before."""
    positions = (batch.labels != IGNORED).nonzero().squeeze(1)
    if not len(positions):
        raise ValueError(f"no label in the batch of {_origins(batch)}: its loss would be no number")
    starts = torch.tensor(batch.starts[:-1], device=positions.device)
    if bool(torch.isin(positions, starts).any()):
        raise ValueError(f"a sequence of {_origins(batch)} begins with a label, which nothing predicts")
    return positions


def _origins(batch: Batch) -> str:
    return ", ".join(map(str, batch.origins))


def head_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """[N, H], [N] int64 -> [N] float32. Differentiable in ``hidden``."""
    pieces = list(zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True))
    if len(pieces) == 1 or not hidden.requires_grad:
        return torch.cat([_cross_entropies(head, *piece) for piece in pieces])
    return torch.cat([checkpoint(_cross_entropies, head, *piece, use_reentrant=False) for piece in pieces])


def _cross_entropies(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits: Tensor = head(hidden)
    return functional.cross_entropy(logits.float(), targets, reduction="none")
