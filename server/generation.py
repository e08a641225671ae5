"""Generation: the running choices of one wire request, as one ordered flow of events; and what must end with it.

Owns the streams, the tasks that read them and the adapters' leases; ``close`` ends all three, whatever happened before.
Knows nothing of JSON or HTTP. Place in a request's way: steps 4 and 11, from submit to the last token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack

from adapters.ref import AdapterRef
from engine.errors import StepFailed
from engine.request import GenerationRequest
from engine.stream import Delta, Finish
from server.state import ServerState, TokenStream

Event = tuple[int, Delta | Finish]
"""Which choice, and what came."""


class Generation:
    """Belongs to the event loop that made it. ``close`` is idempotent and never waits."""

    def __init__(self, state: ServerState, adapters: Sequence[AdapterRef]) -> None:
        """Takes the leases of all versions behind ``adapters``: from here on a removed package's bytes stay.

        Raises AdapterNotFound where one was removed meanwhile; then none is held.
        """
        self._engine = state.engine
        self._leases = _leases(state, adapters)
        self._streams: list[TokenStream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._pending: asyncio.Task[Event | None] | None = None
        self._flow: AsyncIterator[Event] | None = None

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """All choices or none: when one is refused the others are aborted by ``close``. Raises EngineError."""
        for request in requests:
            self._streams.append(self._engine.submit(request))
        self._flow = _whole(0, self._streams[0]) if len(self._streams) == 1 else self._merged()

    async def has_begun(self, timeout_s: float) -> bool:
        """Waits for the first event, so that a failure before it is a status; False when time is up first.

        Raises EngineError where the generation fails before it gave anything.
        """
        self._pending = asyncio.create_task(self._next())
        done, _ = await asyncio.wait([self._pending], timeout=timeout_s)
        if done and (error := self._pending.exception()) is not None:
            raise error
        return bool(done)

    async def events(self) -> AsyncIterator[Event]:
        """Every event of every choice; a choice's own are in order. Raises EngineError when any choice fails."""
        if self._pending is not None:
            first, self._pending = await self._pending, None
            if first is None:
                return
            yield first
        if self._flow is not None:
            async for event in self._flow:
                yield event

    def close(self) -> None:
        """Abort what still runs and give the leases back."""
        for stream in self._streams:
            stream.abort()
        for task in (*self._tasks, *([self._pending] if self._pending is not None else [])):
            task.cancel()
        self._tasks.clear()
        self._leases.close()

    # ---- many streams as one -----------------------------------------------------------------------------------

    async def _next(self) -> Event | None:
        if self._flow is None:
            raise RuntimeError("submit comes before events")
        return await anext(self._flow, None)

    async def _merged(self) -> AsyncIterator[Event]:
        queue: asyncio.Queue[Event | Exception] = asyncio.Queue(maxsize=len(self._streams))
        self._tasks = [asyncio.create_task(_pump(i, stream, queue)) for i, stream in enumerate(self._streams)]
        num_open = len(self._streams)
        while num_open:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            num_open -= isinstance(event[1], Finish)
            yield event


def _leases(state: ServerState, adapters: Sequence[AdapterRef]) -> ExitStack:
    """One for each version; closing the stack releases them."""
    with ExitStack() as stack:
        for version in dict.fromkeys(version for adapter in adapters for version in adapter.versions):
            stack.callback(state.registry.lease(version).release)
        return stack.pop_all()


async def _pump(index: int, stream: TokenStream, queue: asyncio.Queue[Event | Exception]) -> None:
    try:
        async for event in _whole(index, stream):
            await queue.put(event)
    except Exception as error:  # noqa: BLE001 (whoever reads the queue raises it; unsaid, the reader would wait for ever)
        await queue.put(error)


async def _whole(index: int, stream: TokenStream) -> AsyncIterator[Event]:
    """A stream up to its Finish. One that ends without, or was cut by the engine, is an error, never a short answer."""
    async for item in stream:
        if isinstance(item, Finish):
            if item.reason == "abort":
                break
            yield index, item
            return
        yield index, item
    raise StepFailed("the generation was ended before it was complete")
