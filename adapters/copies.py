"""Copies: loads whose weights are on the host and are being written into their slots, a slice at a time.

Owns what is left to copy, in order. A slot that is not wholly written is invisible; where writing fails it is empty.

Place in a request's way: step 5, at a step's boundary: what is copied here is what running sequences wait for.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from adapters.errors import AdapterError, InsufficientMemory
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
    slices: Iterator[int] | None = None
    """Bytes of each, just copied; None before the first."""
    seconds: float = 0.0


class Copies:
    """The engine's thread only."""

    def __init__(self, bank: SlotBank) -> None:
        self._bank = bank
        self._copies: deque[_Copy] = deque()

    @property
    def is_busy(self) -> bool:
        return bool(self._copies)

    def add(self, ready: Iterable[Ready]) -> None:
        self._copies.extend(map(_Copy, ready))

    def advance(self, max_bytes: int | None) -> list[Moved | MoveFailed]:
        """Copy as many bytes, and the site that passes them, or all; what ended with it."""
        results: list[Moved | MoveFailed] = []
        num_bytes = 0
        while self._copies and (max_bytes is None or num_bytes < max_bytes):
            result, copied = self._copy(self._copies[0], None if max_bytes is None else max_bytes - num_bytes)
            num_bytes += copied
            if result is not None:
                self._copies.popleft()
                results.append(result)
        return results

    def _copy(self, copy: _Copy, max_bytes: int | None) -> tuple[Moved | MoveFailed | None, int]:
        """Its next slices: what came of the load, None while some are left, and the bytes copied now."""
        load, outcome = copy.ready.load, copy.ready.outcome
        if isinstance(outcome, AdapterError):
            return MoveFailed(load, outcome), 0
        begin_s, num_bytes = time.monotonic(), 0
        copy.slices = copy.slices or self._bank.writing(load.slot, outcome)
        try:
            for each in copy.slices:
                num_bytes += each
                if max_bytes is not None and num_bytes >= max_bytes:
                    copy.seconds += time.monotonic() - begin_s
                    return None, num_bytes
        except Exception as error:  # noqa: BLE001  (whatever it is, what is left of the copy must not pass for done)
            return MoveFailed(load, translate(load.ref, error)), num_bytes
        seconds = {"read": copy.ready.read_s, "copy": copy.seconds + time.monotonic() - begin_s}
        return Moved(load, outcome.num_bytes, seconds, copy.ready.origin, outcome.proof), num_bytes


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
