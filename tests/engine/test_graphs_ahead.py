"""Recorded decodes that follow one another without the host: their inputs are the tokens of the step before, on the
device. Over a tape that keeps to a CUDA graph's rules, one layer with adapters, and a whole engine for the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from adapters.layer import detach
from adapters.ref import BASE, AdapterRef
from adapters.weights import AdapterWeights
from base.config import BaseConfig
from base.loader import load_base
from base.pocket import CHECKPOINT
from base.prompt import Message, TextPart
from engine.config import EngineConfig
from engine.decode_buffers import DecodeBuffers
from engine.graphs import DecodeGraphs
from engine.messages import Submit
from engine.ranking import NO_TOKEN
from engine.request import GenerationRequest
from engine.sampler import Sampler
from engine.sampling import SamplingParams
from engine.sequence import Sequence as Row
from engine.step import Chunk, StepPlan
from tests.support.decode_attention import PlainDecodeAttention
from tests.support.graph_stand import MAX_BLOCKS, NUM_SLOTS, Stand, shorten
from tests.support.stepping import Life, now, stepped
from tests.support.tape import Tape

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_ahead.py records for real")

PLAIN = PlainDecodeAttention(MAX_BLOCKS)


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    base = load_base(BaseConfig(source=str(CHECKPOINT), device="cpu", cpu_linear="float32"))
    shorten(base, PLAIN)
    stand = Stand(base, torch.float32)
    stand.record(Tape(), max_rows=4)
    for slot in range(NUM_SLOTS):
        stand.load(slot, slot + 1, rank=(4, 16, 1, 8, 32)[slot], is_dora=slot == 3)
    yield stand
    detach(base.module)


def graphs_of(stand: Stand) -> DecodeGraphs:
    graphs = stand.recorded._graphs
    assert isinstance(graphs, DecodeGraphs)
    return graphs


def follow(stand: Stand, rows: Sequence[Row]) -> StepPlan:
    """The step after the one that is under way."""
    for row in rows:
        stand._cover(row, row.num_tokens + 1)
    return StepPlan(tuple(Chunk(row, row.num_tokens, 1) for row in rows), ())


def start_all(stand: Stand, slots: Sequence[int]) -> list[Row]:
    return [stand.start(slot, num_prompt=2 + i, first_id=20 * i + 5) for i, slot in enumerate(slots)]


def eager_tokens(stand: Stand, rows: Sequence[Row], num: int) -> list[list[int]]:
    """Step by step, each told to the host; the rows are as before."""
    before = [list(row.output_ids) for row in rows]
    found = []
    for _ in range(num):
        ids = stand.eager.run(stand.plan(rows)).logits.argmax(-1).tolist()
        found.append(ids)
        for row, token_id in zip(rows, ids, strict=True):
            row.output_ids.append(token_id)
    for row, ids in zip(rows, before, strict=True):
        row.output_ids[:] = ids
    return found


MIXES: dict[str, Sequence[int]] = {
    "the base alone": [-1],
    "the base alone, padded": [-1, -1, -1],
    "two adapters and the base, padded": [1, -1, 0],
    "a DoRA beside others": [3, 2, 1, -1],
}


@pytest.mark.parametrize("slots", MIXES.values(), ids=MIXES.keys())
def test_steps_in_a_chain_choose_what_steps_one_by_one_choose(stand: Stand, slots: Sequence[int]) -> None:
    """Three launched before the second is read, as an engine does it."""
    graphs, rows = graphs_of(stand), start_all(stand, slots)
    expected = eager_tokens(stand, rows, 3)
    first = graphs.launch(stand.plan(rows), None, None)
    assert first is not None and not first.is_ahead
    second = graphs.launch(follow(stand, rows), first, None)
    assert second is not None and second.is_ahead
    assert first.wait() == expected[0]
    for row, token_id in zip(rows, expected[0], strict=True):
        row.output_ids.append(token_id)
    third = graphs.launch(follow(stand, rows), second, None)
    assert third is not None
    assert [second.wait(), third.wait()] == expected[1:]


def test_rows_that_end_leave_the_others_their_own_tokens(stand: Stand) -> None:
    """The rows of the next step are others: fewer, in a smaller recording, and elsewhere."""
    graphs, rows = graphs_of(stand), start_all(stand, [1, -1, 0])
    expected = eager_tokens(stand, rows, 2)
    first = graphs.launch(stand.plan(rows), None, None)
    assert first is not None
    second = graphs.launch(follow(stand, [rows[2], rows[1]]), first, None)
    assert second is not None
    assert second.wait() == [expected[1][2], expected[1][1]]


def test_drawn_tokens_are_the_next_inputs(stand: Stand) -> None:
    """What the sampler chooses on the device takes the place of the likeliest."""
    graphs, rows = graphs_of(stand), start_all(stand, [-1, -1])
    sampler = Sampler(stand.base.spec.vocab_size)
    params = SamplingParams(max_tokens=9, temperature=3.0, seed=3)
    for row in rows:
        row.sampler.params = params
    states = [row.sampler for row in rows]

    def choose(num_ahead: int) -> partial[torch.Tensor]:
        uniforms = [state.uniform(num_ahead) for state in states]
        return partial(sampler.choose, states=states, uniforms=uniforms)

    expected = []
    for number in range(2):
        ids = choose(number)(stand.eager.run(stand.plan(rows)).logits).tolist()
        expected.append(ids)
        for row, token_id in zip(rows, ids, strict=True):
            row.output_ids.append(token_id)
    for row in rows:
        del row.output_ids[-2:]
    first = graphs.launch(stand.plan(rows), None, choose(0))
    assert first is not None
    second = graphs.launch(follow(stand, rows), first, choose(1))
    assert second is not None
    assert [first.wait(), second.wait()] == expected
    assert expected != eager_tokens(stand, rows, 2)


def test_only_the_last_step_can_be_followed(stand: Stand) -> None:
    graphs, rows = graphs_of(stand), start_all(stand, [-1])
    first = graphs.launch(stand.plan(rows), None, None)
    graphs.run(stand.plan(rows))
    with pytest.raises(ValueError, match="only the one that was launched last"):
        graphs.launch(follow(stand, rows), first, None)


def test_an_input_that_was_not_fed_is_seen(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeBuffers, "_feed", lambda self, num_rows: None)
    with pytest.raises(AssertionError):
        test_steps_in_a_chain_choose_what_steps_one_by_one_choose(stand, [-1, -1, -1])


def test_rows_without_a_finite_logit_are_told_and_feed_something_harmless(stand: Stand) -> None:
    graphs, rows = graphs_of(stand), start_all(stand, [-1, -1])
    first = graphs.launch(stand.plan(rows), None, lambda logits: torch.tensor([NO_TOKEN, 17]))
    assert first is not None
    second = graphs.launch(follow(stand, rows), first, None)
    assert second is not None
    assert first.wait() == [NO_TOKEN, 17]
    rows[1].output_ids.append(17)
    assert second.wait()[1] == int(stand.eager.run(stand.plan(rows[1:])).logits.argmax())


# ---- a whole engine ------------------------------------------------------------------------------------------------

CONFIG = EngineConfig(num_slots=2, max_model_len=128, kv_bytes=4 << 20, max_running=4)


class NoAdapters:
    """A source that has none."""

    def load(self, ref: AdapterRef) -> AdapterWeights:
        raise AssertionError(ref)


def test_an_engine_over_recordings_is_the_same_ahead_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(BaseConfig(source=str(CHECKPOINT), device="cpu", cpu_linear="float32"))
    shorten(base, PLAIN)
    prompts = [
        base.processor.prepare_chat([Message("user", (TextPart(text),))])
        for text in ("Hello!", "Who are you?", "Thanks!")
    ]

    def submit(name: str, place: int, **params: object) -> Submit:
        settings = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **params}
        return Submit(
            GenerationRequest(name, prompts[place], BASE, SamplingParams(**settings), now())  # type: ignore[arg-type]
        )

    script = {
        0: [
            submit("a", 0),
            submit("b", 1, max_tokens=17),
            submit("c", 2, stop_token_ids=tuple(range(0, 1024, 9))),
        ],
        9: [submit("d", 1, temperature=2.0, seed=5)],
    }

    def live(config: EngineConfig) -> Life:
        with stepped(base, NoAdapters(), config) as made:
            return made.live(script)

    eager = live(CONFIG)
    assert eager.num_ahead == 0
    monkeypatch.setattr("engine.build.graph_attention", lambda base, config: PLAIN)
    monkeypatch.setattr("engine.build.CudaRecorder", lambda device: Tape())
    ahead, behind = live(CONFIG), live(replace(CONFIG, step_ahead="off"))
    assert ahead.messages == behind.messages == eager.messages
    assert ahead.events == behind.events
    assert ahead.num_ahead > 20
    assert ("Passed", "graph") in [event for _, event in ahead.events]
