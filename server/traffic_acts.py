"""What admins do with traffic: split an alias between versions of its adapter, name a shadow, and end both.

Owns the order: every version that is to answer is brought to the device and probed before the first request goes to it.
Each act leaves one audit line. Place in a request's way: none; it prepares what ``splitting`` reads.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from adapters.errors import AdapterNotFound
from adapters.traffic import Traffic
from server.actors import Actor
from server.errors import WireError, invalid_request
from server.loading import bring, load_place
from server.promotions import find_alias

if TYPE_CHECKING:
    from adapters.catalogue import AliasRecord
    from adapters.ref import AdapterRef
    from server.state import ServerState


async def split(
    state: ServerState, actor: Actor, alias: str, traffic: Traffic, *, should_load: bool
) -> AliasRecord:
    """Raises AdapterNotFound; WireError 404, 400 where the alias's own version has no weight."""
    record = find_alias(state, actor, alias)
    if record.version not in traffic.weights:
        raise invalid_request(
            f"the alias means {record.name}@{record.version}: give version {record.version} a weight too, or 0",
            "weights",
        )
    refs = [_version(state, record, number, "weights") for number in traffic.weights]
    if traffic.shadow is not None:
        refs.append(_version(state, record, traffic.shadow.version, "shadow.version"))
    if should_load:
        async with load_place(state):
            for ref in dict.fromkeys(refs):
                entry = state.registry.entry(str(ref))
                await bring(state, ref, should_pin=entry.is_current and entry.is_pinned)
    made = await asyncio.to_thread(state.registry.conduct.split, alias, traffic)
    shares = ",".join(f"{number}:{weight:g}" for number, weight in traffic.weights.items())
    shadow = traffic.shadow.version if traffic.shadow is not None else None
    actor.note("traffic_split", alias, weights=shares, shadow=shadow)
    return made


async def end(state: ServerState, actor: Actor, alias: str) -> AliasRecord:
    """All requests go to the alias's own version again."""
    find_alias(state, actor, alias)
    record = await asyncio.to_thread(state.registry.conduct.end_split, alias)
    actor.note("traffic_ended", alias)
    return record


def _version(state: ServerState, record: AliasRecord, number: int, param: str) -> AdapterRef:
    try:
        return state.registry.resolve(f"{record.name}@{number}")
    except AdapterNotFound as error:
        raise WireError(404, "model_not_found", str(error), param=param) from None
