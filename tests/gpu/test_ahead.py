"""On a CUDA device: an engine that goes one step ahead says what one that does not says. Skipped where there is none.

Scripts put their messages into the inbox in fixed steps, so that both make the same plans and run the same kernels.
Where a row is dropped, its neighbours have been computed in one bucket more than they would have been; from there on
they may round otherwise, and their tokens are compared up to there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.ranking import NO_TOKEN, write_best
from engine.readback import RING, Readback
from engine.sampler import Sampler, SamplerState, sampled
from engine.sampling import SamplingParams
from tests.support.lives import CONFIG, Bench, Scripted, tokens_of
from tests.support.stepping import Life

pytestmark = pytest.mark.gpu

ON = replace(CONFIG, cuda_graphs="on", kv_bytes=16 << 20)
OFF = replace(ON, step_ahead="off")
QWEN_VOCAB = 151936


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("ahead"), device="cuda")
    yield bench
    bench.registry.close()


def check_same(found: Life, expected: Life) -> None:
    assert found.messages == expected.messages
    assert found.events == expected.events
    assert ("Passed", "graph") in [event for _, event in found.events]


def test_rows_that_end_by_length_are_the_same_to_the_last_event(bench: Bench) -> None:
    """Base and adapters, greedy and drawn, and a newcomer."""
    script: Scripted = {
        0: [
            bench.submit("a", max_tokens=40),
            bench.submit("b", "Who are you?", "french", max_tokens=29),
            bench.submit("c", "Thanks!", "json", max_tokens=23),
        ],
        12: [bench.submit("d", "Count to ten, please.", max_tokens=18, temperature=1.0, seed=7)],
    }
    found = bench.live(script, ON)
    check_same(found, bench.live(script, OFF))
    assert found.num_ahead > 15
    assert found.num_dropped == 0


def test_a_lone_row_that_stops_is_dropped_and_seen_by_nobody(bench: Bench) -> None:
    stop = tokens_of(bench.live({0: [bench.submit("a", max_tokens=20)]}, OFF), "a")[6]
    script: Scripted = {0: [bench.submit("a", max_tokens=20, stop_token_ids=(stop,))]}
    found = bench.live(script, ON)
    check_same(found, bench.live(script, OFF))
    assert found.num_dropped == 1


def test_a_neighbour_that_stops_changes_nothing_before_it_is_gone(bench: Bench) -> None:
    whole: Scripted = {
        0: [bench.submit("a", max_tokens=30), bench.submit("b", "Thanks!", "french", max_tokens=30)]
    }
    stop = tokens_of(bench.live(whole, OFF), "b")[9]
    script: Scripted = {
        0: [whole[0][0], bench.submit("b", "Thanks!", "french", max_tokens=30, stop_token_ids=(stop,))]
    }
    found, expected = bench.live(script, ON), bench.live(script, OFF)
    assert found.of("b") == expected.of("b")
    last = max(step for step, told in expected.messages if told[1] == "b")
    assert [each for each in found.messages if each[0] <= last] == [
        each for each in expected.messages if each[0] <= last
    ]
    assert len(tokens_of(found, "a")) == 30


def test_tokens_are_their_own_steps_though_the_next_overwrites_them() -> None:
    device = torch.device("cuda")
    readback, ids = Readback(64, device), torch.zeros(64, dtype=torch.int64, device=device)
    busy = torch.randn(4096, 4096, device=device)
    for turn in range(4 * RING):
        waits = []
        for number in range(RING - 1):
            for _ in range(8):
                busy = (busy @ busy).tanh()
            ids.fill_(10 * turn + number)
            waits.append(readback.send(ids[: 8 + number]))
        assert [wait() for wait in waits] == [[10 * turn + n] * (8 + n) for n in range(RING - 1)]


def test_the_likeliest_of_a_large_vocabulary_is_the_samplers_in_ties_too() -> None:
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    generator = torch.Generator().manual_seed(0)
    for num_rows in (1, 2, 7, 64):
        rows = torch.randint(
            0, 200, (num_rows, QWEN_VOCAB), generator=generator
        ).float()  # hundreds share the largest
        rows[0, [5, QWEN_VOCAB - 1]] = 1000.0
        if num_rows > 2:
            rows[1, 77], rows[2] = torch.nan, -torch.inf
        found = torch.empty(num_rows, dtype=torch.int64, device="cuda")
        write_best(found, rows.cuda())
        states = [SamplerState(greedy, (1,), (2,), QWEN_VOCAB) for _ in rows]
        by_sampler = Sampler(QWEN_VOCAB).sample(rows.cuda(), states)
        assert [sampled(token_id) for token_id in found.tolist()] == by_sampler
        assert by_sampler == Sampler(QWEN_VOCAB).sample(rows, states)  # the first of equals, as on a CPU
        assert found[0] == 5
        assert (found == NO_TOKEN).sum() == (2 if num_rows > 2 else 0)
