"""ReadAhead: adapters that wanted sequences wait for are read and checked before a slot is free for them.

Owns which of the wanted ones have been read ahead, each once for as long as it is wanted, and where on the device they
will lie. So somebody leaves a slot only for an adapter that is ready to come: one that is broken, cannot be staged or
has no room fails, and costs nobody a slot.

Place in a request's way: step 5, before the residency plans.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.errors import AdapterError
from adapters.mover import Mover
from adapters.ref import AdapterRef
from adapters.residency import Residency
from adapters.room import Footprint


class ReadAhead:
    """The engine's thread only."""

    def __init__(self, residency: Residency, mover: Mover) -> None:
        self._residency = residency
        self._mover = mover
        self._begun: set[AdapterRef] = set()
        self._ended: dict[AdapterRef, Footprint] = {}
        """Read: now on the host, or too large to be kept there; then the load reads it again."""

    def ready(self, refs: Sequence[AdapterRef]) -> dict[AdapterRef, Footprint]:
        """Those of the wanted ``refs`` that can come at once, and where they will lie; for the others nobody should
        leave yet. What is no longer wanted is forgotten."""
        self._begun.intersection_update(refs)
        self._ended = {ref: self._ended[ref] for ref in refs if ref in self._ended}
        on_host = {ref: self._mover.footprint(ref) for ref in refs if ref not in self._ended}
        return self._ended | {ref: footprint for ref, footprint in on_host.items() if footprint is not None}

    def begin(self, refs: Sequence[AdapterRef]) -> None:
        """Read those that found no slot, most urgent first, as many at a time as the mover takes."""
        for ref in refs:
            if ref in self._begun or self._residency.has_seat(ref) or self._mover.is_on_host(ref):
                continue
            if not self._mover.prefetch(ref):
                return
            self._begun.add(ref)

    def settle(self) -> list[tuple[AdapterRef, AdapterError]]:
        """Take in what ended; the adapters that could not be read and that no load under way will tell of."""
        failures = []
        for ref, outcome in self._mover.take_prefetched().items():
            if not isinstance(outcome, AdapterError):
                self._ended |= {ref: outcome} if ref in self._begun else {}
            elif not self._residency.has_seat(ref):
                self._begun.discard(ref)
                failures.append((ref, outcome))
        return failures
