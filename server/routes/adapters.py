"""``/v1/adapters``: the native admin surface. Reading takes any key, changing takes the scope admin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from server import admin, profile_acts, promotions
from server.actors import find
from server.adapter_view import AdapterViewer
from server.admin import Registration
from server.errors import WireError, invalid_request
from server.profiles import effective
from server.routes.reply import Fields, actor_of, json_reply
from server.state import ServerState, state_of
from server.strictjson import read_object

if TYPE_CHECKING:
    from adapters.entry import AdapterEntry

router = APIRouter(tags=["adapters"])

ACTS = "load, unload, pin, unpin, promote or rollback"


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> Response:
    """Every adapter that the caller may use."""
    state, actor = state_of(request), actor_of(request)
    viewer = AdapterViewer(state.engine.status(), state.registry.pointers.aliases())
    entries = state.registry.entries(has_candidates=True)
    records = [viewer.record(e) for e in entries if actor.caller.may_use(e.ref.name)]
    return json_reply({"object": "list", "data": records})


@router.post("/v1/adapters")
async def register_adapter(request: Request) -> Response:
    """Register a folder or an upload under a name: 201; the same content again: 200."""
    state, actor = state_of(request), actor_of(request)
    wanted = read_registration(await read_object(request))
    entry, is_created = await admin.register(state, actor, wanted)
    return _reply(state, entry, 201 if is_created else 200)


def read_registration(body: dict[str, object]) -> Registration:
    """Raises WireError 400 naming the field."""
    fields = Fields(body)
    wanted = Registration(
        name=fields.text("name", 256),
        source=fields.text("source"),
        sha256=fields.optional_text("sha256", 80),
        should_pin=fields.flag("pin", False),
        should_load=fields.flag("load", True),
        should_promote=fields.flag("promote", True),
        profile=fields.optional_object("profile"),
    )
    fields.refuse("version", "versions are numbered by this server: leave `version` out")
    fields.end()
    if wanted.should_pin and not wanted.should_promote:
        raise invalid_request("a pin follows what the name means: pin it once it is promoted", "pin")
    return wanted


@router.get("/v1/adapters/{name:path}")
async def show_adapter(request: Request, name: str) -> Response:
    """One of them, with what its requests are served with where they say nothing."""
    state = state_of(request)
    entry = find(state, actor_of(request), name)
    shown = effective(entry.layers.values, entry.layers.origins)
    return json_reply({**_record(state, entry), "effective": shown})


@router.delete("/v1/adapters/{name:path}")
async def delete_adapter(request: Request, name: str) -> Response:
    """Unregister: 404 from now on; requests in flight on it finish, then its memory is freed."""
    entry = await admin.remove(state_of(request), actor_of(request), name)
    return json_reply({"name": entry.ref.name, "version": entry.ref.version, "deleted": True})


@router.patch("/v1/adapters/{name:path}")
async def change_adapter(request: Request, name: str) -> Response:
    """Change what its requests are served with where they say nothing: the name's profile, or a version's."""
    state, actor = state_of(request), actor_of(request)
    body = await read_object(request)
    if "profile" not in body:
        raise invalid_request("`profile` is missing; nothing else of an adapter changes", "profile")
    fields = Fields(body)
    changes = fields.optional_object("profile")
    fields.end()
    return _reply(state, await profile_acts.change(state, actor, name, changes))


@router.post("/v1/adapters/{name:path}/load")
async def load_adapter(request: Request, name: str) -> Response:
    state, actor = state_of(request), actor_of(request)
    await _no_fields(request)
    return _reply(state, await admin.load(state, actor, name))


@router.post("/v1/adapters/{name:path}/unload")
async def unload_adapter(request: Request, name: str) -> Response:
    """Drain and free; says how many bytes came back."""
    state, actor = state_of(request), actor_of(request)
    await _no_fields(request)
    entry, freed = await admin.unload(state, actor, name)
    record = _record(state, entry)
    return json_reply(
        {
            **record,
            "freed_bytes": freed.device_bytes + freed.host_bytes,
            "freed_device_bytes": freed.device_bytes,
            "freed_host_bytes": freed.host_bytes,
        }
    )


@router.post("/v1/adapters/{name:path}/pin")
async def pin_adapter(request: Request, name: str) -> Response:
    state, actor = state_of(request), actor_of(request)
    await _no_fields(request)
    return _reply(state, await admin.pin(state, actor, name))


@router.post("/v1/adapters/{name:path}/unpin")
async def unpin_adapter(request: Request, name: str) -> Response:
    state, actor = state_of(request), actor_of(request)
    await _no_fields(request)
    return _reply(state, await admin.unpin(state, actor, name))


@router.post("/v1/adapters/{name:path}/promote")
async def promote_adapter(request: Request, name: str) -> Response:
    """Make a version what the bare name means, once it is on the device and probed."""
    state, actor = state_of(request), actor_of(request)
    fields = Fields(await _optional_object(request))
    version, should_load = fields.version("version"), fields.flag("load", True)
    fields.end()
    if (version is None) is ("@" not in name):
        raise invalid_request('say which version: {"version": 3}, or name@3 in the path', "version")
    asked = name if version is None else f"{name}@{version}"
    return _reply(state, await promotions.promote(state, actor, asked, should_load=should_load))


@router.post("/v1/adapters/{name:path}/rollback")
async def roll_back_adapter(request: Request, name: str) -> Response:
    """Make a name or an alias mean what it meant before."""
    state, actor = state_of(request), actor_of(request)
    fields = Fields(await _optional_object(request))
    should_load = fields.flag("load", True)
    fields.end()
    return _reply(state, await promotions.roll_back(state, actor, name, should_load=should_load))


@router.post("/v1/adapters/{name:path}")
async def unknown_act(request: Request, name: str) -> Response:
    raise WireError(
        404,
        "not_found",
        f"no such act: POST /v1/adapters/{{name}}/ {ACTS}",
    )


async def _no_fields(request: Request) -> None:
    """These acts take no field; an empty body or an empty object."""
    Fields(await _optional_object(request)).end()


async def _optional_object(request: Request) -> dict[str, object]:
    return await read_object(request) if await request.body() else {}


def _reply(state: ServerState, entry: AdapterEntry, status: int = 200) -> Response:
    return json_reply(_record(state, entry), status)


def _record(state: ServerState, entry: AdapterEntry) -> dict[str, object]:
    return AdapterViewer(state.engine.status(), state.registry.pointers.aliases()).record(entry)
