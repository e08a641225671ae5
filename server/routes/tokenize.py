"""POST /tokenize and /detokenize, as vLLM has them. Place in a request's way: steps 1 to 3, without the engine."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import orjson
from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from adapters.ref import AdapterRef
from server.auth import caller_of
from server.choose import HEADER, Chooser
from server.errors import invalid_request
from server.exchange import while_connected
from server.profiles import profile_of
from server.prompts import chat_prompt, check_length, off_loop
from server.schemas import ChatRequest, GenerationFields, Wire, parse_chat, validate
from server.schemas.base import INT64_MAX
from server.schemas.messages import Messages
from server.schemas.openapi import json_body
from server.schemas.tools import Tools
from server.state import ServerState, state_of
from server.strictjson import read_object

router = APIRouter(tags=["inference"])
MAX_IDS = 1 << 20


class TokenizeRequest(Wire):
    """``prompt`` or ``messages``; all adapters share one tokenizer, but a profile may bring a system prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    """Harmless: these bases have none that a prompt would be given."""
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise invalid_request("send either `prompt` or `messages`", "prompt")
        return self


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=INT64_MAX)]], Field(max_length=MAX_IDS)]


@router.post("/tokenize", openapi_extra=json_body(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a chat with its template and pictures."""
    body = await read_object(request)
    fields = validate(TokenizeRequest, {key: value for key, value in body.items() if value is not None})
    adapter = _adapter(fields.model, request)
    return await while_connected(request, _tokenize(fields, body, adapter, state_of(request)))


async def _tokenize(
    fields: TokenizeRequest, body: dict[str, object], adapter: AdapterRef, state: ServerState
) -> Response:
    if fields.prompt is not None:
        check_length(len(fields.prompt), state.max_model_len, "prompt")
        ids: list[int] = await off_loop(partial(state.processor.encode, fields.prompt), "prompt")
    else:
        ids = list((await chat_prompt(_as_chat(body), state, profile_of(adapter, state))).ids)
    reply: dict[str, object] = {"count": len(ids), "max_model_len": state.max_model_len, "tokens": ids}
    reply["token_strs"] = [_text(i, state) for i in ids] if fields.return_token_strs else None
    return Response(orjson.dumps(reply), media_type="application/json")


def _as_chat(body: dict[str, object]) -> ChatRequest:
    names = ("messages", "tools", "add_generation_prompt", "continue_final_message")
    return parse_chat({name: body[name] for name in names if name in body})


def _text(token_id: int, state: ServerState) -> str:
    return state.processor.token_bytes(token_id).decode("utf-8", "replace")


@router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens spelt out."""
    fields = validate(DetokenizeRequest, await read_object(request))
    _adapter(fields.model, request)
    state = state_of(request)
    if any(token >= state.processor.vocab_size for token in fields.tokens):
        raise invalid_request(f"`tokens` are ids from 0 to {state.processor.vocab_size - 1}", "tokens")
    decode = partial(state.processor.decode, fields.tokens, skip_special_tokens=False)
    text = await off_loop(decode, "tokens")
    return Response(orjson.dumps({"prompt": text}), media_type="application/json")


def _adapter(model: str | None, request: Request) -> AdapterRef:
    """An unknown name is a 404 here too. An alias that is split counts as its own version."""
    state = state_of(request)
    may_use = caller_of(request).may_use
    chooser = Chooser(state.registry, state.base.name, may_use, state.settings.max_rank)
    return chooser.choose(GenerationFields(model=model), request.headers.get(HEADER)).refs[0]
