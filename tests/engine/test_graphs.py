"""Recorded decodes equal eager ones, over a tape that keeps to a CUDA graph's rules; planted staleness is seen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from adapters.layer import detach
from adapters.routing import Routing
from base.attention import PlanTensors
from base.config import BaseConfig
from base.loader import load_base
from engine.build import graph_attention, graph_buffers
from engine.config import EngineConfig
from engine.graph_memory import graph_bytes
from engine.graphs import BUCKETS, DecodeGraphs, buckets_up_to
from engine.runner import StepLogits
from engine.sequence import BASE_SLOT
from engine.step import Chunk, StepPlan
from tests.support.checkpoints import make_checkpoint
from tests.support.decode_attention import PlainDecodeAttention
from tests.support.graph_stand import BLOCK, MAX_BLOCKS, MAX_ROWS, NUM_SLOTS, Stand, shorten
from tests.support.requests import make_image
from tests.support.tape import Tape

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_graphs.py records for real")

PLAIN = PlainDecodeAttention(MAX_BLOCKS)


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """Over a random base that is small, since the interpreter runs its linears' tiles one by one."""
    folder = make_checkpoint(tmp_path_factory.mktemp("graphs"), hidden=128, mlp=192, layers=1)
    base = load_base(BaseConfig(source=str(folder), device="cpu", cpu_linear="float32"))
    shorten(base, PLAIN)
    stand = Stand(base, torch.float32)
    stand.record(Tape())  # before any adapter is there, as an engine does
    for slot in range(NUM_SLOTS):
        stand.load(slot, slot + 1, rank=(4, 16, 1, 8, 32)[slot], is_dora=slot == 3)
    yield stand
    detach(base.module)


def is_same(expected: Tensor, found: StepLogits) -> bool:
    assert found.way == "graph"
    return torch.equal(expected, found.logits)


MIXES: dict[str, Sequence[int]] = {
    "the base alone, one row": [-1],
    "the base alone, padded": [-1, -1, -1],
    "one adapter": [0],
    "one adapter in every row": [1, 1, 1, 1],
    "two adapters": [1, 0],
    "two adapters and the base, padded": [1, -1, 0],
    "a DoRA beside a plain one": [3, 2],
    "the most adapters, and the base": [4, 3, 2, 1, 0, -1, 0],
}


@pytest.mark.parametrize("slots", MIXES.values(), ids=MIXES.keys())
def test_a_replay_equals_the_eager_step_to_the_bit(stand: Stand, slots: Sequence[int]) -> None:
    rows = [stand.start(slot, num_prompt=2 + i, first_id=20 * i + 5) for i, slot in enumerate(slots)]
    for _ in range(2):
        assert is_same(*stand.step(rows))
    for row in rows:
        stand.end(row)


def test_replays_follow_contexts_blocks_rows_and_swaps(stand: Stand) -> None:
    """One recording each, whatever came between: what is stale anywhere is seen here."""
    rows = [stand.start(slot, num_prompt=3, first_id=9 * i + 2) for i, slot in enumerate([0, 1, -1])]
    for _ in range(BLOCK + 1):  # into blocks that no table had
        assert is_same(*stand.step(rows))
    stand.move(rows[0])  # as one that was preempted
    assert is_same(*stand.step(rows))
    stand.load(0, 30, rank=16)  # another adapter in the slot, of another rank
    assert is_same(*stand.step(rows))
    stand.load(1, 31, rank=2, is_dora=True)
    assert is_same(*stand.step(rows))
    rows = [rows[2], rows[0]]  # one left, the others in another order
    assert is_same(*stand.step(rows))
    rows.append(stand.start(4, num_prompt=6, first_id=70))  # an eager step in between
    assert is_same(*stand.step(rows))
    assert is_same(*stand.step(rows[:1]))  # the base's, in a recording without adapters
    stand.bank.clear(0)
    stand.load(0, 32)
    assert is_same(*stand.step(rows))
    for row in rows:
        stand.end(row)


def test_rows_beside_it_and_the_bucket_change_nothing_in_a_row(stand: Stand) -> None:
    rows = [stand.start(slot, num_prompt=4, first_id=11 * i + 3) for i, slot in enumerate([0, 2, 1, -1, 3])]
    together = stand.recorded.run(stand.plan(rows)).logits.clone()
    for place, row in enumerate(rows):
        alone = stand.recorded.run(stand.plan([row]))
        assert alone.way == "graph"
        assert torch.equal(alone.logits[0], together[place])


