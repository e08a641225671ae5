"""POST /v1/chat/completions, whole: its answers, and what of a request reaches the engine."""

from __future__ import annotations

import pytest

from base.prompt import ImagePart, TextPart, ToolCall
from engine.messages import TokenLogprob
from server.errors import WireError
from tests.fakes import BASE_NAME, delta, finish
from tests.support.wire import CHAT as PATH
from tests.support.wire import PIXEL, Wire, ask, chat, error_of


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
