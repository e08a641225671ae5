"""Copies: loads whose weights are on the host and are being written into their slots, a slice at a time.

Owns what is left to copy, in order. A slot that is not wholly written is invisible; where writing fails it is empty.
Where slices run beside the steps (adapters/lane.py) they are only launched here, and a slot is wholly written once the
mark behind its last slice has passed, which is looked up at each boundary and never waited for.

Place in a request's way: step 5, at a step's boundary: what is copied here is what running sequences wait for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch

from adapters.errors import AdapterError, InsufficientMemory
from adapters.lane import Lane, Mark
from adapters.moves import Load, Moved, MoveFailed, Tier
from adapters.ref import AdapterRef
from adapters.slots import SlotBank
from adapters.staging import StagedAdapter

logger = logging.getLogger("lorikeet.adapters")


@dataclass(frozen=True, slots=True)
class Ready:
    """A load whose outcome is known and whose slot is not yet written."""

    load: Load
    outcome: StagedAdapter | AdapterError
    read_s: float
    origin: Tier


@dataclass(slots=True)
class _Copy:
    """A load on its way into its slot; a slice of it at each step's boundary."""

    ready: Ready
    slices: Generator[int] | None = None
    """Bytes of each, just launched, and at its end the slot is visible; None before the first."""
    num_left: int = 0
    """Slices that are not launched yet."""
    mark: Mark | None = None
    """Behind the last slice."""
    seconds: float = 0.0
    """At boundaries."""
    waits_since_s: float | None = None
    """When it was first met with all launched and not all over."""


class Copies:
    """The engine's thread only."""

    def __init__(self, bank: SlotBank, lane: Lane) -> None:
        self._bank = bank
        self._lane = lane
        self._copies: list[_Copy] = []

    @property
    def is_busy(self) -> bool:
        return bool(self._copies)

    def add(self, ready: Iterable[Ready]) -> None:
        self._copies.extend(map(_Copy, ready))

    def advance(self, max_bytes: int | None) -> list[Moved | MoveFailed]:
        """Copy as many bytes, and the site that passes them, or all; what ended with it.

        With ``max_bytes`` sequences run, and none of them waits for a copy: it ends at the first boundary that finds
        it over. None says that nobody would have to wait: all ends now, and the next step comes after it on the device.
        """
        results: list[Moved | MoveFailed] = []
        num_bytes = 0
        for copy in tuple(self._copies):
            if max_bytes is not None and num_bytes >= max_bytes:
                break
            result, copied = self._go_on(copy, None if max_bytes is None else max_bytes - num_bytes)
            num_bytes += copied
            if result is not None:
                self._copies.remove(copy)
                results.append(result)
        return results

    def _go_on(self, copy: _Copy, max_bytes: int | None) -> tuple[Moved | MoveFailed | None, int]:
        """Its next slices: what came of the load, None while it is not over, and the bytes copied now."""
        load, outcome = copy.ready.load, copy.ready.outcome
        if isinstance(outcome, AdapterError):
            return MoveFailed(load, outcome), 0
        begin_s, num_bytes = time.monotonic(), 0
        try:
            if copy.mark is None:
                num_bytes = self._launch(copy, outcome, max_bytes)
            if (max_bytes is not None and num_bytes >= max_bytes) or not _is_over(copy, max_bytes is None):
                copy.seconds += 0.0 if copy.waits_since_s is not None else time.monotonic() - begin_s
                return None, num_bytes
            _end(copy)
        except Exception as error:  # noqa: BLE001  (whatever it is, what is left of the copy must not pass for done)
            if copy.slices is not None:
                copy.slices.close()
            return MoveFailed(load, translate(load.ref, error)), num_bytes
        waited_s = time.monotonic() - (begin_s if copy.waits_since_s is None else copy.waits_since_s)
        seconds = {"read": copy.ready.read_s, "copy": copy.seconds + waited_s}
        return Moved(load, outcome.num_bytes, seconds, copy.ready.origin, outcome.proof), num_bytes

    def _launch(self, copy: _Copy, staged: StagedAdapter, max_bytes: int | None) -> int:
        """Slices up to ``max_bytes`` and the one that passes them, then the mark; their bytes."""
        if copy.slices is None:
            copy.slices, copy.num_left = self._bank.writing(copy.ready.load.slot, staged), len(staged.sites)
        num_bytes = 0
        with self._lane.slice():
            while copy.num_left and (max_bytes is None or num_bytes < max_bytes):
                num_bytes += next(copy.slices)
                copy.num_left -= 1
        if not copy.num_left:
            copy.mark = self._lane.mark()
        return num_bytes


def _is_over(copy: _Copy, is_idle: bool) -> bool:
    """Whether the slot is wholly written, or will be before any step launched from now on."""
    if copy.mark is None:
        return False
    if is_idle:
        copy.mark.put_before_steps()
        return True
    if copy.mark.has_passed():
        return True
    if copy.waits_since_s is None:
        copy.waits_since_s = time.monotonic()
    return False


def _end(copy: _Copy) -> None:
    """Make the slot visible."""
    if copy.slices is not None:
        for _ in copy.slices:
            raise ValueError("a copy was ended that has slices left")


def translate(ref: AdapterRef, error: BaseException) -> AdapterError:
    """A foreign exception as ours, without its text: that may hold a path of this machine."""
    if isinstance(error, AdapterError):
        return error
    kind = type(error).__name__
    logger.error("adapter.move_failed ref=%s error=%s", ref, kind)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return InsufficientMemory(f"no memory for adapter {ref}; unload another adapter or lower num_slots")
    cause = f"{kind}: {error.strerror}" if isinstance(error, OSError) and error.strerror else kind
    return AdapterError(f"adapter {ref} could not be loaded ({cause}); check its package and load it again")
