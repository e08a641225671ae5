"""StepFeed: each step's rows, and this process's share of them as batches, from any step on.

Owns: which micro-batches make a step, and how they are dealt out. Everything follows from the step's number, so that a
resumed run begins in the middle without going through what was before. Does not know: what is learnt from them.
Place in a training run: between the sampler and the step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from training.data.faults import RowRejected
from training.loop.step import StepInput
from training.model.sampler import LengthGroupedBatches

if TYPE_CHECKING:
    from training.loop.ranks import Ranks
    from training.loop.stages import Timeline
    from training.model.batch import Batch
    from training.model.collator import Collator, Examples
    from training.recipe.recipe import Recipe

AHEAD: Final = 2
"""Steps that are prepared while one is computed, where a device computes it and the processor is free."""


class RowLost(Exception):
    """A row that was in order when it was checked, and no longer is. Says which and why."""


class UnevenProcesses(ValueError):
    """``accumulation`` does not divide by the number of processes."""


def step_sampler(rows: Examples, recipe: Recipe, ranks: Ranks) -> LengthGroupedBatches:
    """Raises UnevenProcesses."""
    if recipe.accumulation % ranks.count:
        raise UnevenProcesses(
            f"accumulation is {recipe.accumulation} micro-batches a step, of all processes together, and there are"
            f" {ranks.count} processes: make it a multiple of {ranks.count}"
        )
    return LengthGroupedBatches(rows.lengths, recipe.micro_batch, recipe.accumulation, recipe.seed)


class StepFeed:
    """This process's share of every step."""

    def __init__(
        self,
        rows: Examples,
        collate: Collator,
        sampler: LengthGroupedBatches,
        timeline: Timeline,
        ranks: Ranks,
    ) -> None:
        self._rows = rows
        self._collate = collate
        self._sampler = sampler
        self._timeline = timeline
        self._ranks = ranks
        self._epoch: tuple[int, list[list[int]]] | None = None

    def at(self, step: int) -> StepInput:
        """Raises RowLost."""
        epoch, step_of_epoch = self._timeline.epoch_at(step)
        size = self._sampler.batches_per_step
        micro_batches = self._of_epoch(epoch)[step_of_epoch * size : (step_of_epoch + 1) * size]
        places = self._ranks.share(range(len(micro_batches)))
        return StepInput(step, tuple(self._batch(micro_batches[place]) for place in places), places)

    def _of_epoch(self, epoch: int) -> list[list[int]]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._sampler.set_epoch(epoch)
            self._epoch = epoch, list(self._sampler)
        return self._epoch[1]

    def _batch(self, indices: Sequence[int]) -> Batch:
        return collated(self._rows, self._collate, indices)


def collated(rows: Examples, collate: Collator, indices: Sequence[int]) -> Batch:
    """Raises RowLost."""
    draws = [rows[index] for index in indices]
    try:
        return collate(draws)
    except RowRejected as error:
        for draw in draws:
            try:
                collate([draw])
            except RowRejected as found:
                fault = found.complaint.at(draw.row.origin)
                raise RowLost(f"{fault} (it was in order when the run began)") from found
        raise RowLost(
            f"{', '.join(str(draw.row.origin) for draw in draws)}: cannot be read ({error})"
        ) from error


class StepLoader:
    """What transformers' Trainer iterates: all steps as one epoch of its own, begun at any of them."""

    def __init__(self, feed: StepFeed, first: int, num_steps: int, *, is_ahead: bool) -> None:
        self._feed = feed
        self._first = first
        self._num_steps = num_steps
        self._is_ahead = is_ahead

    def __len__(self) -> int:
        """Of the whole run."""
        return self._num_steps

    def __iter__(self) -> Iterator[StepInput]:
        steps = range(self._first, self._num_steps)
        return self._prepared(steps) if self._is_ahead else map(self._feed.at, steps)

    def _prepared(self, steps: range) -> Iterator[StepInput]:
        """From a thread of its own, ``AHEAD`` steps early."""
        ready: queue.Queue[StepInput | Exception | None] = queue.Queue(AHEAD)
        is_over = threading.Event()
        thread = threading.Thread(
            target=self._fill, args=(steps, ready, is_over), name="lorikeet-feed", daemon=True
        )
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            is_over.set()

    def _fill(
        self, steps: range, ready: queue.Queue[StepInput | Exception | None], is_over: threading.Event
    ) -> None:
        item: StepInput | Exception | None
        for step in [*steps, None]:
            try:
                item = None if step is None else self._feed.at(step)
            except Exception as error:  # noqa: BLE001 (handed over: whoever iterates raises it)
                item = error
            while not is_over.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if is_over.is_set() or item is None or isinstance(item, Exception):
                return
