"""``/v1/models``: the base first, then the adapters, as OpenAI's and vLLM's clients read them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from adapters.errors import AdapterNotFound
from server import admin
from server.actors import Actor, find
from server.errors import WireError
from server.media import DETAILS
from server.routes.reply import actor_of, json_reply
from server.state import ServerState, state_of

if TYPE_CHECKING:
    from adapters.entry import AdapterEntry

router = APIRouter(tags=["models"])

OWNER = "lorikeet"


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The base first, then every adapter that the caller may use, then the aliases."""
    state, actor = state_of(request), actor_of(request)
    adapters = [e for e in state.registry.entries() if actor.caller.may_use(e.ref.name)]
    models = [_base(state), *(_adapter(state, e.ref.name, e.created_s, e.source) for e in adapters)]
    for alias in state.registry.pointers.aliases():
        with suppress(AdapterNotFound):  # one that is removed at this very moment
            if actor.caller.may_use(alias.name):
                entry = state.registry.entry(f"{alias.name}@{alias.version}")
                models.append(_adapter(state, alias.alias, entry.created_s, str(entry.ref)))
    return json_reply({"object": "list", "data": models})


@router.get("/v1/models/{model:path}")
async def retrieve_model(request: Request, model: str) -> Response:
    """One model; for the base also the limits of this server."""
    state = state_of(request)
    if is_base(state, model):
        return json_reply({**_base(state), "limits": _limits(state)})
    entry = _find(state, actor_of(request), model)
    return json_reply(_adapter(state, model, entry.created_s, entry.source))


@router.delete("/v1/models/{model:path}")
async def delete_model(request: Request, model: str) -> Response:
    """Unregister an adapter; requests in flight on it finish."""
    state, actor = state_of(request), actor_of(request)
    if is_base(state, model):
        raise WireError(400, "invalid_request", "the base cannot be deleted", param="model")
    await admin.remove(state, actor, adapter_name(state, model))
    return json_reply({"id": model, "object": "model", "deleted": True})


def is_base(state: ServerState, model: str) -> bool:
    return model in (state.base.name, "base")


def adapter_name(state: ServerState, model: str) -> str:
    """The adapter's part of a model id: ``<base>:<adapter>``, the whole base id first, or the adapter alone."""
    for base in (state.base.name, "base"):
        if model.startswith(f"{base}:"):
            return model.removeprefix(f"{base}:")
    return model


def _find(state: ServerState, actor: Actor, model: str) -> AdapterEntry:
    try:
        return find(state, actor, adapter_name(state, model))
    except WireError as error:
        raise error.with_param("model") from None


def _base(state: ServerState) -> dict[str, object]:
    return {
        "id": state.base.name,
        "object": "model",
        "created": int(state.started_s),
        "owned_by": OWNER,
        "root": state.base.name,
        "parent": None,
        "max_model_len": state.max_model_len,
    }


def _adapter(state: ServerState, model: str, created_s: float, source: str) -> dict[str, object]:
    return {
        "id": model,
        "object": "model",
        "created": int(created_s),
        "owned_by": OWNER,
        "root": source,
        "parent": state.base.name,
        "max_model_len": state.max_model_len,
    }


def _limits(state: ServerState) -> dict[str, object]:
    """What a client may send; sizes in bytes, pixels, tokens."""
    settings, media = state.settings, state.media.limits
    return {
        "max_model_len": state.max_model_len,
        "max_body_bytes": int(settings.max_body),
        "max_images": media.request_images,
        "max_image_bytes": media.max_bytes,
        "max_image_pixels": media.max_pixels,
        "max_request_image_bytes": media.request_bytes,
        "max_request_image_pixels": media.request_pixels,
        "image_formats": ["png", "jpeg", "webp", "gif"],
        "image_details": list(DETAILS),
        "image_urls": settings.resolved_media_policy,
        "max_waiting_requests": settings.max_waiting,
        "max_waiting_tokens": settings.max_waiting_tokens,
        "num_adapter_slots": settings.num_slots,
        "max_adapter_rank": settings.max_rank,
    }
