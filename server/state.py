"""ServerState: what every route needs, gathered once at start and put at ``app.state.lorikeet``.

Owns the gathering and the seam to the engine (``Engine``, a Protocol, so that fakes fit); knows no HTTP.
Place in a request's way: step 1 reads it, nobody writes it except ``Drain``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from starlette.requests import HTTPConnection

from adapters.sources.remote import RemoteSources
from engine.messages import LoadReport, UnloadReport
from engine.request import GenerationRequest
from engine.status import HUNG_AFTER_S, EngineStatus
from server.quotas import Quotas
from server.shadows import Shadows

if TYPE_CHECKING:
    from adapters.ref import AdapterRef
    from adapters.registry import Registry
    from adapters.sources.local import LocalSource
    from base.processor import Processor
    from base.spec import BaseSpec
    from engine.sampling import GrammarSpec
    from engine.stream import Delta, Finish
    from server.auth import Gate
    from server.media import MediaLoader
    from server.metrics import Metrics
    from server.settings import Settings
    from server.uploads import Uploads


class TokenStream(Protocol):
    """One request's answer: Deltas and, last, a Finish; raises EngineError."""

    request_id: str

    def __aiter__(self) -> AsyncIterator[Delta | Finish]: ...

    def abort(self) -> None: ...


class Engine(Protocol):
    """What the wire asks of the engine; ``engine.client.EngineClient`` and the tests' fake both are one."""

    def submit(self, request: GenerationRequest) -> TokenStream: ...

    async def compile_grammar(self, spec: GrammarSpec) -> None: ...

    async def load_adapter(self, ref: AdapterRef, *, pin: bool = False) -> LoadReport:
        """``pin`` says whether it is pinned from then on; so loading a pinned one without unpins it."""
        ...

    async def unload_adapter(self, ref: AdapterRef, *, timeout_s: float = 30.0) -> UnloadReport: ...

    def status(self) -> EngineStatus: ...

    async def drain(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


class Drain:
    """Whether the server is leaving, and how many requests it still answers. Written by the middleware and by serve."""

    def __init__(self) -> None:
        self.is_draining = False
        self.num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        self.is_draining = True

    def enter(self) -> None:
        self.num_in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """True once no request is in flight; False when time is up first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class Background:
    """Tasks that outlive the request that started them; kept from the garbage collector until they end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Wait for all of them; for tests and for stopping."""
        await asyncio.gather(*self._tasks)


@dataclass(slots=True)
class ServerState:
    settings: Settings
    registry: Registry
    source: LocalSource
    engine: Engine
    processor: Processor
    base: BaseSpec
    media: MediaLoader
    metrics: Metrics
    gate: Gate
    uploads: Uploads
    max_model_len: int
    """Longest prompt plus output in tokens, as the engine decided."""
    remotes: RemoteSources = field(default_factory=RemoteSources.off)
    memory_by_part: dict[str, int] = field(default_factory=dict)
    drain: Drain = field(default_factory=Drain)
    background: Background = field(default_factory=Background)
    load_places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    """Registrations and loads under way at once; a third is 429 too_many_loads."""
    shadows: Shadows = field(default_factory=Shadows)
    quotas: Quotas = field(default_factory=Quotas)
    started_s: float = field(default_factory=time.time)


def unready_reasons(state: ServerState) -> list[str]:
    """Why the server should get no new requests; empty when it should."""
    status = state.engine.status()
    reasons = []
    if state.drain.is_draining or status.is_draining:
        reasons.append("draining")
    if not status.is_alive:
        is_coming = status.is_restarting
        reasons.append("the engine is being restarted" if is_coming else "the engine is not running")
    if status.is_alive and status.heartbeat_age_s > HUNG_AFTER_S:
        reasons.append(f"the engine's step has taken {status.heartbeat_age_s:.0f} s")
    if not reasons and not status.is_ready:
        reasons.append("the engine is warming up")
    return reasons


def state_of(connection: HTTPConnection) -> ServerState:
    """The state behind a request."""
    state: ServerState = connection.app.state.lorikeet
    return state
