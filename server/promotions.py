"""Promotions: what admins do with pointers: promote, roll back, alias. A pointer moves only to what has proved itself.

Owns the order: the version is brought to the device and probed first, then the pointer moves, in one durable step; so a
version that the engine refuses is never what a name means, and every request gets one version or the other. Requests in
flight keep the version that they began with. Each act leaves one audit line.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from adapters.errors import AdapterNotFound, InvalidAdapterName
from server.actors import Actor, find, require_own
from server.errors import WireError
from server.loading import bring, is_on_device, load_place

if TYPE_CHECKING:
    from adapters.catalogue import AliasRecord
    from adapters.entry import AdapterEntry
    from adapters.ref import AdapterRef
    from server.state import ServerState

logger = logging.getLogger("lorikeet.server")


async def promote(state: ServerState, actor: Actor, name: str, *, should_load: bool) -> AdapterEntry:
    """Make ``name@3`` what the bare name means."""
    entry = find(state, actor, name)
    await _prove(state, entry.ref, should_load)
    moved, _ = await move(state, entry.ref)
    actor.note("promoted", moved.ref)
    return moved


async def roll_back(state: ServerState, actor: Actor, name: str, *, should_load: bool) -> AdapterEntry:
    """Make a name or an alias mean what it meant before."""
    alias = state.registry.pointers.alias(name)
    require_own(actor, name if alias is None else alias.name, name)
    previous = state.registry.pointers.previous(name)
    require_own(actor, previous.ref.name, name)
    await _prove(state, previous.ref, should_load)
    old = current_of(state, name)
    entry = await asyncio.to_thread(state.registry.pointers.roll_back, name)
    if alias is None:
        await _move_pin(state, old, entry)
    actor.note("rolled_back", name, to=entry.ref)
    return state.registry.entry(str(entry.ref))


async def move(state: ServerState, ref: AdapterRef, *, should_pin: bool = False) -> tuple[AdapterEntry, bool]:
    """Make ``ref`` what its bare name means, and give it the name's pin; False if it was. Proves nothing."""
    begin_s = time.monotonic()
    old = current_of(state, ref.name)
    entry, has_moved = await asyncio.to_thread(state.registry.pointers.promote, str(ref), pin=should_pin)
    if has_moved:
        await _move_pin(state, old, entry)
        took_ms = 1000 * (time.monotonic() - begin_s)
        logger.info("adapter.promoted ref=%s from=%s took_ms=%.1f", ref, old, took_ms)
    return entry, has_moved


async def point(
    state: ServerState, actor: Actor, alias: str, target: str, *, should_load: bool
) -> tuple[AdapterEntry, bool]:
    """Make an alias mean a version; True if the alias is new."""
    if not actor.caller.may_use(alias):
        raise WireError(
            403, "insufficient_scope", "this API key may not make an alias of that name", param="alias"
        )
    entry = find(state, actor, target)
    is_new = state.registry.pointers.alias(alias) is None
    if not is_new:
        find(state, actor, alias)  # an alias of an adapter that the caller may not use is not its to move
    await _prove(state, entry.ref, should_load)
    try:
        entry, _ = await asyncio.to_thread(state.registry.pointers.point, alias, str(entry.ref))
    except InvalidAdapterName as error:
        raise WireError(400, "invalid_request", str(error), param="alias") from error
    actor.note("alias_pointed", alias, to=entry.ref)
    return entry, is_new


async def remove_alias(state: ServerState, actor: Actor, alias: str) -> AliasRecord:
    record = find_alias(state, actor, alias)
    await asyncio.to_thread(state.registry.pointers.remove_alias, alias)
    actor.note("alias_removed", alias)
    return record


def find_alias(state: ServerState, actor: Actor, alias: str) -> AliasRecord:
    """Raises AdapterNotFound, WireError 404."""
    record = state.registry.pointers.alias(alias)
    if record is None:
        raise AdapterNotFound(alias)
    require_own(actor, record.name, alias)
    return record


def current_of(state: ServerState, name: str) -> AdapterRef | None:
    """What a name means now; None for one that means nothing yet."""
    with suppress(AdapterNotFound):
        return state.registry.resolve(name)
    return None


async def _prove(state: ServerState, ref: AdapterRef, should_load: bool) -> None:
    """Bring it to the device, where the engine probes it; a pin that it has is kept."""
    if not should_load:
        return
    async with load_place(state):
        entry = state.registry.entry(str(ref))
        await bring(state, ref, should_pin=entry.is_current and entry.is_pinned)


async def _move_pin(state: ServerState, old: AdapterRef | None, entry: AdapterEntry) -> None:
    """A pinned name keeps one version on the device: the one that it means."""
    if not entry.is_pinned:
        return
    if is_on_device(state, entry.ref):
        await bring(state, entry.ref, should_pin=True)
    if old is not None and old != entry.ref and is_on_device(state, old):
        await bring(state, old, should_pin=False)
