"""Upkeep: every two seconds, this server's device is made to agree with the registry that it may share with others.

Owns the regular look: what other servers registered, promoted, pinned or removed is taken in without a request that
asks for it; removed adapters leave their slots, pins move, abandoned uploads and unreferenced packages go. Decides
nothing of its own: the registry says what should be, the engine what is. Place in a request's way: none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING

from adapters.errors import AdapterError, AdapterNotFound
from engine.errors import EngineDown, EngineError
from server.errors import WireError
from server.loading import bring, free

if TYPE_CHECKING:
    from adapters.ref import AdapterRef
    from engine.status import SlotStatus
    from server.state import ServerState

logger = logging.getLogger("lorikeet.server")

INTERVAL_S = 2.0
"""Another server's change is seen after at most so long and a transaction; the promise is 5 s."""


class Upkeep:
    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._busy: set[AdapterRef] = set()
        self._failed: set[AdapterRef] = set()
        """What could not be moved; not tried again until the registry wants something else of it."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            if not self._state.drain.is_draining:
                await self.look()

    async def look(self) -> None:
        """Once. Never raises: what fails is logged, and looked at again."""
        try:
            await asyncio.to_thread(self._state.registry.refresh)
        except AdapterError as error:
            logger.warning("upkeep.registry_not_read error=%s", type(error).__name__)
            return
        self._state.uploads.expire()
        status = self._state.engine.status()
        if status.is_alive:
            self._agree([slot for slot in status.slots if slot.ref is not None and slot.state == "resident"])

    def _agree(self, slots: list[SlotStatus]) -> None:
        """Start what makes the slots agree with the registry."""
        pinned = set(self._state.registry.pointers.pinned()[: self._state.settings.num_slots])
        self._failed &= pinned
        on_device = {slot.ref: slot for slot in slots}
        for ref, slot in on_device.items():
            if ref is None or ref.is_composed:  # a composition leaves when another needs its slot
                continue
            if not self._state.registry.has(ref):
                self._start(ref, self._free(ref))
            elif slot.is_pinned and ref not in pinned:
                self._start(ref, bring(self._state, ref, should_pin=False))
        for ref in pinned - self._failed:
            if ref not in on_device or not on_device[ref].is_pinned:
                self._start(ref, bring(self._state, ref, should_pin=True))

    async def _free(self, ref: AdapterRef) -> None:
        """Requests in flight on it end first, which their deadline bounds."""
        await free(self._state, [ref], self._state.settings.request_timeout_s)
        try:
            self._state.registry.versions(ref.name)
        except AdapterNotFound:
            self._state.metrics.forget(ref)

    def _start(self, ref: AdapterRef, work: Coroutine[None, None, None]) -> None:
        if ref in self._busy:
            work.close()
            return
        self._busy.add(ref)
        self._state.background.start(self._do(ref, work))

    async def _do(self, ref: AdapterRef, work: Coroutine[None, None, None]) -> None:
        try:
            await work
            logger.info("upkeep.agreed ref=%s", ref)
        except EngineDown:
            logger.info("upkeep.postponed ref=%s", ref)  # until the engine is back
        except (AdapterError, EngineError, WireError) as error:
            self._failed.add(ref)
            logger.warning("upkeep.failed ref=%s error=%s", ref, type(error).__name__)
        finally:
            self._busy.discard(ref)


async def stop(task: asyncio.Task[None]) -> None:
    """End ``run``."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
