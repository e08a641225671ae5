"""LateDevice: a Launcher for CPUs whose steps are computed as late as a device may: when their tokens are read.

So what the host frees, overwrites or hands to others too early is seen: the step then reads and writes it. It also
looks, at that moment, whether each row's blocks and slot are still its own, for what a row that is dropped reads does
not show in any token. A step's inputs are the tokens of the step before it, as on a device, and not the host's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from adapters.residency import Residency
from engine.engine import Engine
from engine.flight import Choose, Flight, Replayed
from engine.ranking import write_best
from engine.runner import Runner
from engine.sequence import Sequence
from engine.step import Chunk, StepPlan


@dataclass(eq=False)
class _Pass:
    """One launched step; its sequences as they were then."""

    chunks: tuple[Chunk, ...]
    snapshots: tuple[Sequence, ...]
    before: _Pass | None
    choose: Choose | None
    fault: Exception | None
    token_ids: list[int] | None = None


@dataclass
class LateDevice:
    """A Launcher. ``faults`` are raised when the step of that number is read, ``refusals`` when it is launched."""

    eager: Runner
    residency: Residency
    faults: dict[int, Exception] = field(default_factory=dict)
    refusals: dict[int, Exception] = field(default_factory=dict)
    num_launched: int = 0
    violations: list[str] = field(default_factory=list)
    _latest: tuple[Flight, _Pass] | None = None

    @classmethod
    def under(cls, engine: Engine) -> LateDevice:
        """From here on the engine's decodes are launched on it."""
        own = engine._executor._runner
        eager = Runner(own._base, own._routing, own._cache, own._vision_cache, own._tiling)
        device = cls(eager, engine._lifecycle._residency)
        own.replay_with(device)
        return device

    def fits(self, plan: StepPlan) -> bool:
        return bool(plan.chunks) and all(chunk.is_decode and chunk.yields_token for chunk in plan.chunks)

    def run(self, plan: StepPlan) -> Replayed | None:
        self._latest = None
        if not self.fits(plan):
            return None
        logits = self.eager.run(plan).logits
        return Replayed(logits, _likeliest(logits))

    def launch(self, plan: StepPlan, after: Flight | None, choose: Choose | None) -> Flight | None:
        if not self.fits(plan):
            return None
        number, self.num_launched = self.num_launched, self.num_launched + 1
        if number in self.refusals:
            raise self.refusals[number]
        before = None
        if after is not None:
            assert self._latest is not None and self._latest[0] is after
            before = self._latest[1]
        snapshots = tuple(_snapshot(chunk.sequence) for chunk in plan.chunks)
        this = _Pass(plan.chunks, snapshots, before, choose, self.faults.get(number))
        self._note(this, "at its launch")
        flight = Flight(plan.chunks, after is not None, lambda: self._compute(this))
        self._latest = flight, this
        return flight

    @torch.inference_mode()
    def _compute(self, this: _Pass) -> list[int]:
        if this.token_ids is not None:
            return this.token_ids
        if this.before is not None:
            self._feed(this, this.before)
        self._note(this, "when it ran")
        if this.fault is not None:
            raise this.fault
        pairs = zip(this.chunks, this.snapshots, strict=True)
        plan = StepPlan(tuple(Chunk(snapshot, chunk.start, 1) for chunk, snapshot in pairs), ())
        logits = self.eager.run(plan).logits
        chosen = _likeliest(logits) if this.choose is None else this.choose(logits)
        this.token_ids = chosen.tolist()
        return this.token_ids

    def _feed(self, this: _Pass, before: _Pass) -> None:
        token_ids = self._compute(before)
        rows = {chunk.sequence: row for row, chunk in enumerate(before.chunks)}
        for chunk, snapshot in zip(this.chunks, this.snapshots, strict=True):
            del snapshot.output_ids[chunk.start - snapshot.num_prompt_tokens :]
            snapshot.output_ids.append(max(0, token_ids[rows[chunk.sequence]]))

    def _note(self, this: _Pass, when: str) -> None:
        """Are the rows' blocks and slots still theirs?"""
        for chunk, snapshot in zip(this.chunks, this.snapshots, strict=True):
            sequence, num_blocks = chunk.sequence, -(-chunk.end // self.eager._cache.block_size)
            name = f"{sequence.request_id} {when}"
            if (
                sequence.blocks[:num_blocks] != snapshot.blocks[:num_blocks]
                or len(snapshot.blocks) < num_blocks
            ):
                self.violations.append(
                    f"{name}: its blocks were {snapshot.blocks}, and are {sequence.blocks}"
                )
            if sequence.adapter.is_base:
                continue
            if self.residency.slot_of(sequence.adapter) != snapshot.slot:
                self.violations.append(f"{name}: its adapter left slot {snapshot.slot}")
            elif self.residency.num_holds(sequence.adapter) == 0:
                self.violations.append(f"{name}: nobody holds its adapter in slot {snapshot.slot}")


def _snapshot(sequence: Sequence) -> Sequence:
    taken = copy.copy(sequence)
    taken.blocks, taken.output_ids = list(sequence.blocks), list(sequence.output_ids)
    return taken


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    chosen = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    write_best(chosen, logits)
    return chosen
