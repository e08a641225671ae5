"""EngineClient: the bridge from the event loop to the engine, on a thread or in a process of its own. ``submit`` is the
only way down; a Stream is the only way up. It refuses early what the engine has no room for, before anything is
allocated.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor

from adapters.ref import AdapterRef
from engine.config import EngineConfig
from engine.detokenizer import TokenTable
from engine.errors import ContextTooLong, Draining, EngineDown, EngineError, QueueFull
from engine.memory import MemoryPlan
from engine.messages import (
    Abort,
    Failed,
    Finished,
    FinishReason,
    LoadAdapter,
    LoadReport,
    Outbound,
    Started,
    Submit,
    UnloadAdapter,
    UnloadReport,
)
from engine.reading import Answer, Stream
from engine.request import GenerationRequest
from engine.sampling import GrammarSpec
from engine.status import EngineStatus
from engine.stream import TextAssembler
from engine.transport import Transport

DEFAULT_RETRY_AFTER_S = 1.0
NUM_COMPILERS = 2


class EngineClient:
    """Safe from any thread or loop, except that a Stream belongs to the loop that submitted it."""

    def __init__(
        self,
        config: EngineConfig,
        max_model_len: int,
        tokens: TokenTable,
        memory: MemoryPlan,
    ) -> None:
        self._config = config
        self.memory = memory
        self.max_model_len = max_model_len
        # threads of their own: schemas that take long hold up other schemas, and nothing else
        self._compilers = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="lorikeet-grammar")
        self._tokens = tokens
        self._streams: dict[str, Stream] = {}
        self._waiting: dict[str, int] = {}  # request id -> prompt tokens, until it is started
        self._lock = threading.Lock()
        self._is_draining = False
        self._recent_starts: deque[float] = deque(maxlen=64)

    def connect(self, transport: Transport) -> None:
        """Once, before anything is asked of it."""
        self._transport = transport

    @property
    def is_alive(self) -> bool:
        return self._transport.is_alive

    # ---- requests ----------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request; the caller reads the Stream on the running loop.

        Raises Draining, EngineDown, ContextTooLong or QueueFull before anything is allocated.
        """
        self._refuse(request)
        loop = asyncio.get_running_loop()
        stream = Stream(request.request_id, TextAssembler(request, self._tokens), loop, self._close_stream)
        with self._lock:
            self._reserve(request)
            self._streams[request.request_id] = stream
        self._transport.send(Submit(request))
        return stream

    async def compile_grammar(self, spec: GrammarSpec) -> None:
        """Compile a grammar off the loop and off the step, so that its request is born at once. Raises GrammarError."""
        await asyncio.get_running_loop().run_in_executor(
            self._compilers, self._transport.compile_grammar, spec
        )

    def _refuse(self, request: GenerationRequest) -> None:
        if self._is_draining:
            raise Draining("the server is draining; send the request to another one")
        if not self.is_alive:
            raise EngineDown("the engine is not running; try again soon")
        num_tokens = len(request.prompt.ids)
        if num_tokens >= self.max_model_len:
            raise ContextTooLong(num_tokens, self.max_model_len - 1)

    def _reserve(self, request: GenerationRequest) -> None:
        """A place in the queue, by count and by prompt tokens; the first in an empty queue always gets one."""
        num_tokens = len(request.prompt.ids)
        waiting_tokens = sum(self._waiting.values())
        is_full = len(self._waiting) >= self._config.max_waiting
        if is_full or (self._waiting and waiting_tokens + num_tokens > self._config.max_waiting_tokens):
            raise QueueFull(
                f"{len(self._waiting)} requests with {waiting_tokens} prompt tokens are waiting (limits "
                f"{self._config.max_waiting} and {self._config.max_waiting_tokens}); try again later",
                self._retry_after_s(),
            )
        self._waiting[request.request_id] = num_tokens

    def _retry_after_s(self) -> float:
        """How long the present queue takes at the rate at which requests were started lately."""
        if len(self._recent_starts) < 2:
            return DEFAULT_RETRY_AFTER_S
        span_s = time.monotonic() - self._recent_starts[0]
        rate = len(self._recent_starts) / max(span_s, 1e-3)
        return max(DEFAULT_RETRY_AFTER_S, len(self._waiting) / rate)

    def _close_stream(self, request_id: str, reason: FinishReason) -> None:
        self._forget(request_id)
        self._transport.send(Abort(request_id, reason))

    def _forget(self, request_id: str) -> None:
        with self._lock:
            self._streams.pop(request_id, None)
            self._waiting.pop(request_id, None)

    # ---- the engine's side -------------------------------------------------------------------------------------

    def deliver(self, messages: Seq[Outbound]) -> None:
        """On the engine's thread: hand each stream its messages, with one wake-up a loop."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Stream, list[Outbound]]]] = {}
        grouped: dict[str, list[Outbound]] = {}
        for message in messages:
            grouped.setdefault(message.request_id, []).append(message)
        for request_id, own in grouped.items():
            stream = self._streams.get(request_id)
            self._note(request_id, own)
            if stream is not None:
                batches.setdefault(stream.loop, []).append((stream, own))
        for loop, batch in batches.items():
            self._wake(loop, batch)

    def _note(self, request_id: str, messages: Seq[Outbound]) -> None:
        """Keep the books of the queue."""
        if any(isinstance(m, Started) for m in messages):
            with self._lock:
                self._waiting.pop(request_id, None)
            self._recent_starts.append(time.monotonic())
        if isinstance(messages[-1], Finished | Failed):
            self._forget(request_id)

    def _wake(self, loop: asyncio.AbstractEventLoop, batch: list[tuple[Stream, list[Outbound]]]) -> None:
        try:
            loop.call_soon_threadsafe(_push_all, batch)
        except RuntimeError:  # that loop is closed: nobody can read these streams any more
            for stream, _ in batch:
                self._close_stream(stream.request_id, "abort")

    def fail_streams(self, error: EngineError) -> None:
        """The engine is gone: everybody who waits for it is told. From any thread."""
        with self._lock:
            request_ids = list(self._streams)
        self.deliver([Failed(request_id, error) for request_id in request_ids])

    # ---- adapters ----------------------------------------------------------------------------------------------

    async def load_adapter(self, ref: AdapterRef, *, pin: bool = False) -> LoadReport:
        """Bring an adapter to the device and prove it; ``pin`` says whether it is pinned from then on.

        Raises AdapterError or EngineError.
        """
        answer: Answer[LoadReport] = Answer()
        self._require_alive()
        self._transport.send(LoadAdapter(ref, pin, answer.reply))
        return await answer.future

    async def unload_adapter(self, ref: AdapterRef, *, timeout_s: float = 30.0) -> UnloadReport:
        """Free an adapter once its sequences have ended. Raises AdapterBusy when they have not in time."""
        answer: Answer[UnloadReport] = Answer()
        self._require_alive()
        self._transport.send(UnloadAdapter(ref, timeout_s, answer.reply))
        return await answer.future

    def _require_alive(self) -> None:
        if not self.is_alive:
            raise EngineDown("the engine is not running")

    # ---- state -------------------------------------------------------------------------------------------------

    def status(self) -> EngineStatus:
        """The engine's latest picture of itself, at most one step old; cheap, safe from any thread."""
        return self._transport.read_status(self._is_draining)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing more, and wait until the streams in flight have ended or time is up."""
        self._is_draining = True
        deadline_s = time.monotonic() + timeout_s
        while self._streams and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Stop the engine; streams still alive fail with Draining. Idempotent."""
        self._is_draining = True
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._transport.close()


def _push_all(batch: list[tuple[Stream, list[Outbound]]]) -> None:
    for stream, messages in batch:
        stream.push(messages)
