"""How an exchange ends: failures before and after the first byte, clients that leave, readers that stop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator

import httpx2
import pytest

from adapters.errors import AdapterRejected, RejectReason
from engine.errors import (
    AdapterUnavailable,
    DeadlineExceeded,
    Draining,
    EngineError,
    NumericalError,
    QueueFull,
)
from engine.request import GenerationRequest
from tests.fakes import Item, delta, finish
from tests.support.wire import ADAPTERS, PIXEL, Wire, ask, error_of, frames_of, stream
from tests.support.wire import CHAT as PATH


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull("full", 7.2), 429, "queue_full"),
        (Draining("draining"), 503, "draining"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_refused_submit_is_a_status(
    wire: Wire, error: EngineError, status: int, code: str, is_stream: bool
) -> None:
    wire.engine.refusal = error
    response = wire.post(PATH, ask(stream=is_stream, adapter="french"))
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert response.headers["retry-after"] in ("8", "1")
    wire.until(lambda: not wire.registry.leases)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NumericalError("NaN"), 500, "numerical_error"),
        (DeadlineExceeded("too late"), 504, "deadline_exceeded"),
        (
            AdapterUnavailable("french@1", AdapterRejected(RejectReason.BAD_SHAPE, "no", ("a", "b"))),
            422,
            "adapter_rejected",
        ),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_failure_before_the_first_event_is_a_status(
    wire: Wire, error: EngineError, status: int, code: str, is_stream: bool
) -> None:
    wire.engine.script = lambda request: [error]
    response = wire.post(PATH, ask(stream=is_stream, adapter="french"))
    assert response.status_code == status
    assert error_of(response)["code"] == code
    wire.until(lambda: not wire.registry.leases)


def test_a_failure_after_the_first_byte_is_an_event_and_then_the_end_mark(wire: Wire) -> None:
    wire.engine.script = lambda request: [delta("Hel"), NumericalError("NaN")]
    frames = stream(wire, adapter="french", stream_options={"include_usage": True})
    assert frames[1]["choices"][0]["delta"] == {"content": "Hel"}
    assert frames[-1]["error"]["code"] == "numerical_error"
    wire.until(lambda: not wire.registry.leases)


def test_one_failed_choice_fails_the_answer_and_ends_the_others(wire: Wire) -> None:
    def script(request: GenerationRequest) -> list[Item]:
        if request.request_id.endswith("-1"):
            return [delta("a"), NumericalError("NaN")]
        return [delta("b"), asyncio.Event(), finish(request, 1)]

    wire.engine.script = script
    response = wire.post(PATH, ask(n=2))
    assert response.status_code == 500
    assert all(one.is_aborted for one in wire.engine.streams)


def test_a_bug_in_one_of_many_choices_is_an_answer_not_a_wait(wire: Wire) -> None:
    def script(request: GenerationRequest) -> Iterator[Item]:
        yield delta("a")
        raise RuntimeError("a bug")

    wire.engine.script = script
    assert error_of(wire.post(PATH, ask(n=2)))["code"] == "internal"


def test_a_stream_that_ends_without_a_finish_is_an_error_not_a_short_answer(wire: Wire) -> None:
    wire.engine.script = lambda request: [delta("half")]
    assert wire.post(PATH, ask()).status_code == 500
    assert stream(wire)[-1]["error"]["code"] == "internal"


def test_a_full_queue_is_told_before_pictures_are_loaded(wire: Wire) -> None:
    wire.engine.waiting = {"base": 256}
    parts = [{"type": "image_url", "image_url": PIXEL}]
    response = wire.post(PATH, {"messages": [{"role": "user", "content": parts}]})
    assert response.status_code == 429
    assert wire.media.loads == []


def test_a_stopped_engine_is_503(wire: Wire) -> None:
    wire.engine.is_alive = False
    assert error_of(wire.post(PATH, ask()))["code"] == "engine_restarting"


# ---- leaving clients -------------------------------------------------------------------------------------------


def hang(request: GenerationRequest) -> list[Item]:
    return [delta("first"), asyncio.Event(), finish(request, 1)]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_everything(wire: Wire, is_stream: bool, n: int) -> None:
    wire.engine.script = hang
    body = json.dumps(ask(stream=is_stream, adapter="french", n=n)).encode()
    host, port = wire.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {PATH} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        if is_stream:
            assert b"200 OK" in connection.recv(64)
        wire.until(lambda: len(wire.engine.streams) == n)
        assert wire.registry.leases != []
    wire.until(lambda: all(one.is_aborted for one in wire.engine.streams) and not wire.registry.leases)


def test_a_stream_starts_after_the_keepalive_interval_without_a_token() -> None:
    with Wire(keepalive_s=0.05).serving() as wire:
        gate = asyncio.Event()
        wire.engine.script = lambda request: [gate, delta("late"), finish(request, 1)]
        with httpx2.stream("POST", wire.url + PATH, json=ask(stream=True), timeout=20) as response:
            lines = response.iter_lines()
            assert "assistant" in next(lines)
            while not next(lines).startswith(":"):
                pass
            wire.on_loop(gate.set)
            rest = list(lines)
        assert any("late" in line for line in rest)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"


def test_64_streams_at_once_each_get_their_own_answer(wire: Wire) -> None:
    def script(request: GenerationRequest) -> list[Item]:
        words = [f"{bytes(request.prompt.ids).decode()} {i};" for i in range(40)]
        return [*(delta(word) for word in words), finish(request, 40)]

    async def one(client: httpx2.AsyncClient, number: int) -> str:
        adapter = ("base", *ADAPTERS)[number % 4]
        response = await client.post(wire.url + PATH, json=ask(f"n{number}", stream=True, adapter=adapter))
        frames = frames_of(response.text)
        return "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames)

    async def all_of_them() -> list[str]:
        async with httpx2.AsyncClient(timeout=30) as client:
            return await asyncio.gather(*(one(client, number) for number in range(64)))

    wire.engine.script = script
    answers = asyncio.run(all_of_them())
    assert answers == ["".join(f"user:n{number} {i};" for i in range(40)) for number in range(64)]
    wire.until(lambda: not wire.registry.leases)


def test_a_slow_reader_is_cut_and_freed() -> None:
    with Wire(slow_reader_timeout_s=0.2).serving() as wire:
        wire.engine.script = lambda request: [delta("x" * 100_000) for _ in range(400)]
        body = json.dumps(ask(stream=True, adapter="french")).encode()
        host, port = wire.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"POST {PATH} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            wire.until(lambda: len(wire.engine.streams) == 1)
            wire.until(lambda: wire.engine.streams[0].is_aborted and not wire.registry.leases)
