"""Scheduler: who computes in the next step. It owns the queue, the running list and every sequence's status, blocks and
slot; it returns a frozen StepPlan and touches no tensor.
"""

from __future__ import annotations

from adapters.ref import AdapterRef
from adapters.residency import Residency
from engine.admission import Admission, Admitted, Refused
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.fairness import foreground, in_turn
from engine.sequence import BASE_SLOT, Sequence, Status, WaitReason
from engine.step import Chunk, ImageJob, StepPlan
from engine.vision_cache import ImageKey, VisionCache


class StepBudget:
    """What one step may still take; made for one plan and dropped with it."""

    def __init__(self, num_tokens: int, num_patches: int) -> None:
        self.num_tokens = num_tokens
        self.num_patches = num_patches
        self.image_jobs: list[ImageJob] = []
        self.has_prefill = False

    def take_prefill(self, num_tokens: int, jobs: list[ImageJob]) -> bool:
        """Whether a piece of a prompt, with the images it needs encoded, goes into this step.

        The first piece of a step always does, and so does an image larger than the whole vision budget if it is first.
        """
        taken = {job.key for job in self.image_jobs}
        new = list({job.key: job for job in jobs if job.key not in taken}.values())
        num_patches = sum(job.image.pixels.shape[0] for job in new)
        if self.has_prefill and num_tokens > self.num_tokens:
            return False
        if self.image_jobs and num_patches > self.num_patches:
            return False
        self.has_prefill = True
        self.num_tokens -= num_tokens
        self.num_patches -= num_patches
        self.image_jobs += new
        return True


