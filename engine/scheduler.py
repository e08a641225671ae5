"""Scheduler: who computes in the next step. It owns the queue, the running list and every sequence's status, blocks and
slot; it returns a frozen StepPlan and touches no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from adapters.ref import AdapterRef
from adapters.residency import Residency
from engine.admission import Admission, Admitted, Refused
from engine.blocks import BlockPool
from engine.budget import StepBudget
from engine.config import EngineConfig
from engine.fairness import foreground, has_prompts, in_turn, who_yields
from engine.holdings import Holdings
from engine.prefix import Prefixes
from engine.sequence import BASE_SLOT, Sequence, Status, WaitReason
from engine.step import Chunk, ImageJob, StepPlan
from engine.tiling import Tiling
from engine.vision_cache import VisionCache


class Scheduler:
    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        residency: Residency,
        vision_cache: VisionCache,
        tiling: Tiling,
    ) -> None:
        self._config = config
        self._tiling = tiling
        self._pool = pool
        self._prefixes = Prefixes(pool, tiling, is_on=config.prefix_cache)
        self._vision_cache = vision_cache
        self._admission = Admission(pool, self._prefixes, residency, config.starvation_s)
        self._holdings = Holdings(pool, residency, vision_cache)
        self._ahead: StepPlan | None = None
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.draining: set[AdapterRef] = set()
        """Adapters being unloaded: their new sequences wait until the slot is free."""

    @property
    def num_blocks_used(self) -> int:
        return self._pool.num_used

    @property
    def is_ahead(self) -> bool:
        """Whether the next plan is made already."""
        return self._ahead is not None

    @property
    def has_prompts(self) -> bool:
        """Whether the next step may hold a piece of a prompt, if nobody ends."""
        return has_prompts(self.waiting, self.running, self._config.max_running)

    @property
    def has_queue(self) -> bool:
        """Whether somebody gets the place of whoever ends."""
        return bool(foreground(self.waiting))

    @property
    def num_waiting_for_adapter(self) -> int:
        return sum(s.slot_wait_since_s is not None for s in foreground(self.waiting))

    # ---- births and ends ---------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def end(self, sequence: Sequence) -> None:
        """Free all that the sequence holds, once no step has a row of it; safe for waiting and running ones."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._holdings.give_back_ended(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.ENDED

    def end_prefill(self, sequence: Sequence) -> None:
        """Its prompt is cached: its image embeddings are no longer needed."""
        self._holdings.unpin_images(sequence)

    def keep(self, sequence: Sequence) -> None:
        """A row of it had finite logits: what it has computed may serve others."""
        self._prefixes.keep(sequence)

    def distrust(self, sequence: Sequence) -> None:
        """Nobody else may start from the blocks that it used, its own or others', nor from those to come."""
        sequence.is_kept_apart = True
        self._pool.forget(sequence.blocks)

    def distrust_all(self) -> None:
        """The engine met an error whose reach nobody knows."""
        self._pool.forget_all()

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
        """Decodes first, then pieces of prompts, each adapter in its turn, inside one budget. A step that was planned
        ahead is what is left of it.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return ahead.only([chunk for chunk in ahead.chunks if chunk.sequence.status is Status.RUNNING])
        self._pause_background()
        blocked = self._blocked(now)
        self._yield_a_place(blocked)
        budget = StepBudget(self._config.max_batch_tokens, self._config.max_image_patches_per_step)
        chunks = self._decode_chunks(budget)
        if chunks and self._config.prefill_beside_decodes is not None:
            budget.num_tokens = min(budget.num_tokens, self._config.prefill_beside_decodes)
        chunks += self._prompt_chunks(budget, blocked, now)
        return StepPlan(tuple(chunks), tuple(budget.image_jobs))

    def plan_ahead(self, chunks: Seq[Chunk]) -> StepPlan | None:
        """Make these the next plan, before the tokens of this one are known; None where nobody is left, or blocks would
        have to be taken from others.
        """
        if not chunks or not all(self._holdings.grow(chunk.sequence, chunk.end) for chunk in chunks):
            return None
        self._ahead = StepPlan(tuple(chunks), ())
        self._holdings.expect(self._ahead)
        return self._ahead

    def land(self) -> None:
        """The step is over: what those held who ended while it ran is free, but for rows of the one planned ahead."""
        self._holdings.land(self._ahead)

    def forget_ahead(self) -> None:
        """Nothing is on the device any more, and what was planned ahead will not be."""
        self._ahead = None
        self.land()

    def _blocked(self, now: float) -> frozenset[AdapterRef]:
        """Adapters that get no new sequences: being unloaded, or to give their slot to a starved one."""
        starved = self._admission.starved(foreground(self.waiting), now)
        return self._admission.victims(starved) | self.draining

    def _yield_a_place(self, blocked: frozenset[AdapterRef]) -> None:
        """Where one adapter's sequences have taken all places, another's gets one of them, one a step. What is sent
        back keeps its tokens, and finds its blocks again unless they were needed.
        """
        if len(self.running) < self._config.max_running:
            return
        for sequence in in_turn(self.waiting, self.running):
            if sequence.status is Status.RUNNING:
                continue
            victim = who_yields(sequence, self.running)
            if victim is None:
                return
            if isinstance(self._admission.decide(sequence, blocked), Admitted):
                self._preempt(victim, WaitReason.QUEUE)
                return

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

    def _prompt_chunks(self, budget: StepBudget, blocked: frozenset[AdapterRef], now: float) -> list[Chunk]:
        chunks: list[Chunk] = []
        may_start = True
        for sequence in in_turn(self.waiting, self.running):
            if budget.is_spent:
                break
            is_running = sequence.status is Status.RUNNING
            if not is_running and may_start:
                may_start = self._try_start(sequence, blocked, now)
                is_running = sequence.status is Status.RUNNING
            if not is_running:
                continue
            chunk = self._next_chunk(sequence, budget)
            if chunk is None:
                may_start = False  # a newcomer would only hold blocks, and may find more of them later
            else:
                chunks.append(chunk)
        return chunks

    def _try_start(self, sequence: Sequence, blocked: frozenset[AdapterRef], now: float) -> bool:
        """Start it if it may; whether others may still follow."""
        if len(self.running) >= self._config.max_running:
            return False
        match self._admission.decide(sequence, blocked):
            case Admitted(slot, found):
                self._start(sequence, slot, found, now)
            case Refused(reason):
                self._note_wait(sequence, reason, now)
                return reason is not WaitReason.BLOCKS  # for memory nobody overtakes: long prompts must come
        return True

    def _next_chunk(self, sequence: Sequence, budget: StepBudget) -> Chunk | None:
        """Its next piece, if the budgets allow it."""
        start = sequence.num_computed
        chunk = Chunk(sequence, start, self._chunk_end(sequence, budget) - start)
        keyed = ((sequence.image_key(image), image) for image in chunk.images())
        slot = self._vision_slot(sequence)
        jobs = [ImageJob(key, image, slot) for key, image in keyed if key not in self._vision_cache]
        return chunk if budget.take_prefill(chunk.num_tokens, jobs) else None

    def _chunk_end(self, sequence: Sequence, budget: StepBudget) -> int:
        """The last cut within the budgets; the first piece of a step is a tile at least, so that all come on."""
        start, num_prompt = sequence.num_computed, sequence.num_prompt_tokens
        size = max(self._tiling.size, min(self._config.prefill_chunk, budget.num_tokens))
        limit = min(sequence.num_tokens, start + size)
        return self._tiling.cut_within(start, limit, num_prompt)

    @staticmethod
    def _vision_slot(sequence: Sequence) -> int:
        return sequence.slot if sequence.adapter.vision_digest else BASE_SLOT

    # ---- places ------------------------------------------------------------------------------------------------

    def _start(self, sequence: Sequence, slot: int, found: tuple[int, ...], now: float) -> None:
        self._holdings.take(sequence, slot, found)
        if sequence.slot_wait_since_s is not None:
            sequence.swap_s += now - sequence.slot_wait_since_s
            sequence.slot_wait_since_s = None
        sequence.status = Status.RUNNING
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for its next token, at the cost of the youngest running sequences; False when it was itself."""
        while not self._holdings.grow(sequence, sequence.num_tokens + 1):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, reason: WaitReason = WaitReason.BLOCKS) -> None:
        """Back to the head of the queue; its tokens are kept, and computed again later as far as they must be."""
        self.running.remove(sequence)
        self._holdings.give_back(sequence)
        sequence.status = Status.WAITING
        sequence.wait_reason = reason
        sequence.num_preemptions += 1
        self.waiting.insert(0, sequence)

    @staticmethod
    def _note_wait(sequence: Sequence, reason: WaitReason, now: float) -> None:
        sequence.wait_reason = reason
        if reason is WaitReason.ADAPTER and sequence.slot_wait_since_s is None:
            sequence.slot_wait_since_s = now
