"""Stream and Answer: what a caller on an event loop reads of what the engine's thread says.

They own no request and no thread: a Stream turns the engine's messages into text and merges what nobody has read yet,
an Answer is a future that another thread may resolve. Place in a request's way: step 11.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Generic, TypeVar

from engine.errors import EngineError
from engine.messages import Failed, Finished, FinishReason, Outbound
from engine.stream import Delta, Finish, TextAssembler

logger = logging.getLogger("lorikeet.engine")

T = TypeVar("T")


class Stream:
    """One request's answer, for one reader: an async iterator of Delta and, last, Finish. Failures are raised.

    Deltas that nobody has read yet are merged, so a slow reader costs one pending Delta, not a queue of them.
    """

    def __init__(
        self,
        request_id: str,
        assembler: TextAssembler,
        loop: asyncio.AbstractEventLoop,
        on_close: Callable[[str, FinishReason], None],
    ) -> None:
        self.request_id = request_id
        self.loop = loop
        self._assembler = assembler
        self._on_close = on_close
        self._pending: deque[Delta | Finish | EngineError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_ended = False
        self._is_closed = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta | Finish:
        while not self._pending:
            if self._is_ended or self._is_closed:
                raise StopAsyncIteration
            self._waiter = self.loop.create_future()
            await self._waiter
        item = self._pending.popleft()
        if isinstance(item, EngineError):
            raise item
        return item

    def abort(self) -> None:
        """Stop generating; idempotent. What was already produced can still be read."""
        if not self._is_ended and not self._is_closed:
            self._is_closed = True
            self._on_close(self.request_id, "abort")
        self._wake()

    def push(self, messages: Seq[Outbound]) -> None:
        """On the event loop: turn the engine's messages into readable items."""
        for message in messages:
            if not self._is_ended:
                self._take(message)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self, message: Outbound) -> None:
        if isinstance(message, Failed):
            self._pending.append(message.error)
            self._is_ended = True
            return
        for item in self._assembler.push(message):
            self._append(item)
        if self._assembler.is_finished:
            if not isinstance(message, Finished):  # a stop string: the engine does not know yet
                self._on_close(self.request_id, "stop")
            self._is_ended = True

    def _append(self, item: Delta | Finish) -> None:
        last = self._pending[-1] if self._pending else None
        if isinstance(last, Delta) and isinstance(item, Delta):
            self._pending[-1] = last.joined(item)
        else:
            self._pending.append(item)


class Answer(Generic[T]):
    """A future that the engine's thread may resolve with a value or an exception."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self._loop.create_future()

    def reply(self, outcome: T | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._resolve, outcome)
        except RuntimeError:
            logger.warning("answer.lost the event loop that asked is closed")

    def _resolve(self, outcome: T | Exception) -> None:
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)
