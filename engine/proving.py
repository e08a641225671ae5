"""Proving: each content that comes to the device is proved once, before any request is routed to it.

Owns which contents have been proved, and whose turn it is: where sequences run, a step's boundary has room for one pass
through the model. What a proof is, the probe knows.

Place in a request's way: step 5, between the copy into a slot and the first sequence that sees it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, replace

from adapters.errors import AdapterError, AdapterRejected, RejectReason
from adapters.moves import Moved, MoveFailed
from adapters.ref import AdapterRef
from adapters.slots import SlotBank
from engine.observer import AdapterProven, DecodeStalled, Observer
from engine.probe import Probe
from engine.replay import Replay

logger = logging.getLogger("lorikeet.engine")


@dataclass(slots=True)
class _Trial:
    """One adapter that is being proved; its slot is taken and nobody is routed to it."""

    result: Moved
    passes: Generator[None, None, Replay | None]
    seconds: float = 0.0


class Proving:
    """The engine's thread only."""

    def __init__(self, probe: Probe, bank: SlotBank, observer: Observer) -> None:
        self._probe = probe
        self._bank = bank
        self._observer = observer
        self._proven: set[str] = set()
        self._trials: deque[_Trial] = deque()

    @property
    def is_busy(self) -> bool:
        return bool(self._trials)

    def begin(self, result: Moved) -> Moved | None:
        """The result itself if its content was proved before; else ``advance`` tells what became of it."""
        ref, slot = result.move.ref, result.move.slot
        if ref.digest in self._proven:
            return result
        self._trials.append(_Trial(result, self._probe.passes(ref, slot, result.proof)))
        return None

    def advance(self, has_running: bool) -> list[Moved | MoveFailed]:
        """One pass through the model where sequences run, which wait for it meanwhile; otherwise all that are left."""
        ended: list[Moved | MoveFailed] = []
        while self._trials:
            outcome = self._pass(self._trials[0], has_running)
            if outcome is not None:
                self._trials.popleft()
                ended.append(outcome)
            if has_running:
                break
        return ended

    def _pass(self, trial: _Trial, has_running: bool) -> Moved | MoveFailed | None:
        """The trial's next pass: what came of it, None while some are left."""
        begin_s = time.monotonic()
        try:
            next(trial.passes)
            return None
        except StopIteration as end:
            return self._accept(trial, end.value, time.monotonic() - begin_s)
        except Exception as error:  # noqa: BLE001  (a trial that throws must not pass for one that is over)
            self._bank.clear(trial.result.move.slot)  # it leaves before anyone was routed to it
            return MoveFailed(trial.result.move, _refusal(trial.result.move.ref, error))
        finally:
            trial.seconds += time.monotonic() - begin_s
            if has_running:
                self._observer.record(DecodeStalled("adapter_probe", time.monotonic() - begin_s))

    def _accept(self, trial: _Trial, replay: Replay | None, last_s: float) -> Moved:
        ref = trial.result.move.ref
        if not ref.is_composed:  # clients choose their weights: a record of each would grow without end
            self._proven.add(ref.digest)
        if replay is not None:
            self._note_replay(ref, replay)
        return replace(trial.result, seconds={**trial.result.seconds, "probe": trial.seconds + last_s})

    def _note_replay(self, ref: AdapterRef, replay: Replay) -> None:
        logger.info(
            "adapter.proven ref=%s probes=%d difference=%.6g limit=%.6g is_exact=%s",
            ref, replay.num_probes, replay.difference, replay.limit, replay.is_exact,
        )  # fmt: skip
        self._observer.record(AdapterProven(ref, replay.difference, replay.limit, replay.is_exact))


def _refusal(ref: AdapterRef, error: Exception) -> AdapterError:
    if isinstance(error, AdapterError):
        return error
    logger.error("adapter.proof_broke ref=%s error=%s", ref, type(error).__name__)
    what = f"adapter {ref} cannot be proved ({type(error).__name__})"
    return AdapterRejected(RejectReason.PROBE_FAILED, what)
