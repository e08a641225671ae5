"""POST /v1/completions over a real socket: forms of prompts, echo, logprobs, streams."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import QueueFull
from engine.messages import TokenLogprob
from engine.request import GenerationRequest
from engine.sampling import GrammarSpec
from engine.stream import Delta
from tests.fakes import IMAGE_TOKEN, VOCAB_SIZE, FakeStream, Item, finish, say
from tests.support.wire import Wire, error_of, frames_of

PATH = "/v1/completions"


def complete(wire: Wire, prompt: object = "hi", **fields: object) -> dict[str, Any]:
    response = wire.post(PATH, {"prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def scored(request: GenerationRequest) -> list[Item]:
    """Generates "ok", with the prompt's logprobs first where they are asked for: each token -1, its rival -2."""

    def entry(token: int) -> TokenLogprob:
        return TokenLogprob(token, -1.0, ((token, -1.0), (ord("z"), -2.0)))

    prompt = None
    if request.prompt_logprobs is not None:
        prompt = (None, *(entry(token) for token in request.prompt.ids[1:]))
    own = tuple(entry(token) for token in b"ok") if request.sampling.logprobs is not None else ()
    first: list[Item] = [] if prompt is None else [Delta("", (), (), prompt)]
    return [*first, Delta("o", (ord("o"),), own[:1]), Delta("k", (ord("k"),), own[1:]), finish(request, 2)]


def test_a_whole_answer_has_openais_shape(wire: Wire) -> None:
    reply = complete(wire, model="french")
    assert reply["object"] == "text_completion"
    assert reply["id"].startswith("cmpl-")
    assert reply["model"] == "french"
    (choice,) = reply["choices"]
    assert choice == {
        "index": 0,
        "text": "Hello there.",
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }


def test_max_tokens_is_16_unless_it_is_given(wire: Wire) -> None:
    complete(wire)
    complete(wire, max_tokens=7)
    complete(wire, prompt="x" * 4090)
    assert [request.sampling.max_tokens for request in wire.engine.requests] == [16, 7, 6]


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [b"ab"]),
        (["a", "b"], [b"a", b"b"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
def test_every_form_of_prompt_reaches_the_engine_without_a_template(
    wire: Wire, prompt: object, ids: list[bytes]
) -> None:
    reply = complete(wire, prompt)
    assert [bytes(request.prompt.ids) for request in wire.engine.requests] == ids
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(ids)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_choices_go_prompt_by_prompt(wire: Wire) -> None:
    wire.engine.script = lambda request: say(bytes(request.prompt.ids).decode())(request)
    reply = complete(wire, ["a", "b"], n=2, seed=5)
    assert [choice["text"] for choice in reply["choices"]] == ["a", "a", "b", "b"]
    assert [request.sampling.seed for request in wire.engine.requests] == [5, 6, 5, 6]
    assert reply["usage"]["prompt_tokens"] == 2
    assert reply["usage"]["completion_tokens"] == 4


def test_logprobs_are_parallel_lists(wire: Wire) -> None:
    wire.engine.script = scored
    (choice,) = complete(wire, logprobs=2)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["o", "k"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"o": -1.0, "z": -2.0}, {"k": -1.0, "z": -2.0}],
        "text_offset": [0, 1],
    }


def test_logprobs_0_reports_the_chosen_token_alone(wire: Wire) -> None:
    wire.engine.script = scored
    (choice,) = complete(wire, logprobs=0)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"o": -1.0}, {"k": -1.0}]


def test_echo_puts_the_prompt_before_text_and_logprobs(wire: Wire) -> None:
    wire.engine.script = scored
    (choice,) = complete(wire, "hé", echo=True, logprobs=1)["choices"]
    assert choice["text"] == "héok"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "o", "k"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -1.0, -1.0]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]


def test_echo_without_logprobs_asks_for_none(wire: Wire) -> None:
    wire.engine.script = scored
    (choice,) = complete(wire, [104, 105], echo=True)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("hiok", None)
    assert wire.engine.requests[0].prompt_logprobs is None