def test_the_last_token_of_a_cached_prompt_is_a_decode_too(stand: Stand) -> None:
    row = stand.start(1, num_prompt=6)
    row.output_ids.clear()
    row.num_computed = 5
    assert is_same(*stand.step([row]))


def test_logits_that_somebody_keeps_are_not_overwritten(stand: Stand) -> None:
    kept = stand.start(0, first_id=13)
    kept.request = replace(kept.request, on_logits=lambda logits: None)
    logits = stand.recorded.run(stand.plan([kept])).logits
    before = logits.clone()
    stand.step([stand.start(1, first_id=40)])
    assert torch.equal(logits, before)


# ---- positive controls --------------------------------------------------------------------------------------------


@pytest.fixture
def restored(stand: Stand) -> Iterator[Stand]:
    """Recorded anew afterwards."""
    before = stand.recorded._graphs
    yield stand
    assert before is not None
    stand.recorded.replay_with(before)


def steps_that_agree(stand: Stand, slots: Sequence[int]) -> int:
    """Of four."""
    rows = [stand.start(slot, num_prompt=5, first_id=30 * i + 4) for i, slot in enumerate(slots)]
    return sum(is_same(*stand.step(rows)) for _ in range(4))


def lengths_of_the_recording(tensors: PlanTensors) -> Callable[[], Tensor]:
    """What Python knew when the step began."""
    lengths = tensors.context_lens.clone()
    return lambda: lengths


def test_a_length_that_stayed_is_seen(restored: Stand) -> None:
    assert steps_that_agree(restored, [-1, -1]) == 4
    restored.record(Tape(), PlainDecodeAttention(MAX_BLOCKS, lengths_of_the_recording), max_rows=2)
    assert steps_that_agree(restored, [-1, -1]) == 0


