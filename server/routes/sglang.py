"""SGLang's and llama.cpp's adapter routes."""

from __future__ import annotations

from collections.abc import Awaitable

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from adapters.errors import AdapterError
from engine.errors import EngineError
from server import admin
from server.admin import Registration
from server.errors import WireError, error_body, to_wire, unsupported
from server.routes.reply import Fields, actor_of, json_reply
from server.routes.vllm import load_by_name
from server.state import ServerState, state_of
from server.strictjson import read_object

router = APIRouter(tags=["sglang"])


@router.post("/load_lora_adapter")
async def load_lora_adapter(request: Request) -> Response:
    state, actor = state_of(request), actor_of(request)
    fields = Fields(await read_object(request))
    wanted = Registration(
        fields.text("lora_name", 256), fields.text("lora_path"), should_pin=fields.flag("pinned", False)
    )
    fields.ignore("lora_id")  # SGLang's own number of it
    fields.refuse("added_tokens_config", "adapters that add tokens are not supported")
    fields.end()
    return await _outcome(request, state, load_by_name(state, actor, wanted, may_replace=False))


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(request: Request) -> Response:
    state, actor = state_of(request), actor_of(request)
    fields = Fields(await read_object(request))
    name = fields.text("lora_name", 256)
    fields.ignore("lora_id")
    fields.end()
    return await _outcome(request, state, admin.remove(state, actor, name))


async def _outcome(request: Request, state: ServerState, act: Awaitable[object]) -> Response:
    """SGLang's reply; a failure carries our envelope beside SGLang's fields."""
    error: WireError | None = None
    try:
        await act
    except (WireError, AdapterError, EngineError) as raised:
        error = to_wire(raised)
    reply: dict[str, object] = {
        "success": error is None,
        "error_message": "" if error is None else error.message,
        "loaded_adapters": _loaded(request, state),
    }
    if error is not None:
        reply |= orjson.loads(error_body(error))
    response = json_reply(reply, 200 if error is None else error.status)
    response.headers.update(error.headers if error is not None else {})
    return response


def _loaded(request: Request, state: ServerState) -> dict[str, str]:
    """Name to source of the adapters on the device, of those that the caller may use."""
    caller = actor_of(request).caller
    resident = [
        slot.ref for slot in state.engine.status().slots if slot.ref is not None and slot.state == "resident"
    ]
    known = {entry.ref.name for entry in state.registry.entries()}  # one that was removed may still be freed
    return {ref.name: str(ref) for ref in resident if ref.name in known and caller.may_use(ref.name)}


@router.get("/lora-adapters", tags=["llama.cpp"])
async def list_lora_adapters(request: Request) -> Response:
    """llama.cpp's list. ``id`` is what a request's ``lora`` field may name; no scale is set for everybody."""
    caller = actor_of(request).caller
    entries = enumerate(state_of(request).registry.entries())
    visible = [{"id": i, "path": e.ref.name, "scale": 0.0} for i, e in entries if caller.may_use(e.ref.name)]
    return json_reply(visible)


@router.post("/lora-adapters", tags=["llama.cpp"])
async def set_scales(request: Request) -> Response:
    raise unsupported("scales for everybody are not supported: give each request its own `adapter` or `lora`")
