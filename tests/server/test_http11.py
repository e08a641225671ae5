"""A stream's pieces are framed as h11 frames them, to the byte; and requests are bounded as h11 bounds them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import h11
import httpx2
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from server.http11 import HttpProtocol, StreamingConnection
from tests.support.quick_server import QuickServer

REQUESTS = (
    b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
)
HEADERS: tuple[list[tuple[str, str]], ...] = (
    [],
    [("content-length", "6")],
    [("transfer-encoding", "chunked")],
    [("connection", "close")],
)
PIECES = st.lists(st.sampled_from([b"", b"a", b"abcdef", b"\r\n0\r\n\r\n", b"x" * 300, None]), max_size=6)
"""None ends the response, and what comes then comes too late."""


def written(
    connection: h11.Connection, request: bytes, response: h11.Response, pieces: list[bytes | None]
) -> list[object]:
    """What each act wrote or how it failed, and the state after it."""
    connection.receive_data(request)
    while not isinstance(connection.next_event(), h11.EndOfMessage):
        pass
    seen: list[object] = []
    events = [
        response,
        *(h11.EndOfMessage() if p is None else h11.Data(data=p) for p in pieces),
        h11.EndOfMessage(),
    ]
    for event in events:
        try:
            seen.append(connection.send(event))
        except h11.LocalProtocolError as error:
            seen.append(str(error))
        seen.append((connection.our_state, connection.their_state))
    return seen


@settings(max_examples=300, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(REQUESTS), st.sampled_from(HEADERS), st.sampled_from([200, 204, 304]), PIECES
        ),
        min_size=1,
        max_size=3,
    )
)
def test_what_is_written_is_what_h11_writes(
    turns: list[tuple[bytes, list[tuple[str, str]], int, list[bytes | None]]],
) -> None:
    plain, ours = h11.Connection(h11.SERVER), StreamingConnection(h11.SERVER)
    for request, headers, status, pieces in turns:
        response = h11.Response(status_code=status, headers=headers)
        assert written(ours, request, response, pieces) == written(plain, request, response, pieces)
        if (plain.our_state, plain.their_state) != (h11.DONE, h11.DONE):
            return
        plain.start_next_cycle()
        ours.start_next_cycle()


def test_later_pieces_of_a_stream_do_not_go_through_the_state_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = StreamingConnection(h11.SERVER)
    written(connection, REQUESTS[0], h11.Response(status_code=200, headers=[]), [b"one"])
    connection.start_next_cycle()
    connection.receive_data(REQUESTS[0])
    while not isinstance(connection.next_event(), h11.EndOfMessage):
        pass
    connection.send(h11.Response(status_code=200, headers=[]))
    assert connection.send(h11.Data(data=b"one")) == b"3\r\none\r\n"
    monkeypatch.setattr(h11.Connection, "send_with_data_passthrough", None)
    assert connection.send(h11.Data(data=b"and two")) == b"7\r\nand two\r\n"


# ---- on a socket -------------------------------------------------------------------------------------------------


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for piece in (b"one ", b"two ", b"", b"three"):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextmanager
def serving(**options: int) -> Iterator[str]:
    config = uvicorn.Config(app, http=HttpProtocol, ws="none", lifespan="off", log_config=None, **options)  # type: ignore[arg-type]
    server = QuickServer(config)
    with server.running():
        yield server.url


def test_a_kept_connection_serves_one_stream_after_another() -> None:
    with serving() as url, httpx2.Client(trust_env=False) as client:
        replies = [client.get(url) for _ in range(3)]
        replies.append(client.head(url))
    assert [reply.text for reply in replies] == ["one two three"] * 3 + [""]
    assert replies[0].headers["transfer-encoding"] == "chunked"


@pytest.mark.parametrize(
    ("limit", "size", "status"), [(None, 15_000, 200), (None, 70_000, 400), (4_000, 5_000, 400)]
)
def test_a_requests_head_is_bounded(limit: int | None, size: int, status: int) -> None:
    """uvicorn over httptools has no bound: whoever sends headers without end would fill the memory."""
    with serving(**({} if limit is None else {"h11_max_incomplete_event_size": limit})) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nx-long: " + b"a" * size)
            if status == 200:
                connection.sendall(b"\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 %d " % status)
