"""Held-out loss: mean cross entropy over all labels of the held-out rows, with the adapter and without.

The mean is over labels, not over rows or batches, as training's own loss is; so batches of any size give the same.

Owns: the mean. Does not know: how the model is made. Place in a training run: before the
Generator takes the base's linears.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from training.data.formats import Conversation
from training.data.labels import Labeller
from training.evaluation.errors import EvaluationError
from training.model.batch import Batch
from training.model.collator import Collator, Examples

Losses = Callable[[Sequence[Conversation], bool], float]
"""(rows, with_adapter) -> nats per label."""
Batches = Callable[[Sequence[Conversation]], Iterable[Batch]]


class LossModel(Protocol):
    """What is asked of ``training.model.model.AdaptedBase``."""

    def label_losses(self, batch: Batch) -> Tensor:
        """[num_labels] float32, no gradient."""
        ...

    def disabled(self) -> AbstractContextManager[object]:
        """Inside, the base's own losses."""
        ...


class HeldOutLoss:
    """Fits ``Losses``."""

    def __init__(self, model: LossModel, batches: Batches) -> None:
        """``batches`` are made without augmentation: ``unaugmented(labeller, recipe.micro_batch)``."""
        self._model, self._batches = model, batches

    def __call__(self, rows: Sequence[Conversation], with_adapter: bool) -> float:
        """Raises EvaluationError when no row has a label."""
        sums: list[float] = []
        count = 0
        with nullcontext() if with_adapter else self._model.disabled():
            for batch in self._batches(rows):
                losses = self._model.label_losses(batch)
                sums.append(float(losses.double().sum()))
                count += losses.numel()
        if not count:
            raise EvaluationError("the held-out rows have no labels: there is nothing to compute a loss on")
        return math.fsum(sums) / count


def unaugmented(labeller: Labeller, micro_batch: int) -> Batches:
    """Rows as they are, in their order, so many examples at once."""
    collate = Collator(labeller)

    def batches(rows: Sequence[Conversation]) -> Iterator[Batch]:
        examples = Examples(rows, labeller)
        for first in range(0, len(examples), micro_batch):
            yield collate([examples[i] for i in range(first, min(first + micro_batch, len(examples)))])

    return batches
