"""What admins do with adapters: register, load, unload, pin, remove; the same acts behind every dialect of the wire.

Owns the order: the registry first, then the engine, and undoing what the engine refuses. Knows no HTTP but WireError.
Each act leaves one audit line. Place in a request's way: none; it prepares what later requests name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.errors import AdapterBusy, AdapterError, InvalidAdapterName
from adapters.package import package_digest
from adapters.ref import AdapterRef
from engine.errors import EngineError
from server.auth import require_visible
from server.errors import WireError, retry_after

if TYPE_CHECKING:
    from adapters.registry import AdapterEntry
    from server.keys import Caller
    from server.state import ServerState

audit_log = logging.getLogger("lorikeet.audit")

LOAD_TIMEOUT_S = 120.0
"""A load waits so long for a slot that somebody else holds."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, for the audit line and for what exists to them."""

    caller: Caller
    request_id: str

    def note(self, act: str, name: object, **fields: object) -> None:
        more = "".join(f" {key}={value}" for key, value in fields.items())
        audit_log.info(
            "admin.%s name=%s caller=%s request_id=%s%s", act, name, self.caller.name, self.request_id, more
        )


@dataclass(frozen=True, slots=True)
class Registration:
    """What a client asks to be registered."""

    name: str
    source: str
    sha256: str | None = None
    should_pin: bool = False
    should_load: bool = True


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


def find(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """The entry of a name that exists for the caller. Raises AdapterNotFound, WireError 404."""
    require_visible(actor.caller, name.partition("@")[0])
    ref = state.registry.resolve(name, is_visible=actor.caller.may_use)
    if ref.is_base:
        raise WireError(400, "invalid_request", "that is the base, which is always loaded: name an adapter")
    return state.registry.entry(name)


async def register(state: ServerState, actor: Actor, wanted: Registration) -> tuple[AdapterEntry, bool]:
    """Copy, check, register and, if asked, load. True when it is new; undone when the engine refuses it."""
    if not actor.caller.may_use(wanted.name):
        raise WireError(
            403, "insufficient_scope", "this API key may not register an adapter of that name", param="name"
        )
    async with load_place(state):
        try:
            entry, is_created = await asyncio.to_thread(_register, state, wanted)
        except InvalidAdapterName as error:
            raise WireError(400, "invalid_request", str(error), param="name") from error
        if wanted.should_pin and not entry.is_pinned:  # it was there already, unpinned
            await asyncio.to_thread(state.registry.set_pinned, entry.ref.name, True)
            entry = state.registry.entry(str(entry.ref))
        state.metrics.labels.welcome(entry.ref)
        if wanted.should_load:
            try:
                await _load(state, entry.ref, should_pin=entry.is_pinned)
            except (AdapterError, WireError):
                if is_created:
                    await _undo(state, entry.ref)
                raise
    actor.note("registered", entry.ref, created=is_created, loaded=wanted.should_load)
    return state.registry.entry(str(entry.ref)), is_created


def _register(state: ServerState, wanted: Registration) -> tuple[AdapterEntry, bool]:
    folder = state.source.resolve(wanted.source)
    root = state.source.root_of(folder)
    return state.registry.register(
        wanted.name,
        folder,
        source=f"local:{folder.relative_to(root)}",  # where in the root, never where the root is
        expected_sha256=wanted.sha256,
        pin=wanted.should_pin,
        within=root,
    )


async def digest_of(state: ServerState, source: str) -> str:
    """Digest of a package that lies in a root, without registering it."""
    return await asyncio.to_thread(lambda: package_digest(state.source.resolve(source)))


async def _undo(state: ServerState, ref: AdapterRef) -> None:
    state.metrics.forget(ref)
    await asyncio.to_thread(state.registry.remove, str(ref))


async def load(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """Bring a registered adapter to the device."""
    entry = find(state, actor, name)
    async with load_place(state):
        await _load(state, entry.ref, should_pin=entry.is_pinned)
    actor.note("loaded", entry.ref)
    return state.registry.entry(name)


async def _load(state: ServerState, ref: AdapterRef, *, should_pin: bool) -> None:
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


async def unload(state: ServerState, actor: Actor, name: str) -> tuple[AdapterEntry, Freed]:
    """Drain and free the adapter's slots and host copies; it stays registered. Raises AdapterBusy."""
    entry = find(state, actor, name)
    refs = [entry.ref] if "@" in name else versions_in_memory(state, entry.ref)
    freed = await _free(state, refs, state.settings.unload_timeout_s)
    actor.note("unloaded", entry.ref, freed_bytes=freed.device_bytes + freed.host_bytes)
    return state.registry.entry(name), freed


def versions_in_memory(state: ServerState, ref: AdapterRef) -> list[AdapterRef]:
    """The version itself, and the name's other versions that still take memory."""
    status = state.engine.status()
    held = {slot.ref for slot in status.slots if slot.ref is not None} | status.host_refs
    return [ref, *(other for other in held if other.name == ref.name and other != ref)]


async def _free(state: ServerState, refs: list[AdapterRef], timeout_s: float) -> Freed:
    reports = await asyncio.gather(*(state.engine.unload_adapter(ref, timeout_s=timeout_s) for ref in refs))
    return Freed(sum(r.freed_device_bytes for r in reports), sum(r.freed_host_bytes for r in reports))


async def pin(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """Keep it on the device; it is loaded if it is not."""
    entry = find(state, actor, name)
    async with load_place(state):
        await _load(state, entry.ref, should_pin=True)
        await asyncio.to_thread(state.registry.set_pinned, entry.ref.name, True)
    actor.note("pinned", entry.ref)
    return state.registry.entry(name)


async def restore_pins(state: ServerState) -> None:
    """At start: what was pinned when the server last ran is brought to the device again."""
    pinned = [entry.ref for entry in state.registry.entries() if entry.is_pinned]
    for ref in pinned[: state.settings.num_slots]:
        try:
            await _load(state, ref, should_pin=True)
        except (AdapterError, EngineError, WireError) as error:
            audit_log.warning("admin.pin_not_restored name=%s error=%s", ref, type(error).__name__)


async def unpin(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """Let it be evicted again."""
    entry = find(state, actor, name)
    await asyncio.to_thread(state.registry.set_pinned, entry.ref.name, False)
    if any(slot.ref == entry.ref for slot in state.engine.status().slots):
        await _load(state, entry.ref, should_pin=False)
    actor.note("unpinned", entry.ref)
    return state.registry.entry(name)


async def remove(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """Unregister: later requests get 404 at once, requests in flight finish, then the memory is freed."""
    entry = find(state, actor, name)
    refs = [entry.ref] if "@" in name else versions_in_memory(state, entry.ref)
    await asyncio.to_thread(state.registry.remove, name)
    for ref in refs:
        state.metrics.forget(ref)
    state.background.start(_free_later(state, refs))
    actor.note("removed", entry.ref)
    return entry


async def _free_later(state: ServerState, refs: list[AdapterRef]) -> None:
    """Free a removed adapter once its last request has ended, which its deadline bounds."""
    for ref in refs:
        try:
            await state.engine.unload_adapter(ref, timeout_s=state.settings.request_timeout_s)
        except (AdapterBusy, EngineError) as error:
            audit_log.warning("admin.free_failed ref=%s error=%s", ref, type(error).__name__)
