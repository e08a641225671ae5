"""POST /v1/chat/completions. Place in a request's way: steps 1 and 12."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.chat_form import ChatForm
from server.exchange import exchange, while_connected
from server.schemas import ChatRequest, parse_chat
from server.schemas.openapi import json_body
from server.state import state_of
from server.strictjson import read_object

router = APIRouter(tags=["inference"])


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a chat, whole or as a stream, with the base or any registered adapter."""
    fields = parse_chat(await read_object(request))
    state = state_of(request)
    work = exchange(request, fields, ChatForm.id_prefix, lambda head: ChatForm(fields, head, state))
    return await while_connected(request, work)
