"""Server-sent events: frames as bytes from a template made once, and the response that sends them.

A delta costs one ``orjson.dumps`` of its text. Lines end in ``\\n`` alone: some clients split at ``\\n\\n`` only. A
stream always ends in ``data: [DONE]``, also after an error. Place in a request's way: step 11.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping

import anyio
import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.types import Message, Receive, Scope, Send

from server.errors import error_body, to_wire
from server.replies import Head

logger = logging.getLogger("lorikeet.server")

DONE = b"data: [DONE]\n\n"

# On a signal sse-starlette would cut every stream at once; ours end by themselves while the server drains.
AppStatus.enable_automatic_graceful_drain = False


class Frames:
    """Makes the frames of one response; ``kind`` is their ``object``."""

    def __init__(self, head: Head, kind: str, *, includes_usage: bool) -> None:
        self._begin = b"data: " + orjson.dumps(head.fields(kind))[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if includes_usage else b"]}\n\n"

    def choice(self, choice: bytes, usage: Mapping[str, object] | None = None) -> bytes:
        """One choice, as JSON; ``usage`` so far where the client wants it in every frame."""
        if usage is None:
            return self._begin + choice + self._end
        return self._begin + choice + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"

    def usage(self, usage: Mapping[str, object]) -> bytes:
        """The last frame with include_usage: no choice, only the count."""
        return self.choice(b"", usage)


def error_frame(error: Exception) -> bytes:
    """A failure after the first byte."""
    return b"data: " + error_body(to_wire(error)) + b"\n\n"


async def guarded(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """``frames``, an error event if they fail, and always the end mark."""
    try:
        async for frame in frames:
            yield frame
    except Exception as error:  # noqa: BLE001 (whatever it was, the client is told, and the stream ends in order)
        yield error_frame(error)
    yield DONE


class EventStream(EventSourceResponse):
    """Sends frames with comments between to keep the connection; calls ``on_end`` however it ends.

    A client that takes nothing for ``send_timeout_s`` is cut: what it has not read is bounded by the socket's buffer.
    """

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        headers: Mapping[str, str],
        on_end: Callable[[], None],
        *,
        keepalive_s: float,
        send_timeout_s: float,
    ) -> None:
        super().__init__(
            guarded(frames),
            headers=headers,
            sep="\n",
            ping=keepalive_s,
            ping_message_factory=_keepalive,
            data_sender_callable=self._watch,
        )
        self._on_end = on_end
        self._send_timeout_s = send_timeout_s
        self._send_began_s: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.info("stream.cut reason=slow_reader")
        finally:
            self._on_end()

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """The library arms a timer for each send, half of a delta's whole cost; one watch a stream does the same."""
        if self._send_began_s is None:  # a comment may be sent while a frame still waits
            self._send_began_s = time.monotonic()
        await send(message)
        self._send_began_s = None

    async def _watch(self) -> None:
        """Runs beside the sending and ends the response by raising; cancelled when the stream has ended."""
        while True:
            await anyio.sleep(self._send_timeout_s / 4)
            began_s = self._send_began_s
            if began_s is not None and time.monotonic() - began_s >= self._send_timeout_s:
                raise SendTimeoutError


def _keepalive() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive", sep="\n")