class Scheduler:
    def __init__(
        self, config: EngineConfig, pool: BlockPool, residency: Residency, vision_cache: VisionCache
    ) -> None:
        self._config = config
        self._pool = pool
        self._residency = residency
        self._vision_cache = vision_cache
        self._admission = Admission(pool, residency, config.starvation_s)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.draining: set[AdapterRef] = set()
        """Adapters being unloaded: their new sequences wait until the slot is free."""

    @property
    def num_blocks_used(self) -> int:
        return self._pool.num_used

    @property
    def num_waiting_for_adapter(self) -> int:
        return sum(s.slot_wait_since_s is not None for s in foreground(self.waiting))

    def has_embeddings(self, key: ImageKey) -> bool:
        return key in self._vision_cache

    # ---- births and ends ---------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def end(self, sequence: Sequence) -> None:
        """Free all that the sequence holds; safe for waiting and running ones."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._vacate(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.ENDED

    def end_prefill(self, sequence: Sequence) -> None:
        """Its prompt is cached: its image embeddings are no longer needed."""
        for key in sequence.pinned_images:
            self._vision_cache.unpin(key)
        sequence.pinned_images.clear()

    # ---- what the adapters' side should bring ------------------------------------------------------------------

    def wanted(self, now: float) -> list[AdapterRef]:
        """Adapters of waiting sequences, most urgent first; at most twice the slots, the rest is not near enough."""
        waiting = foreground(self.waiting)
        starved = self._admission.starved(waiting, now)
        victims = self._admission.victims(starved)
        refs = dict.fromkeys(starved)
        for sequence in waiting:
            if len(refs) >= 2 * self._config.num_slots:
                break
            ref = sequence.adapter
            if not ref.is_base and ref not in victims and ref not in self.draining:
                refs.setdefault(ref)
        return list(refs)

    # ---- the plan ----------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan:
        """Decodes first, then running prefills, then new sequences, inside one budget."""
        self._pause_background()
        budget = StepBudget(self._config.max_batch_tokens, self._config.max_image_patches_per_step)
        chunks = self._decode_chunks(budget)
        chunks += self._prefill_chunks(budget)
        chunks += self._admit(budget, now)
        return StepPlan(tuple(chunks), tuple(budget.image_jobs))

    def _pause_background(self) -> None:
        """As soon as anybody else is here: background sequences give all back, and begin again when they are alone."""
        if foreground(self.waiting) or foreground(self.running):
            for sequence in [s for s in self.running if s.request.is_background]:
                self._preempt(sequence)

    def _decode_chunks(self, budget: StepBudget) -> list[Chunk]:
        chunks = []
        for sequence in [s for s in self.running if s.is_decoding]:
            if sequence.status is not Status.RUNNING or not self._make_room(sequence):
                continue  # preempted for an older one, or itself
            chunks.append(Chunk(sequence, sequence.num_computed, 1))
            budget.num_tokens -= 1
        return chunks

    def _prefill_chunks(self, budget: StepBudget) -> list[Chunk]:
        prefilling = [s for s in self.running if not s.is_decoding]
        chunks = (self._next_chunk(sequence, budget) for sequence in prefilling)
        return [chunk for chunk in chunks if chunk is not None]

    def _admit(self, budget: StepBudget, now: float) -> list[Chunk]:
        starved = self._admission.starved(foreground(self.waiting), now)
        blocked = self._admission.victims(starved) | self.draining
        chunks: list[Chunk] = []
        for sequence in in_turn(self.waiting, self.running, now, self._config.starvation_s):
            if budget.num_tokens <= 0 or len(self.running) >= self._config.max_running:
                break
            match self._admission.decide(sequence, blocked):
                case Admitted(slot):
                    self._start(sequence, slot, now)
                    chunk = self._next_chunk(sequence, budget)
                    chunks += [chunk] if chunk else []
                case Refused(reason):
                    self._note_wait(sequence, reason, now)
                    if reason is WaitReason.BLOCKS:
                        break  # nobody overtakes it for memory, or a long prompt would wait for ever
        return chunks

    def _next_chunk(self, sequence: Sequence, budget: StepBudget) -> Chunk | None:
        """Its next piece, if the budgets allow it; where a piece ends depends on the prompt alone."""
        start, size = sequence.num_computed, self._config.prefill_chunk
        end = min(sequence.num_tokens, (start // size + 1) * size)
        chunk = Chunk(sequence, start, end - start)
        keyed = ((sequence.image_key(image), image) for image in chunk.images())
        slot = self._vision_slot(sequence)
        jobs = [ImageJob(key, image, slot) for key, image in keyed if key not in self._vision_cache]
        return chunk if budget.take_prefill(chunk.num_tokens, jobs) else None

    @staticmethod
    def _vision_slot(sequence: Sequence) -> int:
        return sequence.slot if sequence.adapter.vision_digest else BASE_SLOT

    # ---- places ------------------------------------------------------------------------------------------------

    def _start(self, sequence: Sequence, slot: int, now: float) -> None:
        self._pool.grow(sequence.blocks, sequence.num_tokens + 1)
        if not sequence.adapter.is_base:
            self._residency.hold(sequence.adapter)
        for image in sequence.request.prompt.images:
            key = sequence.image_key(image)
            self._vision_cache.pin(key)
            sequence.pinned_images.append(key)
        if sequence.slot_wait_since_s is not None:
            sequence.swap_s += now - sequence.slot_wait_since_s
            sequence.slot_wait_since_s = None
        sequence.slot = slot
        sequence.status = Status.RUNNING
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self._pool.free(sequence.blocks)
        self.end_prefill(sequence)
        if not sequence.adapter.is_base:
            self._residency.release(sequence.adapter)
        sequence.slot = BASE_SLOT
        sequence.num_computed = 0

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for its next token, at the cost of the youngest running sequences; False when it was itself."""
        while not self._pool.can_grow(sequence.blocks, sequence.num_tokens + 1):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self._pool.grow(sequence.blocks, sequence.num_tokens + 1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its tokens are kept and computed again later."""
        self.running.remove(sequence)
        self._vacate(sequence)
        sequence.status = Status.WAITING
        sequence.wait_reason = WaitReason.BLOCKS
        sequence.num_preemptions += 1
        self.waiting.insert(0, sequence)

    @staticmethod
    def _note_wait(sequence: Sequence, reason: WaitReason, now: float) -> None:
        sequence.wait_reason = reason
        if reason is WaitReason.ADAPTER and sequence.slot_wait_since_s is None:
            sequence.slot_wait_since_s = now
