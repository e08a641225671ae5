"""openai-python, unmodified, against the server over a real socket."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, cast

import openai
import pytest

from adapters.errors import AdapterRejected, RejectReason
from engine.errors import AdapterUnavailable, NumericalError, QueueFull
from engine.messages import TokenLogprob
from server.keys import Caller, Key, hash_key
from tests.fakes import BASE_NAME, delta, finish, say
from tests.support.wire import Wire

MESSAGES: Any = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PICTURE = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


@pytest.fixture
def client(wire: Wire) -> Iterator[openai.OpenAI]:
    with wire.openai() as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=BASE_NAME, messages=MESSAGES)
    assert reply.choices[0].message.content == "Hello there."
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    assert reply._request_id


def test_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=BASE_NAME, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello there."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_the_stream_helper_gathers_the_same_answer(client: openai.OpenAI, wire: Wire) -> None:
    wire.engine.script = say("Wait. ", CALL)
    with client.chat.completions.stream(model=BASE_NAME, messages=MESSAGES, tools=[WEATHER]) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert final.choices[0].message.content == "Wait."
    assert cast(Any, call).function.arguments == '{"city": "Paris"}'


def test_image_as_data_uri(client: openai.OpenAI, wire: Wire) -> None:
    content: Any = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
    ]
    reply = client.chat.completions.create(model=BASE_NAME, messages=[{"role": "user", "content": content}])
    assert wire.media.loads == [(PICTURE, "low")]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.image_tokens == 4


def test_adapter_by_extra_body_by_model_and_by_header(client: openai.OpenAI, wire: Wire) -> None:
    create = client.chat.completions.with_raw_response.create
    replies = [
        create(model=BASE_NAME, messages=MESSAGES, extra_body={"adapter": "french"}),
        create(model="french", messages=MESSAGES),
        create(model=BASE_NAME, messages=MESSAGES, extra_headers={"X-Adapter": "french"}),
    ]
    assert [reply.headers["x-adapter"] for reply in replies] == ["french@1"] * 3
    assert {request.adapter.name for request in wire.engine.requests} == {"french"}


def test_error_classes(client: openai.OpenAI, wire: Wire) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as not_found:
        create(model="frenhc", messages=MESSAGES)
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    assert "did you mean french?" in not_found.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        create(model=BASE_NAME, messages=MESSAGES, temperature=3)
    assert (bad.value.code, bad.value.param) == ("invalid_request", "temperature")
    with pytest.raises(openai.BadRequestError) as unknown:
        create(model=BASE_NAME, messages=MESSAGES, extra_body={"tempo": 1})
    assert unknown.value.param == "tempo"
    with pytest.raises(openai.BadRequestError) as unsupported:
        create(model=BASE_NAME, messages=MESSAGES, modalities=["text", "audio"])
    assert unsupported.value.code == "unsupported"
    with pytest.raises(openai.BadRequestError) as conflict:
        create(model="json", messages=MESSAGES, extra_body={"adapter": "french"})
    assert conflict.value.code == "adapter_conflict"
    wire.engine.refusal = QueueFull("full", 3.0)
    with pytest.raises(openai.RateLimitError) as full:
        create(model=BASE_NAME, messages=MESSAGES)
    assert full.value.response.headers["retry-after"] == "3"


def test_failures_of_adapter_and_model(client: openai.OpenAI, wire: Wire) -> None:
    rejected = AdapterRejected(RejectReason.NON_FINITE, "has NaN", ("key",))
    wire.engine.script = lambda request: [AdapterUnavailable("french@1", rejected)]
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(model="french", messages=MESSAGES, stream=True)
    assert cast(dict[str, object], refused.value.body)["reason"] == "non_finite"
    wire.engine.script = lambda request: [delta("Hel"), NumericalError("NaN")]
    with pytest.raises(openai.APIError) as failed:
        list(client.chat.completions.create(model=BASE_NAME, messages=MESSAGES, stream=True))
    assert failed.value.code == "numerical_error"


def test_n_and_stop_and_seed(client: openai.OpenAI, wire: Wire) -> None:
    reply = client.chat.completions.create(
        model=BASE_NAME, messages=MESSAGES, n=2, stop=["x", "y"], seed=3, max_completion_tokens=5
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    params = [request.sampling for request in wire.engine.requests]
    assert [each.seed for each in params] == [3, 4]
    assert params[0].stop == ("x", "y")
    assert params[0].max_tokens == 5


def test_logprobs(client: openai.OpenAI, wire: Wire) -> None:
    scored = TokenLogprob(ord("H"), -0.25, ((ord("H"), -0.25), (ord("J"), -3.0)))
    wire.engine.script = lambda request: [delta("H", logprobs=[scored]), finish(request, 1)]
    reply = client.chat.completions.create(model=BASE_NAME, messages=MESSAGES, logprobs=True, top_logprobs=2)
    assert reply.choices[0].logprobs is not None
    (entry,) = reply.choices[0].logprobs.content or []
    assert (entry.token, entry.logprob, entry.bytes) == ("H", -0.25, [72])
    assert [top.token for top in entry.top_logprobs] == ["H", "J"]


def test_tools_there_and_back(client: openai.OpenAI, wire: Wire) -> None:
    wire.engine.script = say(CALL)
    first = client.chat.completions.create(
        model=BASE_NAME, messages=MESSAGES, tools=[WEATHER], tool_choice="required"
    )
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls or []
    wire.engine.script = say("Sunny.")
    answer: Any = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
    second = client.chat.completions.create(
        model=BASE_NAME, messages=[*MESSAGES, cast(Any, message), answer], tools=[WEATHER]
    )
    assert second.choices[0].message.content == "Sunny."
    sent = wire.processor.chats[-1]
    assert sent[1].tool_calls[0].id == sent[2].tool_call_id == call.id


def test_response_format(client: openai.OpenAI, wire: Wire) -> None:
    wire.engine.script = say('{"a": 1}')
    schema: Any = {"type": "object", "properties": {"a": {"type": "integer"}}}
    reply = client.chat.completions.create(
        model=BASE_NAME,
        messages=MESSAGES,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": schema, "strict": True},
        },
    )
    assert json.loads(reply.choices[0].message.content or "") == {"a": 1}
    assert wire.engine.grammars[0].kind == "json_schema"


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="french", prompt=["a", "b"], max_tokens=5)
    assert [choice.text for choice in reply.choices] == ["Hello there."] * 2
    stream = client.completions.create(model="french", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello there."


def test_a_key_may_use_its_adapters_only() -> None:
    caller = Caller("app", frozenset({"infer"}), ("json",))
    with Wire(Key(hash_key("a-long-secret"), caller)).serving() as wire:
        with pytest.raises(openai.AuthenticationError):
            wire.openai().chat.completions.create(model="json", messages=MESSAGES)
        client = openai.OpenAI(base_url=wire.url + "/v1", api_key="a-long-secret", max_retries=0)
        assert client.chat.completions.create(model="json", messages=MESSAGES).model == "json"
        assert client.chat.completions.create(model="base", messages=MESSAGES).model == "base"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="french", messages=MESSAGES)
