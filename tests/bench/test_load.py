"""The load: what it sends, what it measures, and which streams it does not count. Over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from bench.endpoint import Endpoint, Naming
from bench.load import Load
from bench.streamed import Streamed
from bench.trace import Call, Picture, Trace
from tests.bench.fake_sse import Script, fake_sse_server


@pytest.fixture
def server() -> Iterator[tuple[Endpoint, Script]]:
    with fake_sse_server() as (url, script):
        yield Endpoint(url, "pocket", adapters=("french", "patterns")), script


def trace(num_calls: int, num_streams: int | None = 2, num_tokens: int = 3) -> Trace:
    calls = tuple(
        Call(index, "the words", num_tokens, index % 2, at_s=0.05 * index) for index in range(num_calls)
    )
    return Trace("planned", "smoke", calls, num_streams)


def test_first_token_and_gaps_are_what_the_server_took(server: tuple[Endpoint, Script]) -> None:
    endpoint, script = server
    script.first_s, script.gap_s = 0.08, 0.03
    (streamed,) = Load(endpoint).send(trace(1, 1)).streams
    assert streamed.failure is None
    assert 0.08 <= streamed.first_token_s < 0.6
    assert len(streamed.gaps_s) == 2 and all(0.02 <= gap < 0.5 for gap in streamed.gaps_s)
    assert streamed.per_token_s == pytest.approx(sum(streamed.gaps_s) / 2)
    assert streamed.total_s >= streamed.first_token_s + sum(streamed.gaps_s)
    assert (streamed.num_prompt_tokens, streamed.num_cached_tokens, streamed.num_output_tokens) == (7, 3, 3)


def test_a_closed_loop_keeps_its_streams_busy_and_no_more(server: tuple[Endpoint, Script]) -> None:
    endpoint, script = server
    script.gap_s = 0.02
    heard: list[Streamed] = []
    run = Load(endpoint, heard.append).send(trace(9, 3))
    assert [streamed.index for streamed in run.streams] == list(range(9))
    assert script.most_at_once == 3
    assert len(heard) == 9


def test_an_open_loop_sends_by_the_clock_whatever_is_under_way(server: tuple[Endpoint, Script]) -> None:
    endpoint, script = server
    script.first_s = 0.3
    run = Load(endpoint).send(trace(4, None))
    begin_s = run.streams[0].sent_s
    for streamed in run.streams:
        assert streamed.sent_s - begin_s >= 0.05 * streamed.index - 0.02
        assert streamed.due_s is not None and streamed.sent_s >= streamed.due_s
    assert script.most_at_once > 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("status", "429"),
        ("error", "broke"),
        ("cut", "without [DONE]"),
        ("short", "2 tokens came of 3"),
        ("unfinished", "0 of 1 choices"),
        ("silent", "no content"),
    ],
)
def test_a_stream_that_is_not_whole_says_why(server: tuple[Endpoint, Script], fault: str, words: str) -> None:
    endpoint, script = server
    script.fault = fault
    (streamed,) = Load(endpoint).send(trace(1)).streams
    assert streamed.failure is not None and words in streamed.failure


def test_a_server_that_only_knows_openai_s_fields_may_answer_shorter(server: tuple[Endpoint, Script]) -> None:
    endpoint, script = server
    script.fault = "short"
    (streamed,) = Load(replace(endpoint, is_plain=True)).send(trace(1)).streams
    assert streamed.failure is None
    assert "ignore_eos" not in script.bodies[0]


def test_a_server_that_does_not_answer_is_a_failure_of_the_call() -> None:
    endpoint = Endpoint("http://127.0.0.1:9", "pocket", adapters=("a", "b"), timeout_s=5)
    (streamed,) = Load(endpoint).send(trace(1)).streams
    assert streamed.failure is not None and "Connect" in streamed.failure


def test_equal_answers_have_equal_hashes_and_others_not(server: tuple[Endpoint, Script]) -> None:
    endpoint, _ = server
    hashes = [streamed.text_sha256 for streamed in Load(endpoint).send(trace(4)).streams]
    assert hashes[0] == hashes[2] != hashes[1] == hashes[3]


@pytest.mark.parametrize(
    ("naming", "fields"),
    [
        (Naming.MODEL, {"model": "patterns"}),
        (Naming.ADAPTER, {"model": "pocket", "adapter": "patterns"}),
        (Naming.LORA_PATH, {"model": "pocket", "lora_path": "patterns"}),
        (Naming.ADAPTER_ID, {"model": "pocket", "adapter_id": "patterns"}),
        (Naming.COLON, {"model": "pocket:patterns"}),
        (Naming.LLAMA, {"model": "pocket", "lora": [{"id": 1, "scale": 1.0}]}),
        (Naming.NONE, {"model": "pocket"}),
    ],
)
def test_each_kind_of_server_hears_the_adapter_s_name_where_it_looks(
    naming: Naming, fields: dict[str, object]
) -> None:
    endpoint = Endpoint("http://host", "pocket", naming, ("french", "patterns"))
    body = endpoint.body(Call(0, "x", 4, 1))
    assert {key: body.get(key) for key in ("model", "adapter", "lora_path", "adapter_id", "lora")} == {
        "model": None, "adapter": None, "lora_path": None, "adapter_id": None, "lora": None
    } | fields  # fmt: skip


def test_a_fan_out_names_all_and_a_server_without_it_is_not_asked() -> None:
    endpoint = Endpoint("http://host", "pocket", adapters=("a", "b", "c"))
    call = Call(0, "x", 4, 1, fan_out=2, picture=Picture(56, 56, 1))
    assert endpoint.body(call)["adapters"] == ["b", "c"]
    with pytest.raises(ValueError, match="several adapters"):
        replace(endpoint, naming=Naming.MODEL).body(call)


def test_a_workload_that_needs_more_adapters_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 2 adapters and lorikeet has 1"):
        Load(Endpoint("http://host", "pocket", adapters=("one",))).send(trace(2))
