"""Nothing that would change the answer is accepted and ignored; what real clients send is accepted."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_params

from server.errors import WireError, error_body
from server.schemas import ChatRequest, CompletionRequest, parse_chat, parse_completion
from server.schemas.defaults import CHAT, COMPLETION
from server.schemas.openapi import json_body
from tests.support.wire import ask

WORDS = (
    *(
        "role",
        "content",
        "type",
        "text",
        "image_url",
        "url",
        "detail",
        "name",
        "weight",
        "id",
        "scale",
        "function",
    ),
    *("json_schema", "schema", "tool_calls", "arguments", "user", "assistant", "include_usage", "parameters"),
)


def refusal(**fields: object) -> WireError:
    with pytest.raises(WireError) as caught:
        parse_chat(ask(**fields))
    assert caught.value.status == 400
    return caught.value


def refused_message(message: object) -> WireError:
    with pytest.raises(WireError) as caught:
        parse_chat({"messages": [message]})
    return caught.value


# ---- known and unknown fields ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "table", "model"),
    [
        (chat_params.CompletionCreateParamsBase, CHAT, ChatRequest),
        (completion_params.CompletionCreateParamsBase, COMPLETION, CompletionRequest),
    ],
)
def test_every_field_of_openai_python_is_known(params: Any, table: Any, model: Any) -> None:
    known = set(table) | set(model.model_fields)
    assert set(get_type_hints(params)) - known == set()


VLLM_FIELDS = (
    *("use_beam_search", "top_k", "min_p", "repetition_penalty", "length_penalty", "stop_token_ids"),
    *(
        "include_stop_str_in_output",
        "ignore_eos",
        "min_tokens",
        "skip_special_tokens",
        "priority",
        "request_id",
    ),
    *(
        "spaces_between_special_tokens",
        "truncate_prompt_tokens",
        "prompt_logprobs",
        "allowed_token_ids",
        "bad_words",
    ),
    *("echo", "add_special_tokens", "structured_outputs", "logits_processors", "return_tokens_as_token_ids"),
    *("return_token_ids", "cache_salt", "kv_transfer_params", "vllm_xargs", "guided_json", "guided_regex"),
)
VLLM_CHAT_FIELDS = (
    *(
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "chat_template",
        "chat_template_kwargs",
    ),
    *("mm_processor_kwargs", "include_reasoning", "parallel_tool_calls"),
)


def test_every_field_of_vllm_is_known() -> None:
    chat = set(CHAT) | set(ChatRequest.model_fields)
    assert set(VLLM_FIELDS + VLLM_CHAT_FIELDS) - chat == set()
    assert set(VLLM_FIELDS) - set(COMPLETION) - set(CompletionRequest.model_fields) == set()


@pytest.mark.parametrize("name", sorted(CHAT))
def test_unsupported_fields_are_taken_at_their_defaults_and_refused_otherwise(name: str) -> None:
    for neutral in (None, *CHAT[name]):
        parse_chat(ask(**{name: neutral}))
    error = refusal(**{name: "something else"})
    assert (error.code, error.param) == ("unsupported", name)


def test_a_boolean_is_no_number_among_the_defaults() -> None:
    parse_chat(ask(priority=0, length_penalty=1))
    assert refusal(priority=False).param == "priority"
    assert refusal(length_penalty=True).param == "length_penalty"


def test_an_unknown_field_is_named() -> None:
    error = refusal(temprature=1)
    assert (error.code, error.param) == ("invalid_request", "temprature")
    assert "temprature" in error.message


def test_an_unknown_field_is_not_echoed_at_length() -> None:
    assert len(refusal(**{"x" * 10_000: 1}).message) < 200


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "flex"},
        {"safety_identifier": "s"},
        {"prompt_cache_key": "k"},
        {"prompt_cache_retention": "24h"},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"temperature": None, "stop": None, "tools": None, "n": None, "max_tokens": None, "logit_bias": None},
        {"tools": [], "tool_choice": "auto"},
        {"stop": []},
        {"best_of": 1},
        {"parallel_tool_calls": True},
    ],
)
def test_harmless_fields_are_accepted(fields: dict[str, object]) -> None:
    parse_chat(ask(**fields))


# ---- numbers ---------------------------------------------------------------------------------------------------

RANGES: dict[str, tuple[list[object], list[object]]] = {
    "temperature": ([0, 0.0, 1, 2], [-0.1, 2.1, "1", True, [1]]),
    "top_p": ([0, 0.5, 1], [-0.1, 1.1, "1", False]),
    "top_k": ([-1, 0, 50], [-2, 1.0, "5", True]),
    "min_p": ([0, 1], [-0.1, 1.5]),
    "repetition_penalty": ([0.01, 1, 100], [0, -1, 5e-324, 101]),
    "presence_penalty": ([-2, 2], [-2.1, 2.1]),
    "frequency_penalty": ([-2, 2], [-2.1, 2.1]),
    "seed": ([-(2**63), 0, 2**63 - 1], [2**63, 0.5, "7", True]),
    "n": ([1, 8], [0, 9, 1.0]),
    "max_tokens": ([1], [0, -1, 1.0, "5"]),
    "max_completion_tokens": ([1], [0, 2**64]),
    "min_tokens": ([0, 5], [-1]),
    "stop_token_ids": ([[1, 2]], [[-1], ["1"], 5, [0] * 1000]),
    "stop": (["x", ["a", "b", "c", "d"]], ["", [""], ["a"] * 5, 5, ["a", 3], "x" * 2000]),
    "logit_bias": ([{"1": -100, "2": 100.0}], [{"1": 101}, {"1": "5"}, {"1": True}, [1]]),
    "stream": ([True, False], ["true", 1]),
    "logprobs": ([True, False], [1, "true"]),
    "ignore_eos": ([True], [1]),
    "lora": (
        [[{"id": 2**63 - 1, "scale": 1.0}]],
        [[{"id": -1, "scale": 1.0}], [{"id": 2**70, "scale": 1.0}]],
    ),
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, (good, _) in RANGES.items() for v in good])
def test_values_in_range_are_accepted(name: str, value: object) -> None:
    parse_chat(ask(**{name: value}))


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, (_, bad) in RANGES.items() for v in bad])
def test_values_out_of_range_or_of_another_kind_are_refused(name: str, value: object) -> None:
    error = refusal(**{name: value})
    assert error.code == "invalid_request"
    assert error.param is not None
    assert error.param.startswith(name)


def test_top_logprobs_go_with_logprobs_to_20() -> None:
    assert parse_chat(ask(logprobs=True, top_logprobs=20)).num_logprobs == 20
    assert parse_chat(ask(logprobs=True)).num_logprobs == 0
    assert parse_chat(ask()).num_logprobs is None
    assert refusal(logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refusal(top_logprobs=5).param == "top_logprobs"


def test_both_names_of_max_tokens_must_agree() -> None:
    assert parse_chat(ask(max_tokens=5, max_completion_tokens=5)).wanted_tokens == 5
    assert refusal(max_tokens=5, max_completion_tokens=6).param == "max_completion_tokens"


def test_stream_options_go_with_streams() -> None:
    assert refusal(stream_options={"include_usage": True}).param == "stream_options"
    assert refusal(stream=True, stream_options={"include_usage": 1}).param == "stream_options.include_usage"
    assert refusal(stream=True, stream_options={"x": 1}).param == "stream_options.x"


def test_best_of_is_n() -> None:
    parse_chat(ask(n=2, best_of=2))
    assert refusal(n=1, best_of=2).code == "unsupported"


# ---- messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"role": ["user"], "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ("hi", "messages[0].role"),
        ({"role": "user", "content": "x", "mood": "good"}, "messages[0].mood"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0].image_url"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": ""}]},
            "messages[0].content[0].image_url",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "max"}}]},
            "messages[0].content[0].image_url.detail",
        ),
        ({"role": "assistant", "content": None}, "messages"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "messages[0].tool_calls[0].function"),
    ],
)
def test_a_bad_message_is_named(message: object, param: str) -> None:
    error = refused_message(message)
    assert (error.status, error.code, error.param) == (400, "invalid_request", param)


@pytest.mark.parametrize("kind", ["input_audio", "file", "video_url", "input_image", "refusal"])
def test_parts_of_other_apis_are_unsupported(kind: str) -> None:
    error = refused_message({"role": "user", "content": [{"type": kind, kind: {}}]})
    assert (error.code, error.param) == ("unsupported", "messages[0].content[0].type")


def test_no_messages_are_refused() -> None:
    bodies: list[dict[str, object]] = [{"messages": []}, {}, {"messages": None}, {"messages": "hi"}]
    for body in bodies:
        with pytest.raises(WireError) as caught:
            parse_chat(body)
        assert caught.value.param == "messages"


def test_pictures_go_with_user_system_and_tool_messages_only() -> None:
    picture = [{"type": "image_url", "image_url": {"url": "data:,x"}}]
    parse_chat({"messages": [{"role": "user", "content": picture}]})
    parse_chat({"messages": [{"role": "system", "content": picture}]})
    parse_chat({"messages": [{"role": "tool", "tool_call_id": "x", "content": picture}]})
    assert refused_message({"role": "assistant", "content": picture}).status == 400


def test_what_openai_python_was_answered_can_be_sent_back() -> None:
    answered = ChatCompletionMessage.model_validate(
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        }
    )
    for sent in (answered.model_dump(), answered.model_dump(exclude_unset=True), answered.to_dict()):
        parse_chat({"messages": [{"role": "user", "content": "x"}, sent]})


# ---- tools and formats -----------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "description": None, "strict": None}}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [TOOL, TOOL]}, "invalid_request", "tools"),
        ({"tool_choice": "required"}, "invalid_request", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "invalid_request", "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "invalid_request",
            "tool_choice",
        ),
        ({"tools": [{"type": "custom", "custom": {}}]}, "unsupported", "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "unsupported", "tool_choice.type"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "invalid_request",
            "tools[0].function.name",
        ),
        ({"response_format": {"type": "xml"}}, "invalid_request", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "invalid_request", "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "invalid_request",
            "response_format.json_schema.schema",
        ),
        ({"continue_final_message": True}, "invalid_request", "continue_final_message"),
    ],
)
def test_bad_tools_and_formats_are_named(fields: dict[str, object], code: str, param: str) -> None:
    error = refusal(**fields)
    assert (error.code, error.param) == (code, param)


# ---- completions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1, 2], [3]], ([1, 2], [3])),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: object, prompts: object) -> None:
    assert parse_completion({"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], 5, [1, "a"], ["a", 1], [1.5], [True], [-1], {"a": 1}, [[1], "a"], ["x"] * 300]
)
def test_other_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(WireError) as caught:
        parse_completion({"prompt": prompt})
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith("prompt")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"messages": []}, "messages"),
        ({"prompt": ["x"] * 100, "n": 3}, "prompt"),
    ],
)
def test_bad_completions_are_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(WireError) as caught:
        parse_completion({"prompt": "x", **fields})
    assert caught.value.param == param


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(set(ChatRequest.model_fields) | set(CHAT))), JSON, max_size=4),
    JSON,
)
def test_any_json_is_a_request_or_a_short_400(fields: dict[str, object], message: object) -> None:
    body = {"messages": [{"role": "user", "content": "x"}, message], **fields}
    statuses = {200}
    for parse in (parse_chat, parse_completion):
        try:
            parse(body)
        except WireError as error:
            statuses.add(error.status)
            error_body(error)
    assert statuses <= {200, 400}


def test_the_documented_body_has_no_dangling_references() -> None:
    body = json_body(ChatRequest)
    assert "$ref" not in str(body)
    assert "image_url" in str(body)
