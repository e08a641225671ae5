"""The load: sends a trace to an endpoint and gives back what came, call by call.

Owns the clock and the connections. A closed loop keeps ``num_streams`` calls under way; an open loop sends by the
trace's clock, whatever is under way. Nothing is retried: a refusal is an outcome.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx2

from bench.endpoint import Endpoint
from bench.eventloop import run_async
from bench.streamed import Arrival, Streamed, failed, read_stream
from bench.trace import Call, Trace

PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Run:
    """A trace's outcome."""

    streams: tuple[Streamed, ...]
    seconds: float
    """From the first call's sending to the last one's end."""


class Load:
    """Sends traces to one endpoint. ``on_done`` hears of each call that has ended, for a progress line."""

    def __init__(self, endpoint: Endpoint, on_done: Callable[[Streamed], None] = lambda _: None) -> None:
        self._endpoint = endpoint
        self._on_done = on_done

    def send(self, trace: Trace) -> Run:
        """Raises ValueError if the endpoint has too few adapters; failures of calls are in the run."""
        self._endpoint.require(trace.num_adapters)
        return run_async(self.send_async(trace))

    async def send_async(self, trace: Trace) -> Run:
        bodies = {call.index: self._endpoint.body(call) for call in trace.calls}  # pictures are drawn before
        async with self._client(
            len(trace.calls) if trace.num_streams is None else trace.num_streams
        ) as client:
            begin_s = time.monotonic()
            if trace.num_streams is None:
                streams = await self._open(client, trace.calls, bodies, begin_s)
            else:
                streams = await self._closed(client, trace.calls, bodies, trace.num_streams)
        end_s = max((streamed.end_s for streamed in streams), default=begin_s)
        return Run(tuple(sorted(streams, key=lambda streamed: streamed.index)), end_s - begin_s)

    @asynccontextmanager
    async def _client(self, num_connections: int) -> AsyncIterator[httpx2.AsyncClient]:
        limits = httpx2.Limits(
            max_connections=num_connections + 1, max_keepalive_connections=num_connections + 1
        )
        async with httpx2.AsyncClient(
            base_url=self._endpoint.url,
            headers=self._endpoint.headers(),
            limits=limits,
            timeout=self._endpoint.timeout_s,
            trust_env=False,
        ) as client:
            yield client

    async def _closed(
        self,
        client: httpx2.AsyncClient,
        calls: Sequence[Call],
        bodies: dict[int, dict[str, object]],
        num_streams: int,
    ) -> list[Streamed]:
        waiting: Iterator[Call] = iter(calls)
        ended: list[Streamed] = []

        async def keep_asking() -> None:
            for call in waiting:
                ended.append(await self._send(client, call, bodies[call.index]))

        await asyncio.gather(*(keep_asking() for _ in range(num_streams)))
        return ended

    async def _open(
        self,
        client: httpx2.AsyncClient,
        calls: Sequence[Call],
        bodies: dict[int, dict[str, object]],
        begin_s: float,
    ) -> list[Streamed]:
        async def send_at(call: Call) -> Streamed:
            due_s = begin_s + call.at_s
            # again and again: uvloop counts milliseconds, and may wake us too soon
            while (left_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            return await self._send(client, call, bodies[call.index], due_s)

        return list(await asyncio.gather(*(send_at(call) for call in calls)))

    async def _send(
        self, client: httpx2.AsyncClient, call: Call, body: dict[str, object], due_s: float | None = None
    ) -> Streamed:
        streamed = await self._stream(client, call, body, due_s)
        self._on_done(streamed)
        return streamed

    async def _stream(
        self, client: httpx2.AsyncClient, call: Call, body: dict[str, object], due_s: float | None
    ) -> Streamed:
        adapter = self._endpoint.name_of(call.adapter)
        sent_s = time.monotonic()
        arrivals: list[Arrival] = []
        try:
            async with client.stream("POST", PATH, json=body) as reply:
                if reply.status_code != 200:
                    why = f"{reply.status_code}: {(await reply.aread())[:200].decode('utf-8', 'replace')}"
                    return failed(call, adapter, sent_s, time.monotonic(), why, due_s)
                async for data in reply.aiter_raw():
                    arrivals.append(Arrival(time.monotonic(), data))
        except httpx2.HTTPError as error:
            why = f"{type(error).__name__}: {error}"
            return failed(call, adapter, sent_s, time.monotonic(), why, due_s)
        is_exact = not self._endpoint.is_plain
        return read_stream(call, adapter, sent_s, arrivals, is_length_exact=is_exact, due_s=due_s)
