"""Peers: transformers and PEFT on the checkpoint that we serve, the same calls, every way of theirs, same answers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from bench.load import Run
from bench.measure import parity
from bench.peer_worker import Worker
from bench.peers import PeerFailed, PeerKind, PeerSetup, PeerWeights, peer, run_from_json, trace_from_json
from bench.running import peer_setups
from bench.shape_adapters import make_adapters
from bench.shapes import SHAPES, make_checkpoint
from bench.trace import Picture, Trace
from bench.workloads import make_trace, workload_named


@pytest.fixture(scope="module")
def trace() -> Trace:
    found = make_trace(workload_named("closed-8"), "smoke", num_calls=4)
    calls = [replace(call, adapter=[0, 1, 0, None][call.index]) for call in found.calls]
    return replace(found.with_calls(calls), num_streams=2)


@dataclass(frozen=True, slots=True)
class Made:
    checkpoint: Path
    root: Path
    names: tuple[str, ...]

    def worker(self, kind: PeerKind, weights: PeerWeights = PeerWeights.SHIPPED) -> Worker:
        """One in this process: to start another takes seconds."""
        return Worker(kind, self.checkpoint, self.root, "cpu", self.names, weights)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("peers")
    checkpoint = make_checkpoint(SHAPES["tiny"], folder / "tiny")
    return Made(checkpoint, folder / "adapters", make_adapters(checkpoint, folder / "adapters", 2))


@pytest.fixture(scope="module")
def runs(made: Made, trace: Trace) -> dict[PeerKind, Run]:
    kinds = (PeerKind.SET_ADAPTER, PeerKind.ADAPTER_NAMES, PeerKind.MERGE)
    return {kind: made.worker(kind).run(trace) for kind in kinds}


def test_every_call_is_whole_and_timed(runs: dict[PeerKind, Run], trace: Trace) -> None:
    for run in runs.values():
        assert [streamed.failure for streamed in run.streams] == [None] * 4
        for streamed, call in zip(run.streams, trace.calls, strict=True):
            assert len(streamed.token_times) == streamed.num_output_tokens == call.num_tokens
            assert streamed.sent_s <= streamed.token_times[0] <= streamed.end_s


def test_a_serial_peer_lets_the_second_stream_wait_and_a_batch_answers_both_at_once(
    runs: dict[PeerKind, Run],
) -> None:
    serial = runs[PeerKind.SET_ADAPTER].streams
    assert serial[0].sent_s == serial[1].sent_s and serial[1].token_times[0] > serial[0].end_s
    assert serial[2].sent_s == serial[0].end_s  # its stream was free then
    batch = runs[PeerKind.ADAPTER_NAMES].streams
    assert batch[0].token_times[0] == batch[1].token_times[0]


def test_both_ways_say_the_same_and_adapters_speak_for_themselves(runs: dict[PeerKind, Run]) -> None:
    assert (
        parity(runs[PeerKind.SET_ADAPTER], runs[PeerKind.ADAPTER_NAMES]).num_equal >= 3
    )  # padding rounds otherwise: one near tie may differ
    hashes = [streamed.text_sha256 for streamed in runs[PeerKind.SET_ADAPTER].streams]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("weights", [PeerWeights.BF16, PeerWeights.FP32])
def test_dequantised_weights_say_the_same(
    made: Made, trace: Trace, runs: dict[PeerKind, Run], weights: PeerWeights
) -> None:
    run = made.worker(PeerKind.SET_ADAPTER, weights).run(trace)
    assert [streamed.failure for streamed in run.streams] == [None] * 4
    found = parity(runs[PeerKind.SET_ADAPTER], run)
    # PEFT rounds an adapter's sum otherwise over plain linears, and near ties of random weights may differ
    assert found.num_equal >= 2
    if weights is PeerWeights.BF16:  # on the base it is the unpacked path's own arithmetic
        assert 3 not in found.differing


def test_a_worker_of_its_own_answers_and_what_it_cannot_do_does_not_end_it(
    made: Made, trace: Trace, tmp_path: Path
) -> None:
    plain = trace.with_calls([replace(call, adapter=None) for call in trace.calls[:2]])
    pictured = trace.with_calls([replace(trace.calls[0], picture=Picture(56, 56, 0))])
    with peer(PeerSetup(PeerKind.GENERATE, made.checkpoint, device="cpu"), tmp_path / "log") as each:
        with pytest.raises(PeerFailed, match="text alone"):
            each.send(pictured)
        assert [streamed.failure for streamed in each.send(plain).streams] == [None, None]
        assert "torch" in str(each.about()["versions"]) and int(str(each.about()["peak_bytes"])) > 2**20


def test_a_peer_that_cannot_load_says_so(tmp_path: Path) -> None:
    setup = PeerSetup(PeerKind.GENERATE, tmp_path / "nowhere")
    with pytest.raises(PeerFailed, match="nowhere"), peer(setup, tmp_path / "log"):
        pass


def test_traces_and_runs_survive_the_way_to_a_worker(trace: Trace, runs: dict[PeerKind, Run]) -> None:
    pictured = make_trace(workload_named("pictures"), "smoke")
    assert trace_from_json(json.loads(json.dumps(asdict(pictured)))) == pictured
    run = runs[PeerKind.SET_ADAPTER]
    assert run_from_json(json.loads(json.dumps(asdict(run)))) == run


def test_workers_have_weights_for_all_or_for_each(made: Made) -> None:
    kinds = (PeerKind.GENERATE, PeerKind.ADAPTER_NAMES)

    def weights(*words: str) -> list[str]:
        found = peer_setups(kinds, words, made.checkpoint, made.root, made.names, ["closed-8"])
        return [str(setup.weights) for setup in found]

    assert weights("nf4") == ["nf4", "nf4"]
    assert weights("bf16", "fp32") == ["bf16", "fp32"]
    for words in (("nf4", "nf4", "nf4"), ("int8", "nf4")):
        with pytest.raises(ValueError, match=r"workers|int8"):
            weights(*words)
