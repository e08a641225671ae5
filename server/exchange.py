"""One exchange: a request's body in, its response out; and an end to all of it when the client leaves.

The same for chat and completions; a ``Form`` tells them apart. A stream's headers wait for the first event (at most the
keep-alive interval), so that what fails before it, say an adapter that cannot be loaded, is a proper status.
Place in a request's way: steps 1 to 4 and 11, under the routes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Protocol

import orjson
from starlette.requests import Request
from starlette.responses import Response

from engine.request import GenerationRequest
from server.auth import caller_of
from server.choose import HEADER, Chooser
from server.generation import Event, Generation
from server.replies import Collected, Head, collect, headers_of, server_timing
from server.schemas import GenerationFields
from server.splitting import Draw
from server.sse import EventStream
from server.state import ServerState, state_of
from server.translate import Origin, require_room

CLIENT_LEFT = 499
"""nginx's status for the log; nobody reads the response."""


class Form(Protocol):
    """What chat and completions do differently."""

    async def translate(self, origin: Origin) -> tuple[GenerationRequest, ...]: ...

    def frames(
        self, events: AsyncIterator[Event], requests: Sequence[GenerationRequest]
    ) -> AsyncIterator[bytes]: ...

    def body(
        self, choices: Sequence[Collected], requests: Sequence[GenerationRequest]
    ) -> dict[str, object]: ...


MakeForm = Callable[[Head], Form]


async def exchange(
    request: Request, fields: GenerationFields, id_prefix: str, make_form: MakeForm
) -> Response:
    """The response to a parsed request. Raises WireError and what ``to_wire`` knows, always before the first byte."""
    arrival_s = time.monotonic()
    state = state_of(request)
    caller = caller_of(request)
    state.quotas.require_room(caller)
    draw = Draw(state.registry, fields, request.headers)
    chooser = Chooser(draw, state.base.name, caller.may_use, state.settings.max_rank)
    choice = chooser.choose(fields, request.headers.get(HEADER))
    require_room(state)
    head = Head.make(id_prefix, choice.asked, state.base.fingerprint)
    with ExitStack() as stack:
        generation = Generation(state, choice.refs)
        stack.callback(generation.close)
        form = make_form(head)
        requests = await form.translate(Origin(head.id, choice.refs, arrival_s))
        generation.submit(requests)
        events = state.quotas.metered(generation.events(), requests, caller)
        events = state.shadows.follow(events, requests, state.shadows.copy_of(draw, choice.refs), state)
        headers = headers_of(choice.refs, state)
        if fields.stream:
            await generation.has_begun(state.settings.keepalive_s)
            frames = form.frames(events, requests)
            return _stream(frames, headers, stack.pop_all().close, state)
        choices = await collect(events, len(requests))
    headers["server-timing"] = server_timing([choice.end.timings for choice in choices])
    return Response(
        orjson.dumps(form.body(choices, requests)), headers=headers, media_type="application/json"
    )


def _stream(
    frames: AsyncIterator[bytes], headers: dict[str, str], on_end: Callable[[], None], state: ServerState
) -> EventStream:
    return EventStream(
        frames,
        headers,
        on_end,
        keepalive_s=state.settings.keepalive_s,
        send_timeout_s=state.settings.slow_reader_timeout_s,
    )


async def while_connected(request: Request, work: Awaitable[Response]) -> Response:
    """The response of ``work``, which is cancelled when the client leaves first. The body must have been read."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect_of(request))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        worker.cancel()
        with suppress(asyncio.CancelledError):
            return await worker
        return Response(status_code=CLIENT_LEFT)
    finally:
        watcher.cancel()
        worker.cancel()


async def _disconnect_of(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
