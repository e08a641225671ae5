"""Frames are what clients split and parse; a stream ends in order and lets go of what it held, however it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import orjson
import pytest
from starlette.types import Message

from server.errors import WireError
from server.replies import Head
from server.sse import DONE, EventStream, Frames, guarded

HEAD = Head("chatcmpl-1", 1700000000, 'model "x"', "fp_0")
CHOICE = b'{"index":0}'


def parsed(frame: bytes) -> dict[str, object]:
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    assert b"\n" not in frame[:-2]
    value: dict[str, object] = json.loads(frame.removeprefix(b"data: "))
    return value


@pytest.mark.parametrize("includes_usage", [False, True])
def test_the_template_gives_what_plain_json_would(includes_usage: bool) -> None:
    frames = Frames(HEAD, "chat.completion.chunk", includes_usage=includes_usage)
    plain = {**HEAD.fields("chat.completion.chunk"), "choices": [{"index": 0}]}
    if includes_usage:
        plain["usage"] = None
    assert frames.choice(CHOICE) == b"data: " + orjson.dumps(plain) + b"\n\n"


def test_usage_goes_with_a_choice_or_alone() -> None:
    frames = Frames(HEAD, "x", includes_usage=True)
    assert parsed(frames.choice(CHOICE, {"total_tokens": 1}))["usage"] == {"total_tokens": 1}
    alone = parsed(frames.usage({"total_tokens": 2}))
    assert (alone["choices"], alone["usage"]) == ([], {"total_tokens": 2})


async def gathered(frames: AsyncIterator[bytes]) -> list[bytes]:
    return [frame async for frame in guarded(frames)]


async def good() -> AsyncIterator[bytes]:
    yield b"data: 1\n\n"


async def failing() -> AsyncIterator[bytes]:
    yield b"data: 1\n\n"
    raise WireError(500, "numerical_error", "NaN")


def test_the_end_mark_is_always_the_last() -> None:
    assert asyncio.run(gathered(good()))[-1] == DONE
    *_, error, end = asyncio.run(gathered(failing()))
    assert parsed(error)["error"] == {
        "message": "NaN",
        "type": "server_error",
        "param": None,
        "code": "numerical_error",
    }
    assert end == DONE


class Client:
    """An ASGI client that may leave, or stop reading."""

    def __init__(self, leaves_after: int = 99, stalls_after: int = 99) -> None:
        self.sent: list[bytes] = []
        self.headers: dict[bytes, bytes] = {}
        self._leaves_after = leaves_after
        self._stalls_after = stalls_after
        self._left = asyncio.Event()

    async def receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.headers = dict(message["headers"])
            return
        if message["body"]:
            self.sent.append(message["body"])
        if len(self.sent) >= self._leaves_after:
            self._left.set()
        if len(self.sent) >= self._stalls_after:
            await asyncio.Event().wait()


async def play(frames: AsyncIterator[bytes], client: Client, keepalive_s: float = 60.0) -> list[str]:
    """Runs the response to its end; what ``on_end`` was called for."""
    ends: list[str] = []
    stream = EventStream(frames, {}, lambda: ends.append("end"), keepalive_s=keepalive_s, send_timeout_s=0.05)
    await asyncio.wait_for(stream({"type": "http", "method": "POST"}, client.receive, client.send), timeout=5)
    return ends


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"data: 1\n\n"
        await asyncio.sleep(0)


async def silent() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


def test_a_stream_that_ends_calls_on_end_once() -> None:
    client = Client()
    assert asyncio.run(play(good(), client)) == ["end"]
    assert client.sent == [b"data: 1\n\n", DONE]


def test_a_client_that_leaves_ends_it() -> None:
    assert asyncio.run(play(endless(), Client(leaves_after=3))) == ["end"]


def test_a_client_that_stops_reading_is_cut() -> None:
    assert asyncio.run(play(endless(), Client(stalls_after=3))) == ["end"]


def test_comments_keep_a_silent_connection() -> None:
    client = Client(leaves_after=2)
    assert asyncio.run(play(silent(), client, keepalive_s=0.01)) == ["end"]
    assert client.sent == [b": keep-alive\n\n"] * 2
