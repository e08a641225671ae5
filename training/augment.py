"""Augmentation of pictures that leaves every label true."""

from __future__ import annotations

from collections.abc import Callable

from training.formats.conversation import Conversation

Augment = Callable[[Conversation, int, int, int], Conversation]
"""(row, seed, epoch, row's index) -> the row to train on in that epoch."""


def no_augment(row: Conversation, seed: int, epoch: int, row_index: int) -> Conversation:
    """The row itself."""
    return row
