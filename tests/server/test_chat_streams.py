"""POST /v1/chat/completions as a stream: frames and their order."""

from __future__ import annotations

import orjson
import pytest

from engine.messages import TokenLogprob
from engine.stream import Delta
from server.chat_form import ChatChoice
from server.logprobs import chat_logprobs
from server.replies import Head
from server.schemas import parse_chat
from server.sse import Frames
from tests.fakes import delta, finish, say
from tests.support.wire import CHAT as PATH
from tests.support.wire import Wire, ask, stream


def test_frames_come_in_openais_order(wire: Wire) -> None:
    frames = stream(wire)
    assert len({(frame["id"], frame["created"], frame["model"], frame["object"]) for frame in frames}) == 1
    choices = [frame["choices"][0] for frame in frames]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in choices[1:-1]] == [
        {"content": "Hello"},
        {"content": " there"},
        {"content": "."},
    ]
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["stop"]
    assert all("usage" not in frame for frame in frames)


def test_include_usage_ends_with_a_frame_without_choices(wire: Wire) -> None:
    frames = stream(wire, stream_options={"include_usage": True})
    assert all(frame["usage"] is None for frame in frames[:-1])
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["completion_tokens"] == len("Hello there.")


def test_continuous_usage_counts_up(wire: Wire) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    frames = stream(wire, stream_options=options)
    counts = [frame["usage"]["completion_tokens"] for frame in frames[1:]]
    assert counts == [5, 11, 12, 12, 12]


def test_n_choices_are_merged_by_index(wire: Wire) -> None:
    frames = stream(wire, n=2)
    texts = {0: "", 1: ""}
    roles = [frame["choices"][0]["delta"].get("role") for frame in frames]
    assert roles.count("assistant") == 2
    for frame in frames:
        choice = frame["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "Hello there.", 1: "Hello there."}


def test_logprobs_stream_with_their_deltas(wire: Wire) -> None:
    scored = TokenLogprob(ord("H"), -0.5)
    wire.engine.script = lambda request: [delta("H", logprobs=[scored]), finish(request, 1)]
    frames = stream(wire, logprobs=True)
    assert frames[1]["choices"][0]["logprobs"]["content"][0]["token"] == "H"
    assert frames[0]["choices"][0]["logprobs"] is None


def test_stream_headers_name_the_adapter_and_forbid_buffering(wire: Wire) -> None:
    response = wire.post(PATH, ask(stream=True, adapter="french"))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-adapter"] == "french@1"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-store"


def test_any_text_survives_the_frames(wire: Wire) -> None:
    text = 'line\nbreaks\r\n\n "quotes" \\ é 漢 🦜 \u2028'
    wire.engine.script = say(text)
    assert stream(wire)[1]["choices"][0]["delta"]["content"] == text


ODD_TEXTS = (
    "plain",
    '"quoted" \\ back',
    "\x00\x01\x1f\x7f control",
    "\r\n\t\b\f",
    "\u2028\u2029\ufeff\ufffd",
    "é 漢 🦜 \U0010ffff",
    "</script>",
    "data: [DONE]\n\n",
)


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("is_scored", [False, True])
def test_a_deltas_frame_is_what_the_general_encoder_writes(text: str, is_scored: bool) -> None:
    logprobs = (TokenLogprob(65, -0.25, ((65, -0.25), (10, float("-inf")))),) if is_scored else ()
    request = parse_chat(ask(logprobs=True, top_logprobs=2) if is_scored else ask())
    choice = ChatChoice({"index": 0}, request, lambda token_id: bytes([token_id]))
    head = Head("chatcmpl-1", 1700000000, 'model "x"', "fp_0")
    (written,) = choice.take(Delta(text, (65,), logprobs))
    plain = {
        **head.fields("chat.completion.chunk"),
        "choices": [
            {
                "index": 0,
                "delta": {"content": text},
                "logprobs": chat_logprobs(logprobs, 2, lambda i: bytes([i])) if is_scored else None,
                "finish_reason": None,
            }
        ],
    }
    frame = Frames(head, "chat.completion.chunk", includes_usage=False).choice(written)
    assert frame == b"data: " + orjson.dumps(plain) + b"\n\n"
    assert frame.count(b"\n") == 2
