"""Training-only heads: they ask the model directly what it must come to know, long before its answers show it.

Owns: the auxiliary losses. Nothing of this is shipped.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.pocket.recipe.data import (
    NUM_CELL_LABELS,
    NUM_COLOR_LABELS,
    NUM_SHAPE_LABELS,
    Example,
    subject,
)
from base.pocket.recipe.pixels import MERGE
from base.pocket.recipe.rows import TEXT

MAX_SIDE: Final = 8  # merged tokens along a side
NOTHING_WEIGHT: Final = 0.2  # most tokens lie on nothing


class Heads(nn.Module):
    """Training-only classifiers: what lies under a picture token, and where the token is in its picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, NUM_SHAPE_LABELS)
        self.color = nn.Linear(width, NUM_COLOR_LABELS)
        self.row = nn.Linear(width, MAX_SIDE)
        self.column = nn.Linear(width, MAX_SIDE)
        self.subject = nn.Linear(width, NUM_SHAPE_LABELS + NUM_COLOR_LABELS + NUM_CELL_LABELS)

    def what(self, seen: Tensor, example: Example) -> Tensor:
        """Loss of naming the shape and colour under each token of `seen` [P, M, H]."""
        shape = _naming_loss(self.shape(seen), example.shapes)
        color = _naming_loss(self.color(seen), example.colors)
        return shape + color

    def place(self, middle: Tensor, example: Example) -> Tensor:
        """Loss of telling row and column from the language model's states [B, L, H] at picture tokens."""
        picture = example.batch.picture
        index, across = picture[picture != TEXT], example.batch.grid[1] // MERGE
        states = middle[picture != TEXT]
        row = F.cross_entropy(self.row(states), index // across)
        return row + F.cross_entropy(self.column(states), index % across)

    def meant(self, late: Tensor, example: Example) -> Tensor:
        """Loss of telling, from the states [B, L, H] before an answer, which one thing was asked about."""
        answers = example.batch.answers
        starts = (answers >= 0) & (answers != answers.roll(1, dims=1))
        subjects = torch.tensor([subject(asked) for asked in example.batch.asked])[answers[starts]]
        parts = self.subject(late[starts]).split((NUM_SHAPE_LABELS, NUM_COLOR_LABELS, NUM_CELL_LABELS), dim=1)
        losses = [F.cross_entropy(part, subjects[:, i], ignore_index=-100) for i, part in enumerate(parts)]
        return torch.stack(losses).sum()


def _naming_loss(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.ones(logits.shape[-1])
    weight[0] = NOTHING_WEIGHT
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, ignore_index=-100)
