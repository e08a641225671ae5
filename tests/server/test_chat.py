"""POST /v1/chat/completions over a real socket, with raw HTTP: frames, fields, errors and what ends with a request."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from adapters.errors import AdapterRejected, RejectReason
from base.prompt import ImagePart, TextPart, ToolCall
from engine.errors import (
    AdapterUnavailable,
    DeadlineExceeded,
    Draining,
    EngineError,
    NumericalError,
    QueueFull,
)
from engine.messages import TokenLogprob
from engine.request import GenerationRequest
from engine.sampling import GrammarSpec
from server.errors import WireError
from tests.fakes import BASE_NAME, Item, delta, finish, say
from tests.support.wire import Wire, ask, error_of, frames_of

PATH = "/v1/chat/completions"
PIXEL = "data:image/png;base64,AAAA"


@pytest.fixture(scope="module")
def running() -> Iterator[Wire]:
    with Wire().serving() as wire:
        yield wire


@pytest.fixture
def wire(running: Wire) -> Wire:
    running.reset()
    return running


def chat(wire: Wire, body: dict[str, object] | None = None, **headers: str) -> dict[str, Any]:
    response = wire.post(PATH, ask() if body is None else body, **headers)
    assert response.status_code == 200, response.text
    return dict(response.json())


def stream(wire: Wire, **fields: object) -> list[Any]:
    response = wire.post(PATH, ask(stream=True, **fields))
    assert response.status_code == 200, response.text
    return frames_of(response.text)


# ---- whole responses -------------------------------------------------------------------------------------------


def test_a_whole_answer_has_openais_shape(wire: Wire) -> None:
    reply = chat(wire)
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["system_fingerprint"].startswith("fp_")
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None


def test_usage_counts_prompt_image_and_cached_tokens(wire: Wire) -> None:
    parts = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    reply = chat(wire, {"messages": [{"role": "user", "content": parts}]})
    usage = reply["usage"]
    assert usage["prompt_tokens"] == len("user:hi") + 4
    assert usage["completion_tokens"] == len("Hello there.")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 4
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert "completion_tokens_details" in usage


def test_headers_say_what_served_it_and_how_long_it_took(wire: Wire) -> None:
    response = wire.post(PATH, ask(adapter="french"))
    assert response.headers["x-adapter"] == "french@1"
    assert response.headers["x-base"] == BASE_NAME
    assert response.headers["x-request-id"]
    assert response.headers["server-timing"] == "queue;dur=1.0, swap;dur=2.0, prefill;dur=3.0, decode;dur=4.0"


@pytest.mark.parametrize(
    ("fields", "model", "adapter"),
    [
        ({}, BASE_NAME, "base"),
        ({"model": BASE_NAME}, BASE_NAME, "base"),
        ({"model": "french"}, "french", "french@1"),
        ({"model": "base", "adapter": "json"}, "base", "json@1"),
        ({"adapter": "json@1"}, "json@1", "json@1"),
        ({"model": f"{BASE_NAME}:org/nested"}, f"{BASE_NAME}:org/nested", "org/nested@1"),
    ],
)
def test_model_echoes_what_was_asked(wire: Wire, fields: dict[str, object], model: str, adapter: str) -> None:
    response = wire.post(PATH, ask(**fields))
    assert response.json()["model"] == model
    assert response.headers["x-adapter"] == adapter


def test_n_choices_draw_with_different_seeds(wire: Wire) -> None:
    reply = chat(wire, ask(n=3, seed=2**63 - 2))
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    seeds = [request.sampling.seed for request in wire.engine.requests]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert len({request.request_id for request in wire.engine.requests}) == 3
    assert reply["usage"]["prompt_tokens"] == len("user:hi")
    assert reply["usage"]["completion_tokens"] == 3 * len("Hello there.")


def test_logprobs_name_tokens_and_alternatives(wire: Wire) -> None:
    scored = [
        TokenLogprob(ord("H"), -0.5, ((ord("H"), -0.5), (ord("J"), -1.5))),
        TokenLogprob(0xE2, float("-inf"), ((ord("x"), -0.1), (ord("y"), -2.0))),
    ]
    wire.engine.script = lambda request: [
        delta("H", logprobs=scored[:1]),
        delta("i", logprobs=scored[1:]),
        finish(request, 2),
    ]
    (choice,) = chat(wire, ask(logprobs=True, top_logprobs=1))["choices"]
    first, second = choice["logprobs"]["content"]
    assert first == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]}],
    }
    assert (second["token"], second["logprob"], second["bytes"]) == ("bytes:\\xe2", -9999.0, [0xE2])
    assert wire.engine.requests[0].sampling.logprobs == 1


# ---- streams ---------------------------------------------------------------------------------------------------


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


# ---- failures --------------------------------------------------------------------------------------------------


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
    assert wire.registry.leases == []


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
    assert wire.registry.leases == []


def test_a_failure_after_the_first_byte_is_an_event_and_then_the_end_mark(wire: Wire) -> None:
    wire.engine.script = lambda request: [delta("Hel"), NumericalError("NaN")]
    frames = stream(wire, adapter="french", stream_options={"include_usage": True})
    assert frames[1]["choices"][0]["delta"] == {"content": "Hel"}
    assert frames[-1]["error"]["code"] == "numerical_error"
    assert wire.registry.leases == []


def test_one_failed_choice_fails_the_answer_and_ends_the_others(wire: Wire) -> None:
    def script(request: GenerationRequest) -> list[Item]:
        if request.request_id.endswith("-1"):
            return [delta("a"), NumericalError("NaN")]
        return [delta("b"), asyncio.Event(), finish(request, 1)]

    wire.engine.script = script
    response = wire.post(PATH, ask(n=2))
    assert response.status_code == 500
    assert all(one.is_aborted for one in wire.engine.streams)


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


# ---- what reaches the engine -----------------------------------------------------------------------------------


def test_sampling_fields_reach_the_engine(wire: Wire) -> None:
    chat(
        wire,
        ask(
            temperature=0,
            top_p=0,
            top_k=-1,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            seed=7,
            logit_bias={"3": 5, "1": -100},
            stop=["a", "b"],
            stop_token_ids=[9],
            ignore_eos=True,
            min_tokens=2,
            max_completion_tokens=9,
            max_tokens=9,
            include_stop_str_in_output=True,
        ),
    )
    params = wire.engine.requests[0].sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 1e-6, 0, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.5, -0.5)
    assert (params.seed, params.logit_bias) == (7, ((1, -100.0), (3, 5.0)))
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("a", "b"), (9,), True)
    assert (params.min_tokens, params.max_tokens, params.include_stop_str_in_output) == (2, 9, True)
    assert params.logprobs is None


def test_deadlines_come_from_the_settings(wire: Wire) -> None:
    chat(wire)
    request = wire.engine.requests[0]
    assert request.queue_timeout_s == wire.settings.queue_timeout_s
    assert request.total_timeout_s == wire.settings.request_timeout_s


def test_max_tokens_defaults_to_what_the_context_leaves(wire: Wire) -> None:
    chat(wire)
    assert wire.engine.requests[0].sampling.max_tokens == 4096 - len("user:hi")


@pytest.mark.parametrize(
    ("text", "fields"),
    [("x" * 4096, {}), ("x" * 4000, {"max_tokens": 1000}), ("x" * 2_000_000, {})],
    ids=["prompt", "answer", "not worth tokenising"],
)
def test_too_long_a_context_is_refused_with_the_numbers(
    wire: Wire, text: str, fields: dict[str, object]
) -> None:
    response = wire.post(PATH, ask(text, **fields))
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "4096" in error["message"]


def test_messages_reach_the_processor_in_its_own_form(wire: Wire) -> None:
    looks = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": PIXEL}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    echoed: dict[str, object] = {"refusal": None, "audio": None, "function_call": None, "annotations": []}
    chat(
        wire,
        {
            "messages": [
                {"role": "developer", "content": "rules", "name": "boss"},
                {"role": "user", "content": looks},
                {"role": "assistant", "content": None, "tool_calls": [call], **echoed},
                {"role": "tool", "content": "42", "tool_call_id": "c1"},
                {"role": "assistant", "content": "ok", "tool_calls": None},
                {"role": "user", "content": ""},
            ]
        },
    )
    system, user, assistant, tool, other, last = wire.processor.chats[0]
    assert (system.role, system.parts) == ("system", (TextPart("rules"),))
    assert user.parts[0] == TextPart("look")
    assert isinstance(user.parts[1], ImagePart)
    assert (assistant.parts, assistant.tool_calls) == ((), (ToolCall("c1", "f", '{"x":1}'),))
    assert (tool.role, tool.tool_call_id, tool.parts) == ("tool", "c1", (TextPart("42"),))
    assert (other.parts, last.parts) == ((TextPart("ok"),), (TextPart(""),))


def test_images_are_loaded_with_their_detail_in_order(wire: Wire) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": f"{PIXEL}{i}", "detail": detail}}
        for i, detail in enumerate(("auto", "low", "high", "original", None))
    ]
    chat(wire, {"messages": [{"role": "user", "content": parts}]})
    assert wire.media.loads == [
        (f"{PIXEL}{i}", detail) for i, detail in enumerate(("auto", "low", "high", "original", "auto"))
    ]


def test_a_refused_image_names_its_part(wire: Wire) -> None:
    wire.media.failure = WireError(400, "invalid_image", "the image cannot be used")
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": PIXEL}]
    error = error_of(wire.post(PATH, {"messages": [{"role": "user", "content": parts}]}))
    assert (error["code"], error["param"]) == ("invalid_image", "messages[0].content[1].image_url")


def test_a_final_message_can_be_continued(wire: Wire) -> None:
    chat(wire, ask(add_generation_prompt=False, continue_final_message=True))
    assert wire.processor.options[0] == {"tools": [], "generation": False, "continue": True}


# ---- response_format and tools ---------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, GrammarSpec("json_object")),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": {"type": "array"}},
            },
            GrammarSpec("json_schema", '{"type": "array"}'),
        ),
    ],
)
def test_response_format_becomes_a_compiled_grammar(
    wire: Wire, form: dict[str, object], grammar: GrammarSpec | None
) -> None:
    chat(wire, ask(response_format=form))
    assert wire.engine.requests[0].sampling.grammar == grammar
    assert wire.engine.grammars == ([] if grammar is None else [grammar])


def test_a_schema_that_cannot_be_enforced_is_a_400(wire: Wire) -> None:
    from engine.errors import GrammarError

    wire.engine.grammar_failure = GrammarError("no such keyword")
    error = error_of(wire.post(PATH, ask(response_format={"type": "json_object"})))
    assert (error["code"], error["param"]) == ("invalid_request", "response_format")


def test_a_tool_call_becomes_an_object(wire: Wire) -> None:
    wire.engine.script = say("Let me see.", CALL[:20], CALL[20:])
    (choice,) = chat(wire, ask(tools=[TOOL]))["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_a_tool_call_streams_without_its_marks(wire: Wire) -> None:
    wire.engine.script = say("Wait. ", CALL[:5], CALL[5:30], CALL[30:] + "\n" + CALL)
    frames = stream(wire, tools=[TOOL])
    deltas = [frame["choices"][0]["delta"] for frame in frames]
    text = "".join(each.get("content") or "" for each in deltas)
    calls = [call for each in deltas for call in each.get("tool_calls", [])]
    assert text.strip() == "Wait."
    assert [call["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2
    assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_parallel_tool_calls_false_lets_one_call_through(wire: Wire) -> None:
    wire.engine.script = say(CALL, "\n", CALL)
    (choice,) = chat(wire, ask(tools=[TOOL], parallel_tool_calls=False))["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


def test_an_answer_cut_by_its_limit_is_length_even_with_calls(wire: Wire) -> None:
    wire.engine.script = say(CALL, reason="length")
    (choice,) = chat(wire, ask(tools=[TOOL]))["choices"]
    assert choice["finish_reason"] == "length"


def test_without_tools_marks_stay_text(wire: Wire) -> None:
    wire.engine.script = say(CALL)
    (choice,) = chat(wire)["choices"]
    assert choice["message"]["content"] == CALL
    (choice,) = chat(wire, ask(tools=[TOOL], tool_choice="none"))["choices"]
    assert choice["message"]["content"] == CALL
    assert wire.processor.options[-1]["tools"] == []


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["required", "named"]
)
def test_a_forced_call_is_held_to_its_grammar(wire: Wire, choice: object) -> None:
    wire.engine.script = say(CALL)
    chat(wire, ask(tools=[TOOL], tool_choice=choice))
    grammar = wire.engine.requests[0].sampling.grammar
    assert grammar is not None
    assert "weather" in grammar.source
    assert wire.processor.options[0]["tools"] == [TOOL]


def test_tools_and_response_format_together_are_refused(wire: Wire) -> None:
    error = error_of(wire.post(PATH, ask(tools=[TOOL], response_format={"type": "json_object"})))
    assert error["code"] == "unsupported"
