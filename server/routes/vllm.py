"""vLLM's two adapter routes, for the controllers that drive them: AIBrix, KServe, the production stack."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from adapters.errors import AdapterNotFound
from server import admin
from server.actors import Actor, find
from server.admin import Registration
from server.errors import WireError
from server.routes.reply import Fields, actor_of, json_reply
from server.state import ServerState, state_of
from server.strictjson import read_object

router = APIRouter(tags=["vllm"])


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request) -> Response:
    """Register and load. A taken name needs ``load_inplace``, unless the content is the same."""
    state, actor = state_of(request), actor_of(request)
    fields = Fields(await read_object(request))
    wanted = Registration(fields.text("lora_name", 256), fields.text("lora_path"))
    may_replace = fields.flag("load_inplace", False)
    fields.ignore("base_model_name")  # a label in vLLM: the package itself says what it is for
    fields.end()
    await load_by_name(state, actor, wanted, may_replace=may_replace)
    return _say(request, wanted.name, "added")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request) -> Response:
    """Unregister, as vLLM does."""
    state, actor = state_of(request), actor_of(request)
    fields = Fields(await read_object(request))
    name = fields.text("lora_name", 256)
    fields.ignore("lora_int_id")  # vLLM's own number of it
    fields.end()
    await admin.remove(state, actor, name)
    return _say(request, name, "removed")


async def load_by_name(state: ServerState, actor: Actor, wanted: Registration, *, may_replace: bool) -> None:
    """Register and load; raises 409 adapter_exists when the name means other content and may not be replaced."""
    if not may_replace and await _is_taken(state, actor, wanted):
        raise WireError(
            409,
            "adapter_exists",
            f"The lora adapter '{wanted.name}' has already been loaded with other content. If you want to load the "
            "adapter in place, set 'load_inplace' to True.",
            param="lora_name",
            headers={"x-should-retry": "false"},
        )
    await admin.register(state, actor, wanted)


async def _is_taken(state: ServerState, actor: Actor, wanted: Registration) -> bool:
    try:
        entry = find(state, actor, wanted.name)
    except (AdapterNotFound, WireError):
        return False
    return entry.ref.digest != await admin.digest_of(state, actor, wanted.source)


def _say(request: Request, name: str, done: str) -> Response:
    text = f"Success: LoRA adapter '{name}' {done} successfully."
    if "application/json" in request.headers.get("accept", ""):
        return json_reply({"status": "success", "message": text, "lora_name": name})
    return PlainTextResponse(text)
