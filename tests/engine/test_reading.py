"""What a reader on the event loop gets: each token at once while it keeps up, several in one Delta when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import Finished, Outbound, Timings, Tokens, Usage
from engine.reading import Stream
from engine.stream import Delta, Finish, TextAssembler
from tests.engine.test_stream import Words
from tests.support.requests import make_request

EMOJI = "🦜".encode()
TABLE = Words("a", "b", "c", "STOP", "S", EMOJI[:1], EMOJI[1:3], EMOJI[3:])
LAST = Finished("r", "length", None, Usage(5, 3), Timings(1.0, 2.0, 3.0, 4.0))

Act = Callable[[Stream], Awaitable[None]]


def token(token_id: int) -> list[Outbound]:
    return [Tokens("r", (token_id,))]


def with_stream(act: Act, stop: tuple[str, ...] = ()) -> list[str]:
    """Runs ``act`` on a loop with a fresh stream; the reasons with which the stream told the engine to stop."""
    reasons: list[str] = []

    async def go() -> None:
        request = make_request(max_tokens=99, stop=stop)
        loop = asyncio.get_running_loop()
        await act(Stream("r", TextAssembler(request, TABLE), loop, lambda _, reason: reasons.append(reason)))

    asyncio.run(go())
    return reasons


def test_a_reader_that_keeps_up_gets_each_token_at_once() -> None:
    async def act(stream: Stream) -> None:
        for number, text in enumerate("abc"):
            stream.push(token(number))
            assert await anext(stream) == Delta(text, (number,), ())

    with_stream(act)


def test_a_reader_that_is_behind_gets_all_it_missed_in_one_piece_and_the_end_apart() -> None:
    async def act(stream: Stream) -> None:
        for number in range(3):
            stream.push(token(number))
        stream.push([LAST])
        items = [item async for item in stream]
        assert items[0] == Delta("abc", (0, 1, 2), ())
        assert [type(item) for item in items] == [Delta, Finish]

    with_stream(act)


def test_steps_that_end_while_the_loop_is_busy_wake_their_reader_once() -> None:
    """As the engine's thread does it: each step is one callback, and callbacks that piled up run before any reader."""

    async def act(stream: Stream) -> None:
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)  # it waits now
        for number in range(3):
            stream.loop.call_soon_threadsafe(stream.push, token(number))
        assert await reader == Delta("abc", (0, 1, 2), ())

    with_stream(act)


@pytest.mark.parametrize("is_behind", [False, True])
def test_a_stop_string_tells_the_engine_once_and_never_shows(is_behind: bool) -> None:
    async def act(stream: Stream) -> None:
        seen: list[str] = []
        reader = asyncio.ensure_future(collect(stream, seen))
        for number in (0, 4, 1, 3, 2):
            stream.push(token(number))
            if not is_behind:
                await asyncio.sleep(0)
        await reader
        assert "".join(seen) == "aSb"
        assert seen == (["aSb"] if is_behind else ["a", "Sb"]), (
            "an S alone may be the stop string's beginning"
        )

    assert with_stream(act, ("STOP",)) == ["stop"]


async def collect(stream: Stream, seen: list[str]) -> None:
    async for item in stream:
        if isinstance(item, Delta) and item.text:
            seen.append(item.text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([[0], [1], [4], [5, 6, 7]]), st.booleans()), max_size=12))
def test_whoever_falls_behind_whenever_reads_the_same_text_in_whole_characters(
    acts: Sequence[tuple[list[int], bool]],
) -> None:
    ids = [number for numbers, _ in acts for number in numbers]
    whole = b"".join(TABLE.token_bytes(number) for number in ids).decode()

    async def act(stream: Stream) -> None:
        seen: list[str] = []
        reader = asyncio.ensure_future(collect(stream, seen))
        for numbers, reads in acts:
            for number in numbers:
                stream.push(token(number))
                if reads:
                    await asyncio.sleep(0)
        stream.push([LAST])
        await reader
        assert "".join(seen) == whole
        assert all("\ufffd" not in piece for piece in seen)

    with_stream(act)


def test_a_reader_that_is_cancelled_leaves_the_stream_to_the_next() -> None:
    async def act(stream: Stream) -> None:
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        stream.push(token(0))
        assert await anext(stream) == Delta("a", (0,), ())
        late = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stream.push(token(1))
        assert await late == Delta("b", (1,), ())

    with_stream(act)


def test_an_abort_ends_whoever_waits() -> None:
    async def act(stream: Stream) -> None:
        seen: list[str] = []
        reader = asyncio.ensure_future(collect(stream, seen))
        await asyncio.sleep(0)
        stream.abort()
        await asyncio.wait_for(reader, timeout=5)
        assert seen == []

    assert with_stream(act) == ["abort"]
