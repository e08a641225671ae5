"""Loading: bringing adapters to the device for an admin, and freeing them; one at a time for each of two places.

Owns the limit on loads at once, and how long each may wait. Knows refs and the engine; no names, no callers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.ref import AdapterRef
from server.errors import WireError, retry_after

if TYPE_CHECKING:
    from server.state import ServerState

LOAD_TIMEOUT_S = 120.0
"""A load waits so long for a slot that somebody else holds."""


@dataclass(frozen=True, slots=True)
class Freed:
    device_bytes: int
    host_bytes: int


@asynccontextmanager
async def load_place(state: ServerState) -> AsyncIterator[None]:
    """One of the two places for registering and loading; raises 429 too_many_loads when both are taken."""
    if state.load_places.locked():
        raise WireError(
            429,
            "too_many_loads",
            "two adapters are being loaded; try again when one is done",
            headers=retry_after(1),
        )
    async with state.load_places:
        yield


async def bring(state: ServerState, ref: AdapterRef, *, should_pin: bool) -> None:
    """To the device, proven, and pinned or not from then on. Raises AdapterError, EngineError, WireError 409."""
    try:
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            await state.engine.load_adapter(ref, pin=should_pin)
    except TimeoutError as error:
        raise WireError(
            409,
            "adapter_busy",
            f"no slot became free for it in {LOAD_TIMEOUT_S:g} s: unload or unpin another adapter",
            headers={"x-should-retry": "false"},
        ) from error


async def free(state: ServerState, refs: list[AdapterRef], timeout_s: float) -> Freed:
    """Drain and free their slots and host copies. Raises AdapterBusy."""
    reports = await asyncio.gather(*(state.engine.unload_adapter(ref, timeout_s=timeout_s) for ref in refs))
    return Freed(sum(r.freed_device_bytes for r in reports), sum(r.freed_host_bytes for r in reports))


def is_on_device(state: ServerState, ref: AdapterRef) -> bool:
    return any(slot.ref == ref for slot in state.engine.status().slots)


def versions_in_memory(state: ServerState, ref: AdapterRef) -> list[AdapterRef]:
    """The version itself, and what still takes memory of the name's other versions; compositions of them, too."""
    held = _in_memory(state) - {ref}
    return [ref, *(other for other in held if any(part.name == ref.name for part in other.versions))]


def version_in_memory(state: ServerState, ref: AdapterRef) -> list[AdapterRef]:
    """The version itself, and the compositions of it that take memory."""
    return [ref, *(other for other in _in_memory(state) - {ref} if ref in other.versions)]


def _in_memory(state: ServerState) -> set[AdapterRef]:
    status = state.engine.status()
    return {slot.ref for slot in status.slots if slot.ref is not None} | status.host_refs
