"""Validation: the loss of the held-out rows between two steps, each label counted once, whatever the batches.

Owns: how the rows are dealt out over processes, and their sum. The model comes back as it was: in training, its random
streams where they were. Does not know: steps, what is done about the loss. Place in a training run: between steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from training.loop.feed import collated

if TYPE_CHECKING:
    from training.loop.ranks import Ranks
    from training.model.collator import Collator, Examples
    from training.model.model import AdaptedBase


class Validation:
    """The held-out rows, in batches of like length that never change."""

    def __init__(self, rows: Examples, collate: Collator, micro_batch: int, ranks: Ranks) -> None:
        order = sorted(range(len(rows)), key=lambda index: rows.lengths[index])
        batches = [order[first : first + micro_batch] for first in range(0, len(order), micro_batch)]
        self._rows = rows
        self._collate = collate
        self._ranks = ranks
        self._own: Sequence[Sequence[int]] = ranks.share(batches)

    def loss(self, model: AdaptedBase) -> float:
        """Mean cross entropy per label. Raises RowLost."""
        device = model.base.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for indices in self._own:
            losses = model.label_losses(collated(self._rows, self._collate, indices).to(device))
            sums += torch.stack(
                [losses.double().sum(), losses.new_tensor(losses.numel(), dtype=torch.float64)]
            )
        total, count = self._ranks.summed(sums).tolist()
        return float(total) / float(count)
