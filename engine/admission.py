"""Admission: may this waiting sequence start now? Decides only; the scheduler acts on the answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from adapters.ref import AdapterRef
from adapters.residency import Residency
from engine.blocks import BlockPool
from engine.prefix import Prefixes
from engine.sequence import BASE_SLOT, Sequence, WaitReason


@dataclass(frozen=True, slots=True)
class Admitted:
    slot: int
    found: tuple[int, ...]
    """Blocks of its prefix that are computed already."""


@dataclass(frozen=True, slots=True)
class Refused:
    reason: WaitReason


class Admission:
    """A sequence needs its adapter in a slot, and blocks for the tokens it has plus the next one."""

    def __init__(
        self, pool: BlockPool, prefixes: Prefixes, residency: Residency, starvation_s: float
    ) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._residency = residency
        self._starvation_s = starvation_s

    def decide(self, sequence: Sequence, blocked: Collection[AdapterRef]) -> Admitted | Refused:
        slot = self._slot(sequence.adapter, blocked)
        if slot is None:
            return Refused(WaitReason.ADAPTER)
        found = self._prefixes.find(sequence)
        if not self._pool.can_grow(found, sequence.num_tokens + 1):
            return Refused(WaitReason.BLOCKS)
        return Admitted(slot, tuple(found))

    def _slot(self, ref: AdapterRef, blocked: Collection[AdapterRef]) -> int | None:
        if ref.is_base:
            return BASE_SLOT
        return None if ref in blocked else self._residency.slot_of(ref)

    def starved(self, waiting: Collection[Sequence], now: float) -> list[AdapterRef]:
        """Adapters whose oldest sequence has waited too long for a slot and that are not already on their way."""
        refs = {
            s.adapter: None
            for s in waiting
            if s.slot_wait_since_s is not None and now - s.slot_wait_since_s >= self._starvation_s
        }
        return [r for r in refs if self._residency.slot_of(r) is None and not self._residency.is_loading(r)]

    def victims(self, starved: Collection[AdapterRef]) -> frozenset[AdapterRef]:
        """Adapters that get no new sequences until a starved one has their slot: those with the fewest running.

        One for each, and more where their bytes are not enough for one of large rank.

        One that nobody has used since it came is spared: else two starved adapters could chase each other out of a slot
        for ever, and neither would run.
        """
        if not starved:
            return frozenset()
        candidates = [r for r in self._residency.residents() if r.num_uses and not r.is_pinned]
        candidates.sort(key=lambda r: (r.num_holds, r.slot))
        refs = [r.ref for r in candidates]
        count = len(starved)
        while count < len(refs) and not all(self._residency.fits(ref, refs[:count]) for ref in starved):
            count += 1
        return frozenset(refs[:count])
