"""What admins do with adapters: register, load, unload, pin, remove; the same acts behind every dialect of the wire.

Owns the order: a package is taken in and checked, then loaded and probed, and only then what its name means; what the
engine refuses is undone. Knows no HTTP but WireError. Each act leaves one audit line. Place in a request's way: none;
it prepares what later requests name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.errors import AdapterBusy, AdapterError, AdapterNotFound, InvalidAdapterName
from adapters.package import package_digest
from adapters.ref import AdapterRef
from engine.errors import EngineError
from server import profile_acts
from server.actors import Actor, audit_log, find
from server.errors import WireError
from server.loading import (
    Freed,
    bring,
    free,
    is_on_device,
    load_place,
    version_in_memory,
    versions_in_memory,
)
from server.promotions import current_of, move, remove_alias
from server.uploads import SCHEME, Upload

if TYPE_CHECKING:
    from adapters.entry import AdapterEntry, Staged
    from server.state import ServerState


@dataclass(frozen=True, slots=True)
class Registration:
    """What a client asks to be registered."""

    name: str
    source: str
    sha256: str | None = None
    should_pin: bool = False
    should_load: bool = True
    should_promote: bool = True
    profile: Mapping[str, object] | None = None
    """For the version that this comes to."""


async def register(state: ServerState, actor: Actor, wanted: Registration) -> tuple[AdapterEntry, bool]:
    """Copy, check, load if asked, and then make it what the name means, if asked. True when something is new.

    Until the last step requests get what the name meant before. What the engine refuses leaves nothing behind.
    """
    if not actor.caller.may_use(wanted.name):
        raise WireError(
            403, "insufficient_scope", "this API key may not register an adapter of that name", param="name"
        )
    if wanted.profile:
        await profile_acts.check(state, wanted.profile, wanted.profile)
    upload = find_upload(state, actor, wanted.source)
    with nullcontext() if upload is None else state.uploads.using(upload):
        async with load_place(state):
            entry, is_created = await _register(state, wanted, upload)
    if upload is not None:
        await state.uploads.end(upload)
    actor.note(
        "registered", entry.ref, created=is_created, loaded=wanted.should_load, current=entry.is_current
    )
    return entry, is_created


async def _register(
    state: ServerState, wanted: Registration, upload: Upload | None
) -> tuple[AdapterEntry, bool]:
    try:
        staged = await asyncio.to_thread(_stage, state, wanted, upload)
    except InvalidAdapterName as error:
        raise WireError(400, "invalid_request", str(error), param="name") from error
    entry, has_moved = staged.entry, False
    state.metrics.labels.welcome(entry.ref)
    try:
        if wanted.should_load:
            await bring(state, entry.ref, should_pin=entry.is_current and entry.is_pinned)
        if wanted.profile:
            await profile_acts.set_version(state, entry, wanted.profile)
        if wanted.should_promote:
            entry, has_moved = await move(state, entry.ref, should_pin=wanted.should_pin)
    except (AdapterError, EngineError, WireError):
        if staged.is_new:
            await asyncio.to_thread(state.registry.unstage, entry.ref)
            state.background.start(_free_later(state, [entry.ref]))
        raise
    if wanted.should_load and wanted.should_pin:
        await bring(state, entry.ref, should_pin=True)
    return state.registry.entry(str(entry.ref)), staged.is_new or has_moved


def _stage(state: ServerState, wanted: Registration, upload: Upload | None) -> Staged:
    if upload is not None:
        return state.registry.stage(
            wanted.name, upload.folder, source="upload", expected_sha256=wanted.sha256
        )
    if state.remotes.takes(wanted.source):
        with state.remotes.fetched(wanted.source) as fetched:
            return state.registry.stage(
                wanted.name, fetched.folder, source=fetched.source, expected_sha256=wanted.sha256
            )
    folder = state.source.resolve(wanted.source)
    root = state.source.root_of(folder)
    return state.registry.stage(
        wanted.name,
        folder,
        source=f"local:{folder.relative_to(root)}",  # where in the root, never where the root is
        expected_sha256=wanted.sha256,
        within=root,
    )


def find_upload(state: ServerState, actor: Actor, source: str) -> Upload | None:
    """The upload that a source names; None for other sources. Raises WireError 404."""
    if not source.startswith(SCHEME):
        return None
    try:
        return state.uploads.find(source.removeprefix(SCHEME), actor.caller.name)
    except WireError as error:
        raise error.with_param("source") from None


async def digest_of(state: ServerState, actor: Actor, source: str) -> str:
    """Digest of a package without registering it; one on another machine is fetched for it."""
    upload = find_upload(state, actor, source)
    if upload is not None:
        return await asyncio.to_thread(package_digest, upload.folder)
    return await asyncio.to_thread(_digest_of, state, source)


def _digest_of(state: ServerState, source: str) -> str:
    if state.remotes.takes(source):
        with state.remotes.fetched(source) as fetched:
            return package_digest(fetched.folder)
    return package_digest(state.source.resolve(source))


async def load(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """Bring a registered adapter to the device."""
    entry = find(state, actor, name)
    async with load_place(state):
        await bring(state, entry.ref, should_pin=entry.is_current and entry.is_pinned)
    actor.note("loaded", entry.ref)
    return state.registry.entry(str(entry.ref))


async def unload(state: ServerState, actor: Actor, name: str) -> tuple[AdapterEntry, Freed]:
    """Drain and free the adapter's slots and host copies; it stays registered. Raises AdapterBusy."""
    entry = find(state, actor, name)
    in_memory = versions_in_memory if name == entry.ref.name else version_in_memory
    refs = in_memory(state, entry.ref)
    freed = await free(state, refs, state.settings.unload_timeout_s)
    actor.note("unloaded", entry.ref, freed_bytes=freed.device_bytes + freed.host_bytes)
    return state.registry.entry(str(entry.ref)), freed