@pytest.mark.parametrize("is_stream", [False, True])
def test_echo_with_no_tokens_only_scores_the_prompt(wire: Wire, is_stream: bool) -> None:
    wire.engine.script = scored
    body = {"prompt": "hi", "echo": True, "logprobs": 1, "max_tokens": 0}
    if not is_stream:
        reply = complete(wire, **body)
        (choice,) = reply["choices"]
        assert choice["logprobs"]["tokens"] == ["h", "i"]
        assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
        assert reply["usage"]["completion_tokens"] == 0
        return
    options = {"stream": True, "stream_options": {"include_usage": True}}
    frames = frames_of(wire.post(PATH, body | options).text)
    assert "".join(frame["choices"][0]["text"] for frame in frames[:-1]) == "hi"
    assert frames[-1]["usage"]["completion_tokens"] == 0


def test_a_batch_of_id_lists_is_scored_as_lm_eval_asks(wire: Wire) -> None:
    """lm-eval's local-completions: lists of ids, echo, logprobs, max_tokens 1, temperature 0."""
    wire.engine.script = scored
    reply = complete(
        wire, [[97, 98, 99], [100, 101]], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    for choice, length in zip(reply["choices"], (3, 2), strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == length + 2
        for top, token in list(zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True))[1:]:
            assert max(top, key=top.__getitem__) == token


def test_streams_are_frames_of_text(wire: Wire) -> None:
    frames = frames_of(wire.post(PATH, {"prompt": "hi", "stream": True}).text)
    assert [frame["choices"][0]["text"] for frame in frames] == ["Hello", " there", ".", ""]
    assert [frame["choices"][0]["finish_reason"] for frame in frames] == [None, None, None, "stop"]
    assert len({(frame["id"], frame["created"]) for frame in frames}) == 1


def test_streams_echo_and_count(wire: Wire) -> None:
    wire.engine.script = scored
    body = {
        "prompt": ["hi", "yo"],
        "stream": True,
        "echo": True,
        "logprobs": 1,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    frames = frames_of(wire.post(PATH, body).text)
    texts = ["", ""]
    tokens: list[list[str]] = [[], []]
    for frame in frames[:-1]:
        choice = frame["choices"][0]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += (choice["logprobs"] or {}).get("tokens", [])
    assert texts == ["hiok", "yook"]
    assert tokens == [["h", "i", "o", "k"], ["y", "o", "o", "k"]]
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["prompt_tokens"] == 4
    assert frames[-1]["usage"]["completion_tokens"] == 4


def test_many_prompts_are_all_or_none(wire: Wire) -> None:
    submit = wire.engine.submit

    def some(request: GenerationRequest) -> FakeStream:
        if len(wire.engine.streams) == 2:
            raise QueueFull("full", 1.0)
        return submit(request)

    wire.engine.submit = some  # type: ignore[method-assign]
    try:
        response = wire.post(PATH, {"prompt": ["a", "b", "c"], "model": "french"})
    finally:
        del wire.engine.submit
    assert response.status_code == 429
    assert all(stream.is_aborted for stream in wire.engine.streams)
    wire.until(lambda: not wire.registry.leases)


@pytest.mark.parametrize("token", [VOCAB_SIZE, IMAGE_TOKEN, 2**40])
def test_ids_of_no_token_or_of_pictures_are_refused(wire: Wire, token: int) -> None:
    error = error_of(wire.post(PATH, {"prompt": [1, token]}))
    assert (error["code"], error["param"]) == ("invalid_request", "prompt")


def test_too_long_a_prompt_is_refused(wire: Wire) -> None:
    for prompt in ("x" * 5000, [1] * 5000, ["a", "x" * 5000]):
        error = error_of(wire.post(PATH, {"prompt": prompt}))
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_response_format_holds_here_too(wire: Wire) -> None:
    complete(wire, response_format={"type": "json_object"})
    assert wire.engine.requests[0].sampling.grammar == GrammarSpec("json_object")
