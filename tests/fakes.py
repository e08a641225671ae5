"""Stand-ins for the seams of the server: an engine that plays a script, a processor that counts bytes, and the rest.

All deterministic, none sleeps: an engine's answer waits on an ``asyncio.Event`` where a test wants a delay.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from adapters.ref import AdapterRef
from engine.errors import ContextTooLong, EngineError
from engine.messages import LoadReport, Timings, TokenLogprob, UnloadReport, Usage
from engine.request import GenerationRequest
from engine.sampling import GrammarSpec
from engine.status import EngineStatus
from engine.stream import Delta, Finish
from tests.support.fake_processor import (
    BASE_NAME,
    EOS_TOKEN,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    VOCAB_SIZE,
    FakeProcessor,
    fake_spec,
)
from tests.support.fake_registry import FakeMedia, FakeRegistry, ref

__all__ = [
    "BASE_NAME",
    "EOS_TOKEN",
    "IMAGE_TOKEN",
    "IMAGE_TOKENS",
    "VOCAB_SIZE",
    "FakeEngineClient",
    "FakeMedia",
    "FakeProcessor",
    "FakeRegistry",
    "delta",
    "fake_spec",
    "finish",
    "ref",
    "say",
]

Item = Delta | Finish | EngineError | asyncio.Event
Script = Callable[[GenerationRequest], Iterable[Item]]

TIMINGS = Timings(queue_s=0.001, swap_s=0.002, prefill_s=0.003, decode_s=0.004)


# ---- the engine ------------------------------------------------------------------------------------------------


def delta(text: str, *, logprobs: Sequence[TokenLogprob] = (), num_tokens: int | None = None) -> Delta:
    """A delta whose token ids are the text's bytes, or the first ``num_tokens`` of them."""
    ids = tuple(text.encode())[:num_tokens]
    return Delta(text=text, token_ids=ids, logprobs=tuple(logprobs))


def finish(request: GenerationRequest, completion_tokens: int, **fields: object) -> Finish:
    usage = Usage(
        prompt_tokens=len(request.prompt.ids),
        completion_tokens=completion_tokens,
        cached_tokens=0,
        image_tokens=sum(image.num_tokens for image in request.prompt.images),
    )
    values: dict[str, object] = {"reason": "stop", "stop": None, "usage": usage, "timings": TIMINGS}
    return Finish(**(values | fields))  # type: ignore[arg-type]


def say(*pieces: str, **finish_fields: object) -> Script:
    """Answers with these pieces, one delta each."""

    def script(request: GenerationRequest) -> list[Item]:
        num_tokens = sum(len(piece.encode()) for piece in pieces)
        return [*(delta(piece) for piece in pieces), finish(request, num_tokens, **finish_fields)]

    return script


class FakeStream:
    """Plays items in order: yields Delta and Finish, raises errors, waits for events."""

    def __init__(self, request: GenerationRequest, items: Iterable[Item]) -> None:
        self.request_id = request.request_id
        self.is_aborted = False
        self._aborted = asyncio.Event()
        self._items = iter(items)

    def __aiter__(self) -> AsyncIterator[Delta | Finish]:
        return self

    async def __anext__(self) -> Delta | Finish:
        for item in self._items:
            if isinstance(item, asyncio.Event):
                await self._wait(item)
            if self.is_aborted:
                raise StopAsyncIteration
            if isinstance(item, EngineError):
                raise item
            if not isinstance(item, asyncio.Event):
                await asyncio.sleep(0)  # let the other tasks of the loop have their turn
                return item
        raise StopAsyncIteration

    async def _wait(self, event: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self._aborted.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def abort(self) -> None:
        self.is_aborted = True
        self._aborted.set()


class FakeEngineClient:
    """An ``EngineClient`` whose answers are scripted. ``refusal`` is raised by the next submits while it is set."""

    def __init__(self, script: Script | None = None, *, max_model_len: int = 4096) -> None:
        self.script = script or say("Hello", " there", ".")
        self.max_model_len = max_model_len
        self.refusal: EngineError | None = None
        self.load_failure: Exception | None = None
        self.grammar_failure: Exception | None = None
        self.requests: list[GenerationRequest] = []
        self.streams: list[FakeStream] = []
        self.grammars: list[GrammarSpec] = []
        self.loaded: dict[AdapterRef, bool] = {}
        self.waiting: dict[str, int] = {}
        self.is_alive = True
        self.heartbeat_age_s = 0.0
        self.is_draining = False
        self.is_closed = False

    def submit(self, request: GenerationRequest) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        if len(request.prompt.ids) >= self.max_model_len:
            raise ContextTooLong(len(request.prompt.ids), self.max_model_len - 1)
        stream = FakeStream(request, self.script(request))
        self.requests.append(request)
        self.streams.append(stream)
        return stream

    async def compile_grammar(self, spec: GrammarSpec) -> None:
        self.grammars.append(spec)
        if self.grammar_failure is not None:
            raise self.grammar_failure

    async def load_adapter(self, ref: AdapterRef, *, pin: bool = False) -> LoadReport:
        if self.load_failure is not None:
            raise self.load_failure
        self.loaded[ref] = pin
        return LoadReport(ref, slot=len(self.loaded) - 1, num_bytes=1024, seconds=0.001)

    async def unload_adapter(self, ref: AdapterRef, *, timeout_s: float = 30.0) -> UnloadReport:
        was_loaded = self.loaded.pop(ref, None) is not None
        return UnloadReport(ref, freed_device_bytes=1024 if was_loaded else 0, freed_host_bytes=0)

    def status(self) -> EngineStatus:
        return EngineStatus(
            is_ready=self.is_alive and not self.is_draining,
            is_alive=self.is_alive,
            is_draining=self.is_draining,
            running={},
            waiting=dict(self.waiting),
            waiting_for_adapter=0,
            kv_blocks_used=0,
            kv_blocks_total=16,
            slots=(),
            host_bytes=0,
            host_refs=frozenset(),
            slot_bank_bytes=0,
            steps=len(self.requests),
            heartbeat_age_s=self.heartbeat_age_s,
        )

    async def drain(self, timeout_s: float) -> None:
        self.is_draining = True

    def close(self) -> None:
        self.is_closed = True