def test_adapters_left_out_of_the_recording_are_seen(
    restored: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded over rows of the base as if no other could come."""
    fill = Routing.fill
    monkeypatch.setattr(Routing, "fill", lambda self, segments, *, is_open=False: fill(self, segments))
    restored.record(Tape(), max_rows=2)
    assert steps_that_agree(restored, [-1, -1]) == 4
    assert steps_that_agree(restored, [0, 1]) == 0


def test_tile_tables_that_nobody_refilled_are_seen(restored: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    restored.record(Tape(), max_rows=2)
    monkeypatch.setattr(
        "engine.graphs.DecodeGraphs._route", lambda self, slots, *, is_open=False: None
    )  # a replay then finds what the eager step before it left, of the other order
    rows = [restored.start(slot, num_prompt=5, first_id=30 * i + 4) for i, slot in enumerate([0, 1])]
    restored.eager.run(restored.plan([rows[1], rows[0]]))
    plan = restored.plan(rows)
    found = restored.recorded.run(plan).logits.clone()
    assert not torch.equal(found, restored.eager.run(plan).logits)


def test_what_a_recording_may_not_do_is_refused(restored: Stand, caplog: pytest.LogCaptureFixture) -> None:
    """A look at a tensor's value fails on the tape as on a device, and the step is then eager."""

    def look(tensors: PlanTensors) -> Callable[[], Tensor]:
        return lambda: tensors.context_lens[: int(tensors.context_lens.max()) and None]

    with caplog.at_level(logging.WARNING, "lorikeet.engine"):
        restored.record(Tape(), PlainDecodeAttention(MAX_BLOCKS, look), max_rows=1)
    assert caplog.text.count("graphs.not_recorded rows=1") == 2
    assert "not permitted while a graph is recorded" in caplog.text
    _, found = restored.step([restored.start(0)])
    assert found.way == "eager"


# ---- what is recorded, and what is not ----------------------------------------------------------------------------


class Refusing(Tape):
    """Has no memory for the ``failing``-th recordings."""

    def __init__(self, *failing: int) -> None:
        super().__init__()
        self._failing = failing
        self._num_asked = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self._num_asked += 1
        if self._num_asked in self._failing:
            raise torch.OutOfMemoryError("no memory")
        return super().record(work)


def test_a_bucket_that_cannot_be_recorded_is_eager_and_the_others_are_not(
    restored: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lorikeet.engine"):
        restored.record(Refusing(1, 2), max_rows=4)  # the largest, with and without adapters
    assert "graphs.not_recorded rows=4 adapters=True error=OutOfMemoryError" in caplog.text
    rows = [restored.start(-1, first_id=5 + i) for i in range(3)]
    expected, found = restored.step(rows)
    assert found.way == "eager"
    assert torch.equal(expected, found.logits)
    assert is_same(*restored.step(rows[:2]))


def test_adapters_without_device_tables_are_never_replayed(
    restored: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restored, "lora", None)
    tape = Tape()
    restored.record(tape, max_rows=2)
    assert tape.num_recorded == 2
    assert is_same(*restored.step([restored.start(-1)]))
    expected, found = restored.step([restored.start(0)])
    assert found.way == "eager"
    assert torch.equal(expected, found.logits)


def test_the_largest_is_recorded_first(stand: Stand) -> None:
    graphs = stand.recorded._graphs
    assert isinstance(graphs, DecodeGraphs)
    assert graphs.recorded == tuple((rows, has) for rows in (8, 4, 2, 1) for has in (True, False))


def test_steps_that_do_not_fit_are_left_alone(stand: Stand) -> None:
    graphs = stand.recorded._graphs
    assert graphs is not None
    row = stand.start(-1, num_prompt=6)
    fits = stand.plan([row])
    assert graphs.run(fits) is not None
    prompt = make_image("a", 2, 2)
    pictured = stand.start(-1, num_prompt=6)
    pictured.request = replace(pictured.request, prompt=replace(pictured.request.prompt, images=(prompt,)))
    scored = stand.start(-1, num_prompt=6)
    scored.request = replace(scored.request, prompt_logprobs=1)
    long = stand.start(-1, num_prompt=6)
    long.output_ids = [1] * (MAX_BLOCKS * BLOCK)
    plans = {
        "a prompt": StepPlan((Chunk(row, 0, 6),), ()),
        "a token in the middle": StepPlan((Chunk(row, 3, 1),), ()),
        "a token of an image": StepPlan((Chunk(pictured, 3, 1),), ()),
        "a scored token": StepPlan((Chunk(scored, 5, 1),), ()),
        "a longer sequence": stand.plan([long]),
        "more rows": stand.plan([row] * (MAX_ROWS + 1)),
        "decodes beside a prompt": StepPlan((*fits.chunks, Chunk(pictured, 0, 6)), ()),
    }
    assert [name for name, plan in plans.items() if graphs.run(plan) is not None] == []


def test_a_row_that_is_routed_to_an_empty_slot_is_refused(stand: Stand) -> None:
    row = stand.start(BASE_SLOT)
    row.slot = 2
    stand.bank.clear(2)
    with pytest.raises(ValueError, match="slot 2, which holds no adapter"):
        stand.recorded.run(stand.plan([row]))
    stand.load(2, 3)


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_a_cpu_records_nothing(stand: Stand, choice: Literal["auto", "off"]) -> None:
    assert graph_attention(stand.base, EngineConfig(cuda_graphs=choice)) is None


def test_graphs_that_must_be_and_cannot_are_a_refusal(stand: Stand) -> None:
    with pytest.raises(
        ValueError, match="cuda_graphs is on, and PlainDecodeAttention on cpu cannot be recorded"
    ):
        graph_attention(stand.base, EngineConfig(cuda_graphs="on"))


def test_the_memory_plan_counts_the_buffers(stand: Stand) -> None:
    config = EngineConfig(max_running=30, max_model_len=4096)
    buffers = graph_buffers(stand.base, config, 4096, 0)
    assert buffers.num_rows == 32
    rows = buffers.rows(32)
    least = rows.logits.nbytes + rows.tensors.block_table.nbytes
    assert least < graph_bytes(config, stand.base.spec, stand.sites, 2) < least + (256 << 20)
    fewer = graph_bytes(replace(config, max_running=1), stand.base.spec, stand.sites, 2)
    assert fewer < graph_bytes(config, stand.base.spec, stand.sites, 2)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 33, 64, 65, 128, 500])
def test_buckets_reach_the_most_rows_and_no_further(most: int) -> None:
    found = buckets_up_to(most)
    assert found == BUCKETS[: len(found)]
    assert found[-1] >= min(most, BUCKETS[-1])
    assert len(found) == 1 or found[-2] < most
