"""Holdings: what a running sequence has: KV blocks, its adapter's slot, image embeddings. The scheduler's hand.

A sequence may end while a step on the device still has a row of it (``ahead``): the row's keys are being written, its
slot is being read. So what it holds is given back only when that step is over. Decides nothing.
"""

from __future__ import annotations

from adapters.residency import Residency
from engine.blocks import BlockPool
from engine.sequence import BASE_SLOT, Sequence
from engine.step import StepPlan
from engine.vision_cache import VisionCache


class Holdings:
    def __init__(self, pool: BlockPool, residency: Residency, vision_cache: VisionCache) -> None:
        self._pool = pool
        self._residency = residency
        self._vision_cache = vision_cache
        self._flying: set[Sequence] = set()
        """Those with rows in a step that was planned ahead, until it is over."""
        self._departed: list[Sequence] = []
        """Of them, those that have ended."""

    def take(self, sequence: Sequence, slot: int, found: tuple[int, ...]) -> None:
        """All that it needs to run; of its blocks ``found`` are computed already."""
        self._take_blocks(sequence, found)
        if not sequence.adapter.is_base:
            self._residency.hold(sequence.adapter)
        sequence.slot = slot
        for image in sequence.images_between(sequence.num_computed, sequence.num_tokens):
            key = sequence.image_key(image)
            self._vision_cache.pin(key)
            sequence.pinned_images.append(key)

    def _take_blocks(self, sequence: Sequence, found: tuple[int, ...]) -> None:
        """Those found, and new ones for the rest of its tokens and the next."""
        sequence.blocks = self._pool.share(found)
        sequence.num_kept_blocks = len(found)
        sequence.num_computed = len(found) * self._pool.block_size
        self._pool.grow(sequence.blocks, sequence.num_tokens + 1)
        if sequence.started_s is None:
            sequence.num_cached_tokens = sequence.num_computed

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Room for so many tokens, unless the pool has none."""
        if not self._pool.can_grow(sequence.blocks, num_tokens):
            return False
        self._pool.grow(sequence.blocks, num_tokens)
        return True

    def unpin_images(self, sequence: Sequence) -> None:
        for key in sequence.pinned_images:
            self._vision_cache.unpin(key)
        sequence.pinned_images.clear()

    def give_back(self, sequence: Sequence) -> None:
        """All that it has, at once: no step has a row of it."""
        self._pool.free(sequence.blocks)
        self.unpin_images(sequence)
        if not sequence.adapter.is_base:
            self._residency.release(sequence.adapter)
        sequence.slot = BASE_SLOT
        sequence.num_computed = 0
        sequence.num_kept_blocks = 0

    # ---- while a step is on the device -------------------------------------------------------------------------

    def expect(self, plan: StepPlan) -> None:
        """From here on its rows may be on the device, beside those of the step before."""
        self._flying |= _sequences(plan)

    def give_back_ended(self, sequence: Sequence) -> None:
        """As ``give_back``, now or in the ``land`` after which no step has a row of it."""
        if sequence in self._flying:
            self._departed.append(sequence)
        else:
            self.give_back(sequence)

    def land(self, still_flying: StepPlan | None) -> None:
        """All steps are over but this one."""
        self._flying = set() if still_flying is None else _sequences(still_flying)
        departed, self._departed = self._departed, []
        for sequence in departed:
            self.give_back_ended(sequence)


def _sequences(plan: StepPlan) -> set[Sequence]:
    return {chunk.sequence for chunk in plan.chunks}
