"""What admins do with profiles: set and reset fields, for a name or for one version of it.

Owns the order: what would result is checked as a whole, with its grammar, before anything is kept. Each act leaves one
audit line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from adapters.errors import AdapterNotFound
from adapters.profile_layers import ALL_VERSIONS, Layers
from engine.errors import GrammarError
from server.actors import Actor, find, require_own
from server.errors import invalid_request
from server.profiles import Profile, check_fields, require_known
from server.sampling import grammar_of

if TYPE_CHECKING:
    from adapters.entry import AdapterEntry
    from server.state import ServerState

Changes = Mapping[str, object]
"""By field; None resets one to what is beneath."""


async def change(state: ServerState, actor: Actor, name: str, changes: Changes | None) -> AdapterEntry:
    """Change a name's profile, or with ``name@3`` or an alias that version's; None as a whole resets all that was set.

    Raises AdapterNotFound, WireError 400 or 404, InsufficientStorage; then nothing has changed.
    """
    entry, version = _target(state, actor, name)
    conduct = state.registry.conduct
    if changes is None:
        await asyncio.to_thread(conduct.clear_profile, entry.ref.name, version)
    else:
        await check(state, _merged(entry.layers, version, changes), changes)
        await asyncio.to_thread(conduct.change_profile, entry.ref.name, version, changes)
    fields = "all" if changes is None else ",".join(sorted(changes))
    actor.note("profile_changed", entry.ref.name, version=version or "all", fields=fields)
    return state.registry.entry(str(entry.ref))


async def set_version(state: ServerState, entry: AdapterEntry, changes: Changes) -> None:
    """For a version that is being registered. Raises WireError 400, where the package's own defaults do not fit."""
    await check(state, _merged(entry.layers, entry.ref.version, changes), changes)
    conduct = state.registry.conduct
    await asyncio.to_thread(conduct.change_profile, entry.ref.name, entry.ref.version, changes)


async def check(state: ServerState, values: Mapping[str, object], changes: Changes) -> None:
    """Raises WireError 400 where ``changes``, or what they lead to, is not valid."""
    require_known(changes)
    check_fields({key: value for key, value in changes.items() if value is not None})
    profile = check_fields(values)
    most = state.settings.original_max_pixels
    if max(profile.min_pixels or 0, profile.max_pixels or 0) > most:
        raise invalid_request(f"pixels are at most {most} on this server", "profile.max_pixels")
    await _check_grammar(state, profile)


async def _check_grammar(state: ServerState, profile: Profile) -> None:
    spec = grammar_of(profile.defaults.response_format) if profile.defaults is not None else None
    if spec is not None:
        try:
            await state.engine.compile_grammar(spec)
        except GrammarError as error:
            raise invalid_request(str(error), "profile.response_format") from error


def _merged(layers: Layers, version: int, changes: Changes) -> dict[str, object]:
    """What a request would be served with, once the changes are made."""
    adapter, own = dict(layers.adapter), dict(layers.version)
    changed = adapter if version == ALL_VERSIONS else own
    changed.update(changes)
    for key in [key for key, value in changed.items() if value is None]:
        del changed[key]
    return {**layers.package, **adapter, **own}


def _target(state: ServerState, actor: Actor, name: str) -> tuple[AdapterEntry, int]:
    """The version that shows the change, and whose profile changes: 0 is the name's own."""
    if "@" in name or state.registry.pointers.alias(name) is not None:
        entry = find(state, actor, name)
        return entry, entry.ref.version
    require_own(actor, name, name)
    with suppress(AdapterNotFound):
        return find(state, actor, name), ALL_VERSIONS
    return state.registry.versions(name)[-1], ALL_VERSIONS
