"""POST /v1/completions. Place in a request's way: steps 1 and 12."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.completion_form import CompletionForm
from server.exchange import exchange, while_connected
from server.schemas import CompletionRequest, parse_completion
from server.schemas.openapi import json_body
from server.state import state_of
from server.strictjson import read_object

router = APIRouter(tags=["inference"])


@router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Go on with a text or with token ids, without the chat template."""
    fields = parse_completion(await read_object(request))
    state = state_of(request)
    work = exchange(
        request, fields, CompletionForm.id_prefix, lambda head: CompletionForm(fields, head, state)
    )
    return await while_connected(request, work)
