"""AdapterSwaps: the adapters' side of the step. It joins who decides (Residency), who moves (Mover) and who
proves each newly arrived adapter before any request sees it (Proving), and answers explicit loads and unloads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from adapters.errors import AdapterBusy, AdapterError, AdapterRejected, InsufficientMemory
from adapters.mover import Mover
from adapters.moves import Evict, Moved, MoveFailed
from adapters.ref import AdapterRef
from adapters.residency import Residency
from adapters.room import Footprint
from adapters.slots import SlotBank
from engine.messages import LoadAdapter, LoadReport, UnloadAdapter, UnloadReport
from engine.observer import (
    AdapterEvicted,
    AdapterMoved,
    AdapterMoveFailed,
    DecodeStalled,
    Observer,
)
from engine.probe import Probe
from engine.proving import Proving
from engine.readahead import ReadAhead
from engine.status import Sizes, SlotStatus, SwapsPicture

logger = logging.getLogger("lorikeet.engine")

SLICE_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
"""Copied into slots at one step's boundary while sequences run: about a millisecond, by 4 and 30 GB/s. On a CPU a step
waits for it; on CUDA it runs beside the steps, and the boundary only launches it."""

Reply = LoadReport | UnloadReport | Exception


@dataclass(frozen=True, slots=True)
class PendingUnload:
    message: UnloadAdapter
    deadline_s: float


class AdapterSwaps:
    """The engine's thread only."""

    def __init__(
        self, residency: Residency, mover: Mover, bank: SlotBank, probe: Probe, observer: Observer
    ) -> None:
        self._residency = residency
        self._mover = mover
        self._bank = bank
        self._proving = Proving(probe, bank, observer)
        self._slice_bytes = SLICE_BYTES["cuda" if bank.device.type == "cuda" else "cpu"]
        self._observer = observer
        self._loads: dict[AdapterRef, list[tuple[LoadAdapter, float]]] = {}
        self._unloads: list[PendingUnload] = []
        self._read_ahead = ReadAhead(residency, mover)
        self._oversized: dict[AdapterRef, AdapterError] = {}
        self._answers: list[Callable[[], None]] = []
        self._slot_bytes: dict[int, int] = {}
        self._sizes = Sizes(0, frozenset(), 0)
        self._drawn: tuple[tuple[int, int], SwapsPicture] | None = None
        self._num_weighings = 0

    @property
    def draining(self) -> set[AdapterRef]:
        """Adapters that get no new sequences because someone is unloading them."""
        return {pending.message.ref for pending in self._unloads}

    def is_on_host(self, ref: AdapterRef) -> bool:
        return self._mover.is_on_host(ref)

    @property
    def has_pending(self) -> bool:
        return bool(self._loads or self._unloads)

    @property
    def has_work(self) -> bool:
        """Whether the next settling has something to do, though no message comes."""
        return self._mover.is_copying or self._proving.is_busy

    # ---- messages ----------------------------------------------------------------------------------------------

    def request_load(self, message: LoadAdapter, now: float) -> None:
        if self._residency.slot_of(message.ref) is None and not self._residency.can_ever_load(message.ref):
            self._answer(
                message, InsufficientMemory("every adapter slot is pinned; unpin one or raise num_slots")
            )
            return
        self._loads.setdefault(message.ref, []).append((message, now))

    def request_unload(self, message: UnloadAdapter, now: float) -> None:
        self._unloads.append(PendingUnload(message, now + message.timeout_s))

    def _answer(self, message: LoadAdapter | UnloadAdapter, outcome: Reply) -> None:
        self._answers.append(lambda: message.reply(outcome))  # type: ignore[arg-type]  # each message its own report

    def send_answers(self) -> None:
        """Tell those who asked; after the status was published, so that what they are told is visible."""
        answers, self._answers = self._answers, []
        for answer in answers:
            answer()

    # ---- each step ---------------------------------------------------------------------------------------------

    def start(self, wanted: Iterable[AdapterRef]) -> None:
        """Plan and start the moves that explicit loads and the scheduler's waiting sequences call for."""
        refs = list(dict.fromkeys([*self._loads, *wanted]))
        ready = self._read_ahead.ready(refs)
        if not refs:
            return
        refs = self._without_oversized(refs, ready)
        moves = self._residency.plan(refs, ready)
        for move in moves:
            if isinstance(move, Evict):
                logger.info("adapter.evicted ref=%s slot=%d", move.ref, move.slot)
                self._observer.record(AdapterEvicted(move.ref, "lru"))
        self._mover.start(moves)
        self._read_ahead.begin(refs)

    def _without_oversized(
        self, refs: list[AdapterRef], ready: Mapping[AdapterRef, Footprint]
    ) -> list[AdapterRef]:
        """Those that may come one day; who waits for the others is told so at the next settling."""
        for ref, footprint in ready.items():
            if (shortage := self._residency.shortage(ref, footprint)) is not None:
                self._oversized[ref] = shortage.error(ref.title)
        return [ref for ref in refs if ref not in self._oversized]

    def settle(self, has_running: bool) -> list[tuple[AdapterRef, AdapterError]]:
        """Make finished loads visible, answer those who waited for them, and return the adapters that failed."""
        failures = [*self._read_ahead.settle(), *self._oversized.items()]
        self._oversized.clear()
        for ref, error in failures:
            self._report_failure(ref, error)
        for result in self._arrived(has_running):
            self._residency.settle(result)
            if isinstance(result, Moved):
                self._announce(result)
            else:
                failures.append((result.move.ref, result.error))
                self._report_failure(result.move.ref, result.error)
        self._answer_loads()
        self._answer_unloads(time.monotonic())
        return failures

    def _arrived(self, has_running: bool) -> list[Moved | MoveFailed]:
        """Loads that ended, proved or failed. Where sequences run, this does one thing that makes them wait: a pass of
        the probe, or a slice of a copy."""
        proved = self._proving.advance(has_running)
        is_step_taken = has_running and (bool(proved) or self._proving.is_busy)
        copied = [] if is_step_taken else self._copied(has_running)
        begun = [self._proving.begin(each) if isinstance(each, Moved) else each for each in copied]
        ended = [*proved, *(each for each in begun if each is not None)]
        if not has_running:
            ended += self._proving.advance(has_running)
        if copied or proved or self._mover.host_num_bytes != self._sizes.host_bytes:
            self._weigh()  # also for reads ahead, which end without a result
        return ended

    def _copied(self, has_running: bool) -> list[Moved | MoveFailed]:
        begin_s = time.monotonic()
        results = self._mover.finished(self._slice_bytes if has_running else None)
        if has_running and (results or self._mover.is_copying):
            self._observer.record(DecodeStalled("adapter_copy", time.monotonic() - begin_s))
        return results

    def _announce(self, result: Moved) -> None:
        took_ms = 1000 * sum(result.seconds.values())
        logger.info("adapter.loaded ref=%s slot=%d took_ms=%.1f", result.move.ref, result.move.slot, took_ms)
        self._observer.record(AdapterMoved(result.move.ref, result.num_bytes, result.seconds))

    def _report_failure(self, ref: AdapterRef, error: AdapterError) -> None:
        reason = str(error.reason) if isinstance(error, AdapterRejected) else type(error).__name__
        logger.warning("adapter.load_failed ref=%s reason=%s", ref, reason)
        self._observer.record(AdapterMoveFailed(ref, reason))
        for message, _ in self._loads.pop(ref, []):
            self._answer(message, error)

    def _answer_loads(self) -> None:
        for ref in [r for r in self._loads if self._residency.slot_of(r) is not None]:
            slot = self._residency.hold(ref)
            for message, asked_s in self._loads.pop(ref):
                if message.pin:
                    self._residency.pin(ref)
                else:
                    self._residency.unpin(ref)
                took_s = time.monotonic() - asked_s
                self._answer(message, LoadReport(ref, slot, self._bank.slot_bytes(slot), took_s))
            self._residency.release(ref)

    def _answer_unloads(self, now: float) -> None:
        self._unloads = [pending for pending in self._unloads if not self._try_unload(pending, now)]

    def _try_unload(self, pending: PendingUnload, now: float) -> bool:
        """Whether the unload is over, done or timed out."""
        message = pending.message
        num_holds = self._residency.num_holds(message.ref)
        if num_holds or self._residency.is_loading(message.ref):
            if now < pending.deadline_s:
                return False
            self._answer(message, AdapterBusy(message.ref.title, num_holds))
            return True
        self._answer(message, self._unload(message.ref))
        return True

    def _unload(self, ref: AdapterRef) -> UnloadReport:
        self._residency.unpin(ref)
        evict = self._residency.drop(ref)
        freed = self._bank.num_bytes
        if evict is not None:
            self._mover.start([evict])
            self._observer.record(AdapterEvicted(ref, "unload"))
        freed -= self._bank.num_bytes  # what the bank gave back: pages that others still use stay
        report = UnloadReport(ref, freed, self._mover.forget(ref))
        if report.freed_host_bytes:
            self._observer.record(AdapterEvicted(ref, "unload", "host"))
        self._weigh()
        logger.info("adapter.unloaded ref=%s device_bytes=%d", ref, freed)
        return report

    def _weigh(self) -> None:
        """Sizes change only when an adapter moves; the picture of each step takes them from here."""
        for ref in self._mover.take_evicted_from_host():
            self._observer.record(AdapterEvicted(ref, "lru", "host"))
        self._num_weighings += 1
        self._slot_bytes = {i: self._bank.slot_bytes(i) for i in range(self._bank.num_slots)}
        self._sizes = Sizes(self._mover.host_num_bytes, self._mover.host_refs(), self._bank.num_bytes)

    def picture(self) -> SwapsPicture:
        """Made anew only when somebody came, went, or was held; most steps change none of it."""
        key = (self._residency.revision, self._num_weighings)
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = (key, self._draw())
        return self._drawn[1]

    def _draw(self) -> SwapsPicture:
        slots = [SlotStatus(i, None, "free", False, 0, 0) for i in range(self._bank.num_slots)]
        for move in self._residency.loading():
            slots[move.slot] = SlotStatus(move.slot, move.ref, "loading", False, 0, 0)
        for r in self._residency.residents():
            num_bytes = self._slot_bytes[r.slot]
            slots[r.slot] = SlotStatus(r.slot, r.ref, "resident", r.is_pinned, r.num_holds, num_bytes)
        sizes = self._sizes
        return SwapsPicture(tuple(slots), sizes.host_bytes, sizes.host_refs, sizes.slot_bank_bytes)

    def fail_pending(self, error: Exception) -> None:
        """Answer everyone who still waits; for the end of the engine."""
        for waiting in self._loads.values():
            for message, _ in waiting:
                self._answer(message, error)
        for pending in self._unloads:
            self._answer(pending.message, error)
        self._loads.clear()
        self._unloads.clear()