async def pin(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """Keep what the name means on the device; it is loaded if it is not."""
    entry = find(state, actor, name)
    if not entry.is_current:
        raise WireError(
            400,
            "invalid_request",
            f"a pin follows what the name means, and {entry.ref.name} does not mean {entry.ref}: promote it first",
        )
    async with load_place(state):
        await bring(state, entry.ref, should_pin=True)
        await asyncio.to_thread(state.registry.set_pinned, entry.ref.name, True)
    actor.note("pinned", entry.ref)
    return state.registry.entry(str(entry.ref))


async def restore_pins(state: ServerState) -> None:
    """At start: what was pinned when the server last ran is brought to the device again."""
    pinned = [entry.ref for entry in state.registry.entries() if entry.is_pinned]
    for ref in pinned[: state.settings.num_slots]:
        try:
            await bring(state, ref, should_pin=True)
        except (AdapterError, EngineError, WireError) as error:
            audit_log.warning("admin.pin_not_restored name=%s error=%s", ref, type(error).__name__)


async def unpin(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """Let it be evicted again."""
    entry = find(state, actor, name)
    await asyncio.to_thread(state.registry.set_pinned, entry.ref.name, False)
    if is_on_device(state, entry.ref):
        await bring(state, entry.ref, should_pin=False)
    actor.note("unpinned", entry.ref)
    return state.registry.entry(str(entry.ref))


async def remove(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """Unregister: later requests get 404 at once, requests in flight finish, then the memory is freed.

    An alias goes alone, without what it means; ``name@3`` is that version alone.
    """
    if state.registry.pointers.alias(name) is not None:
        entry = find(state, actor, name)
        await remove_alias(state, actor, name)
        return entry
    entry = _find_to_remove(state, actor, name)
    in_memory = version_in_memory if "@" in name else versions_in_memory
    refs = in_memory(state, entry.ref)
    await asyncio.to_thread(state.registry.remove, name)
    if "@" not in name or len(entry.versions) == 1:
        for ref in refs:
            state.metrics.forget(ref)
    state.background.start(_free_later(state, refs))
    actor.note("removed", entry.ref)
    return entry


def _find_to_remove(state: ServerState, actor: Actor, name: str) -> AdapterEntry:
    """Also a name that means nothing, for all its versions were registered with ``"promote": false``."""
    if "@" not in name and actor.caller.may_use(name) and current_of(state, name) is None:
        with suppress(AdapterNotFound):
            return state.registry.versions(name)[-1]
    return find(state, actor, name)


async def _free_later(state: ServerState, refs: list[AdapterRef]) -> None:
    """Free a removed adapter once its last request has ended, which its deadline bounds."""
    for ref in refs:
        try:
            await state.engine.unload_adapter(ref, timeout_s=state.settings.request_timeout_s)
        except (AdapterBusy, EngineError) as error:
            audit_log.warning("admin.free_failed ref=%s error=%s", ref, type(error).__name__)
