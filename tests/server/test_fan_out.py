"""``adapters``: several answer the same chat, each as a choice of its own."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

from adapters.errors import AdapterNotFound, AdapterRejected, RejectReason
from adapters.ref import AdapterRef
from engine.errors import AdapterUnavailable, NumericalError
from engine.request import GenerationRequest
from server.replies import MAX_ADAPTER_HEADER
from tests.fakes import BASE_NAME, Item, delta, finish, ref
from tests.support.fake_registry import FakeLease
from tests.support.wire import CHAT as PATH
from tests.support.wire import PIXEL, Wire, ask, chat, error_of, stream

HALF = [{"name": "json", "weight": 0.5}]
ASKED = ["french", "base", HALF]
SERVED = ["french@1", "base", "json@1*0.5"]


def by_adapter(request: GenerationRequest) -> list[Item]:
    return [delta("I am "), delta(str(request.adapter)), finish(request, 5)]


@pytest.fixture
def scripted(wire: Wire) -> Wire:
    wire.engine.script = by_adapter
    return wire


def test_each_answers_as_a_choice_that_names_it(scripted: Wire) -> None:
    response = scripted.post(PATH, ask(adapters=ASKED))
    reply = response.json()
    assert [choice["adapter"] for choice in reply["choices"]] == SERVED
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    contents = [choice["message"]["content"] for choice in reply["choices"]]
    assert contents == [f"I am {name}" for name in SERVED]
    assert response.headers["x-adapter"] == ", ".join(SERVED)
    assert reply["model"] == BASE_NAME


def test_each_streams_under_its_index_and_name(scripted: Wire) -> None:
    texts: dict[tuple[int, str], str] = defaultdict(str)
    ends = []
    for frame in stream(scripted, adapters=ASKED):
        (choice,) = frame["choices"]
        texts[choice["index"], choice["adapter"]] += choice["delta"].get("content", "")
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert texts == {(i, name): f"I am {name}" for i, name in enumerate(SERVED)}
    assert sorted(ends) == [0, 1, 2]


def test_the_picture_is_loaded_and_prepared_once(scripted: Wire) -> None:
    parts = [{"type": "image_url", "image_url": PIXEL}, {"type": "text", "text": "?"}]
    chat(scripted, {"messages": [{"role": "user", "content": parts}], "adapters": ASKED})
    assert len(scripted.media.loads) == len(scripted.processor.chats) == 1
    assert len({id(request.prompt) for request in scripted.engine.requests}) == 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_usage_counts_every_adapters_prompt_and_answer(scripted: Wire, is_stream: bool) -> None:
    if is_stream:
        usage = stream(scripted, adapters=ASKED, n=2, stream_options={"include_usage": True})[-1]["usage"]
    else:
        usage = chat(scripted, ask(adapters=ASKED, n=2))["usage"]
    assert usage["prompt_tokens"] == 3 * len("user:hi")
    assert usage["completion_tokens"] == 3 * 2 * 5


def test_running_usage_counts_every_adapters_prompt(scripted: Wire) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    frames = stream(scripted, adapters=ASKED, n=2, stream_options=options)
    assert {frame["usage"]["prompt_tokens"] for frame in frames[6:]} == {3 * len("user:hi")}


def test_with_n_each_gives_n_choices_and_all_draw_with_the_same_seeds(scripted: Wire) -> None:
    choices = chat(scripted, ask(adapters=["json", "base"], n=2, seed=7))["choices"]
    assert [choice["adapter"] for choice in choices] == ["json@1", "json@1", "base", "base"]
    assert [request.sampling.seed for request in scripted.engine.requests] == [7, 8, 7, 8]
    assert len({request.request_id for request in scripted.engine.requests}) == 4


def test_one_adapter_in_adapters_is_a_fan_out_of_one_and_no_other_choice_names_any(scripted: Wire) -> None:
    assert [choice["adapter"] for choice in chat(scripted, ask(adapters=["json"]))["choices"]] == ["json@1"]
    assert "adapter" not in chat(scripted, ask(adapter="json"))["choices"][0]
    assert all("adapter" not in frame["choices"][0] for frame in stream(scripted, adapter="json"))
    assert "adapter" not in chat(scripted, ask(adapters=None, adapter="json"))["choices"][0]


def test_an_openai_client_reads_who_answered(scripted: Wire) -> None:
    with scripted.openai() as client:
        reply = client.chat.completions.create(
            model=BASE_NAME,
            messages=[{"role": "user", "content": "hi"}],
            extra_body={"adapters": ASKED},
        )
    assert [choice.adapter for choice in reply.choices] == SERVED  # type: ignore[attr-defined]


# ---- leases and failures


def test_every_version_is_leased_while_they_answer_those_of_a_composition_too(wire: Wire) -> None:
    seen: list[list[AdapterRef]] = []

    def script(request: GenerationRequest) -> list[Item]:
        seen.append(sorted(wire.registry.leases, key=str))
        return by_adapter(request)

    wire.engine.script = script
    both = [{"name": "json"}, {"name": "org/nested", "weight": -1}]
    chat(wire, ask(adapters=["french", "base", both, "french"]))
    assert seen == [[ref("french"), ref("json"), ref("org/nested")]] * 4
    wire.until(lambda: not wire.registry.leases)


def test_one_that_is_removed_meanwhile_is_404_and_leaves_no_lease(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = wire.registry.lease

    def late(version: AdapterRef) -> FakeLease:
        if version.name == "json":
            raise AdapterNotFound(str(version))
        return lease(version)

    monkeypatch.setattr(wire.registry, "lease", late)
    assert error_of(wire.post(PATH, ask(adapters=["french", "json"])))["code"] == "model_not_found"
    wire.until(lambda: not wire.registry.leases)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_failure_of_one_before_the_first_byte_is_the_requests(wire: Wire, is_stream: bool) -> None:
    def script(request: GenerationRequest) -> list[Item]:
        if request.adapter.name == "json":
            return [AdapterUnavailable("json@1", AdapterRejected(RejectReason.BAD_SHAPE, "no"))]
        return [asyncio.Event(), finish(request, 1)]

    wire.engine.script = script
    response = wire.post(PATH, ask(adapters=["french", "json"], stream=is_stream))
    assert (response.status_code, error_of(response)["code"]) == (422, "adapter_rejected")
    assert all(each.is_aborted for each in wire.engine.streams)
    wire.until(lambda: not wire.registry.leases)


def test_a_failure_of_one_after_the_first_byte_ends_the_stream_with_an_error(wire: Wire) -> None:
    def script(request: GenerationRequest) -> list[Item]:
        if request.adapter.name == "json":
            return [delta("a"), NumericalError("NaN")]
        return [delta("b"), asyncio.Event(), finish(request, 1)]

    wire.engine.script = script
    assert stream(wire, adapters=["french", "json"])[-1]["error"]["code"] == "numerical_error"
    wire.until(lambda: not wire.registry.leases)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"adapters": ["french", "nope"]}, 404, "model_not_found", "adapters[1]"),
        ({"adapters": ["french"], "adapter": "french"}, 400, "adapter_conflict", "adapter"),
        ({"adapters": ["french"], "model": "json"}, 400, "adapter_conflict", "model"),
        ({"adapters": ["base"] * 17}, 400, "invalid_request", "adapters"),
        ({"adapters": ["base"] * 9, "n": 2}, 400, "invalid_request", "adapters"),
        ({"adapters": []}, 400, "invalid_request", "adapters"),
    ],
)
def test_what_is_refused(wire: Wire, fields: dict[str, object], status: int, code: str, param: str) -> None:
    error = error_of(response := wire.post(PATH, ask(**fields)))
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert wire.engine.requests == []


def test_completions_have_no_adapters(wire: Wire) -> None:
    response = wire.post("/v1/completions", {"prompt": "hi", "adapters": ["french"]})
    assert (response.status_code, error_of(response)["param"]) == (400, "adapters")


def test_the_header_stays_small_enough_for_a_proxy(wire: Wire) -> None:
    name = "org/" + "x" * 96
    wire.registry.versions[name] = [ref(name)]
    parts = [{"name": name, "weight": 0.123456789012345}, {"name": "json", "weight": -1}]
    response = wire.post(PATH, ask(adapters=[parts] * 16))
    header = response.headers["x-adapter"]
    assert (len(header), header[-3:]) == (MAX_ADAPTER_HEADER, "...")
    names = [choice["adapter"] for choice in response.json()["choices"]]
    assert names == [f"json@1*-1+{name}@1*0.123456789012345"] * 16
    assert ", ".join(names).startswith(header[:-3])
