"""The peers' proof: two lengths of answers, a claim for each rival of each, and never the same prompt in both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.cells import Server
from bench.draws import Lengths
from bench.endpoint import Endpoint, Naming
from bench.proofs.bed import Bed
from bench.proofs.peers import ALONE, AMONG_MANY, LLAMA_FACTOR, Contest, _held, claim_name
from bench.workloads import make_trace, workload_named
from tests.bench.fake_sse import fake_sse_server

NAMES = tuple(f"adapter-{number}" for number in range(16))


@pytest.mark.parametrize("contests", [ALONE, AMONG_MANY], ids=["alone", "among many"])
def test_short_and_long_answers_are_held_against_workers_that_are_there(
    contests: tuple[Contest, ...],
) -> None:
    short, long = contests
    started = {(rival.kind, rival.weights): rival.factor for rival in short.rivals}
    for rival in long.rivals:
        assert started[rival.kind, rival.weights] == rival.factor  # the same promise at both lengths
    for contest, length in ((short, 12), (long, 96)):
        trace = make_trace(contest.workload, "prove")
        assert {call.num_tokens for call in trace.calls} == {length}
        assert f"answers of {length} tokens" in claim_name(contest.workload)


@pytest.mark.parametrize("contests", [ALONE, AMONG_MANY], ids=["alone", "among many"])
def test_no_prompt_of_the_short_ones_comes_again_in_the_long_ones(contests: tuple[Contest, ...]) -> None:
    """A server that keeps prefixes would otherwise find the second contest's prompts in its cache."""
    short, long = (
        {call.prompt for seed in range(5) for call in make_trace(each.workload, "prove", seed=seed).calls}
        for each in contests
    )
    assert not short & long


def test_every_target_has_a_claim_with_its_own_factor(tmp_path: Path) -> None:
    contest = Contest(workload_named("distinct-16-of-96"), ())
    bed = Bed(tmp_path, "tiny", 2, lambda _: None)
    with fake_sse_server() as (url, _), fake_sse_server() as (second, _):
        ours = Server(Endpoint(url, "pocket", adapters=NAMES))
        llama = Server(Endpoint(second, "m", Naming.LLAMA, NAMES, is_plain=True, label="llama"))
        other = Server(Endpoint(second, "m", Naming.MODEL, NAMES, label="vllm"))
        proof = _held(bed, contest, [ours, llama, other], (llama, other))
    found = {claim.name: claim.target for claim in proof.claims}
    start = "16 streams over 16 adapters, answers of 96 tokens: to"
    assert found == {f"{start} llama": LLAMA_FACTOR, f"{start} vllm": None}
    assert [len(claim.values) for claim in proof.claims] == [2, 2] and len(proof.cells) == 3


def test_answers_of_several_lengths_have_no_name() -> None:
    with pytest.raises(ValueError, match="no one length"):
        claim_name(workload_named("distinct-16"))
    with pytest.raises(ValueError, match="no one length"):
        claim_name(replace(workload_named("distinct-16"), output=Lengths(8, 12)))
