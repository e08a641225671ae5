"""Examples and Collator: checked rows to the batches that go through the model, nothing padded, pictures opened late.

``Examples`` counts and measures the sequences of all rows without opening a picture. The sampler names them by index;
index + n * len is the same example in the nth epoch, so that whoever prepares it, in whichever process, knows the
epoch without being told. ``Collator`` opens, augments and joins. Does not know: steps, processes, models.
Place in a training run: between the data and the model, in the loader's workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Final

import torch
from torch.utils.data import Dataset

from training.data.formats.conversation import Conversation
from training.data.formats.pictures import PictureRef
from training.data.labels import Example, Labeller
from training.model.augment import Augment, no_augment
from training.model.batch import Batch

_REMEMBERED_PICTURES: Final = 100_000


@dataclass(frozen=True, slots=True)
class Draw:
    """One example as the sampler drew it, nothing opened yet."""

    row: Conversation
    row_index: int
    part: int
    """Which of the row's examples; most rows have one."""
    epoch: int


class Examples(Dataset[Draw]):
    """The sequences of ``rows``, in order."""

    def __init__(self, rows: Sequence[Conversation], labeller: Labeller) -> None:
        """Takes about a millisecond a row. Raises RowRejected for a row that was not checked."""
        self.rows: Final = tuple(rows)
        num_image_tokens = lru_cache(_REMEMBERED_PICTURES)(labeller.num_image_tokens)
        places: list[tuple[int, int]] = []
        lengths: list[int] = []
        labels: list[int] = []
        for index, row in enumerate(self.rows):
            for part, outline in enumerate(labeller.outlines(row)):
                pictures: Sequence[PictureRef] = row.pictures[: outline.num_pictures]
                image_tokens = sum(num_image_tokens(picture) for picture in pictures)
                places.append((index, part))
                lengths.append(len(outline.ids) - outline.num_pictures + image_tokens)
                labels.append(sum(outline.is_label))
        self._places: Final = tuple(places)
        self.lengths: Final = tuple(lengths)
        """Tokens of each example, pictures included."""
        self.num_labels: Final = tuple(labels)
        """Of each example."""

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Draw:
        """Example ``index % len(self)`` of epoch ``index // len(self)``."""
        epoch, place = divmod(index, len(self))
        row_index, part = self._places[place]
        return Draw(self.rows[row_index], row_index, part, epoch)


class Collator:
    """Draws to a Batch. Holds nothing that changes: any worker may have a copy."""

    def __init__(self, labeller: Labeller, augment: Augment = no_augment, seed: int = 0) -> None:
        self._labeller = labeller
        self._augment = augment
        self._seed = seed

    def __call__(self, draws: Sequence[Draw]) -> Batch:
        """Raises RowRejected for a picture that is gone or has changed."""
        return join([self.example(draw) for draw in draws], draws)

    def example(self, draw: Draw) -> Example:
        """Its pictures opened; augmented anew each epoch, the same for the same seed, epoch and row."""
        row = self._augment(draw.row, self._seed, draw.epoch, draw.row_index)
        return self._labeller.examples(row)[draw.part]


def join(examples: Sequence[Example], draws: Sequence[Draw]) -> Batch:
    """End to end, in order."""
    images = [image for example in examples for image in example.images]
    return Batch(
        ids=torch.cat([example.ids for example in examples]),
        labels=torch.cat([example.labels for example in examples]),
        positions=torch.cat([example.positions for example in examples], dim=1),
        starts=(0, *accumulate(len(example.ids) for example in examples)),
        pixels=torch.cat([image.pixels for image in images]) if images else torch.empty(0, 0),
        grids=tuple(image.grid for image in images),
        digests=tuple(image.digest for image in images),
        origins=tuple(draw.row.origin for draw in draws),
    )
