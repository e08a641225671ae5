"""One step ahead: whatever comes and goes, every message and event is that of an engine that waits for each token.

The device is a stand-in that computes a step when its tokens are read, so that what is freed, overwritten or handed on
too early is seen (tests/support/late_device.py); planted faults show that it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.ahead import Surroundings
from engine.executor import Executor
from engine.holdings import Holdings
from engine.messages import Abort
from engine.runner import Runner, StepLogits
from engine.scheduler import Scheduler
from engine.sequence import Sequence as Row
from engine.sequence import WaitReason
from engine.step import StepPlan
from tests.support.late_device import LateDevice
from tests.support.lives import CONFIG, OFF, QUESTIONS, Bench, Params, Scripted, life_of_a_server, tokens_of
from tests.support.stepping import Life

KV_OF_SOME = 150_000
"""Bytes: less than four sequences' of 96 tokens."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("ahead"))
    yield bench
    bench.registry.close()


def check_same(found: Life, expected: Life) -> None:
    assert found.messages == expected.messages
    assert found.events == expected.events
    assert found.num_steps == expected.num_steps


# ---- equal, message by message and event by event -----------------------------------------------------------------


def test_greedy_rows_of_several_adapters_go_ahead_and_say_the_same(bench: Bench) -> None:
    script: Scripted = {
        0: [
            bench.submit("a", max_tokens=30),
            bench.submit("b", "Who are you?", "french", max_tokens=21),
            bench.submit("c", "Thanks!", "json", max_tokens=14),
        ]
    }
    found = bench.live(script)
    check_same(found, bench.live(script, OFF))
    assert found.num_ahead > 12  # all but the steps of prompts and of adapters that come
    assert found.num_dropped == 0  # an end by length is known beforehand


def test_a_row_that_ends_in_the_middle_is_dropped_and_seen_by_nobody(bench: Bench) -> None:
    plain_script: Scripted = {
        0: [bench.submit("a", max_tokens=30), bench.submit("b", "Thanks!", "french", max_tokens=30)]
    }
    whole = bench.live(plain_script, OFF)
    stop = tokens_of(whole, "b")[9]
    script: Scripted = {
        0: [
            bench.submit("a", max_tokens=30),
            bench.submit("b", "Thanks!", "french", max_tokens=30, stop_token_ids=(stop,)),
        ]
    }
    found = bench.live(script)
    check_same(found, bench.live(script, OFF))
    assert found.num_dropped == 1
    assert len(tokens_of(found, "b")) < 30
    assert tokens_of(found, "a") == tokens_of(whole, "a")


def test_a_lone_sequence_that_ends_leaves_nothing_behind(bench: Bench) -> None:
    stop = tokens_of(bench.live({0: [bench.submit("a", max_tokens=20)]}, OFF), "a")[6]
    script: Scripted = {0: [bench.submit("a", max_tokens=20, stop_token_ids=(stop,))]}
    found = bench.live(script)
    check_same(found, bench.live(script, OFF))
    assert found.num_dropped == 1


def test_drawn_tokens_go_ahead_too(bench: Bench) -> None:
    draws: tuple[Params, ...] = (
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
    )
    script: Scripted = {
        0: [
            bench.submit(f"r{i}", QUESTIONS[i], max_tokens=18, seed=i, **params)
            for i, params in enumerate(draws)
        ]
    }
    script[0].append(bench.submit("greedy", adapter="french", max_tokens=25))
    found = bench.live(script)
    check_same(found, bench.live(script, OFF))
    assert found.num_ahead > 14


SHAPES: dict[str, Params] = {
    "a bias": {"logit_bias": ((5, 3.0),)},
    "a penalty": {"repetition_penalty": 1.2},
    "log-probabilities": {"logprobs": 2},
    "top_p over all tokens": {"temperature": 1.0, "top_p": 0.9, "seed": 4},
}


@pytest.mark.parametrize("params", SHAPES.values(), ids=SHAPES.keys())
def test_rows_that_need_the_host_hold_the_step_until_they_are_gone(bench: Bench, params: Params) -> None:
    script: Scripted = {
        0: [bench.submit("plain", max_tokens=16), bench.submit("shaped", max_tokens=8, **params)]
    }
    found = bench.live(script)
    check_same(found, bench.live(script, OFF))
    assert (
        found.num_ahead == 16 - 8 - 1
    )  # neither beside it, nor from its last step, nor after the last token


def test_an_end_that_is_forbidden_holds_the_step_until_it_is_allowed(bench: Bench) -> None:
    script: Scripted = {0: [bench.submit("a", max_tokens=20, min_tokens=8, ignore_eos=False)]}
    found = bench.live(script)
    check_same(found, bench.live(script, OFF))


def test_the_life_of_a_server_is_the_same_step_by_step(bench: Bench) -> None:
    lives = []
    for seed in range(4):
        script = life_of_a_server(bench, seed)
        lives.append(bench.live(script))
        check_same(lives[-1], bench.live(script, OFF))
    assert sum(life.num_dropped for life in lives) >= 5
    kinds = [event[0] for life in lives for _, event in life.events]
    assert kinds.count("AdapterEvicted") >= 3
    assert sum(life.num_ahead for life in lives) > 60


@pytest.mark.parametrize("seed", [6])
def test_what_comes_between_two_steps_waits_a_step_and_changes_no_answer(bench: Bench, seed: int) -> None:
    """A message that comes after the next step was started: an abort is obeyed at once, a newcomer begins behind it."""
    script = life_of_a_server(bench, seed)
    found = bench.live(script, is_between=True).without_steps()
    expected = bench.live(script, OFF, is_between=True).without_steps()
    aborted = {m.request_id for messages in script.values() for m in messages if isinstance(m, Abort)}
    assert found.keys() == expected.keys()
    for name in expected:
        if name in aborted:  # it had one token more, or fewer, when the abort came
            shorter = min(len(found[name]), len(expected[name])) - 1
            assert abs(len(found[name]) - len(expected[name])) <= 2
            assert found[name][:shorter] == expected[name][:shorter]
        else:
            assert found[name] == expected[name]


def test_a_queue_for_few_places_gives_the_same_answers_and_is_no_reason_to_wait(bench: Bench) -> None:
    """Who gets a place that a stop token made free gets it a step later; one by length, at once."""
    few = replace(CONFIG, max_running=2)
    stop = tokens_of(bench.live({0: [bench.submit("r1", QUESTIONS[1], max_tokens=20)]}, OFF), "r1")[7]
    script: Scripted = {
        0: [
            bench.submit(f"r{i}", QUESTIONS[i], max_tokens=20, stop_token_ids=(stop,) if i == 1 else ())
            for i in range(5)
        ]
    }
    found, expected = bench.live(script, few), bench.live(script, replace(few, step_ahead="off"))
    assert found.without_steps() == expected.without_steps()
    assert found.num_dropped == 1
    assert found.num_steps == expected.num_steps + 1
    assert found.num_ahead > found.num_steps // 2


def test_a_cache_too_small_for_all_gives_the_same(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are preempted, and what would need others' blocks is not done ahead."""
    preempt, preempted = Scheduler._preempt, list[str]()

    def noted(self: Scheduler, sequence: Row, reason: WaitReason = WaitReason.BLOCKS) -> None:
        preempted.append(sequence.request_id)
        preempt(self, sequence, reason)

    monkeypatch.setattr(Scheduler, "_preempt", noted)
    small = replace(CONFIG, kv_bytes=KV_OF_SOME, max_model_len=96)
    script: Scripted = {0: [bench.submit(f"r{i}", QUESTIONS[i], max_tokens=40) for i in range(4)]}
    found = bench.live(script, small).without_steps()
    assert preempted
    assert found == bench.live(script, replace(small, step_ahead="off")).without_steps()


# ---- what fails ----------------------------------------------------------------------------------------------------


THREE = [("a", "Hello!", ""), ("b", "Who are you?", "french"), ("c", "Thanks!", "")]


def three(bench: Bench) -> Scripted:
    return {0: [bench.submit(*each, max_tokens=16) for each in THREE]}


@pytest.fixture(scope="module")
def quiet(bench: Bench) -> Life:
    """Of these three, on a day when nothing fails and nothing is ahead."""
    return bench.live(three(bench), OFF)


FAULTS = {"an error": RuntimeError("planted"), "no memory": torch.OutOfMemoryError("planted")}


@pytest.mark.parametrize("kind", ["faults", "refusals"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_step_that_fails_on_the_device_is_done_again_and_nothing_is_lost(
    bench: Bench, quiet: Life, kind: str, fault: Exception, number: int
) -> None:
    script = three(bench)
    found = bench.live(script, device={kind: {number: fault}})
    assert found.messages == quiet.messages
    retries = [event for _, event in found.events if event[0] == "StepRetried"]
    assert retries == ([("StepRetried", 0, type(fault).__name__)] if kind == "faults" else [])


def test_a_culprit_fails_alone_though_its_step_was_ahead(
    bench: Bench, quiet: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It throws on the device and when it is done again, at its eighth token."""
    run = Runner.run

    def throwing(self: Runner, plan: StepPlan) -> StepLogits:
        if any(
            c.sequence.request_id == "b" and c.start == c.sequence.num_prompt_tokens + 7 for c in plan.chunks
        ):
            raise RuntimeError("planted")
        return run(self, plan)

    expected = quiet.without_steps()
    monkeypatch.setattr(Runner, "run", throwing)
    found = bench.live(three(bench)).without_steps()
    assert found["a"] == expected["a"]
    assert found["c"] == expected["c"]
    assert found["b"][:-1] == expected["b"][: len(found["b"]) - 1]
    assert found["b"][-1][0] == "Failed"


def test_nan_on_the_device_fails_that_request_alone(
    bench: Bench, quiet: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runner.run

    def poisoned(self: Runner, plan: StepPlan) -> StepLogits:
        step = run(self, plan)
        for row, chunk in enumerate(plan.chunks):
            if chunk.sequence.request_id == "b" and chunk.start == chunk.sequence.num_prompt_tokens + 7:
                step.logits[row] = torch.nan
        return step

    expected = quiet.without_steps()
    monkeypatch.setattr(Runner, "run", poisoned)
    found = bench.live(three(bench))
    lives = found.without_steps()
    assert (lives["a"], lives["c"]) == (expected["a"], expected["c"])
    assert lives["b"][-1][0] == "Failed"
    assert found.num_dropped == 1


# ---- positive controls ---------------------------------------------------------------------------------------------


def stopping(bench: Bench) -> Scripted:
    """One of two stops in the middle, and a third that comes then takes its room."""
    whole = bench.live({0: [bench.submit("b", "Thanks!", "french", max_tokens=30)]}, OFF)
    stop = tokens_of(whole, "b")[9]
    return {
        0: [
            bench.submit("a", max_tokens=30),
            bench.submit("b", "Thanks!", "french", max_tokens=30, stop_token_ids=(stop,)),
        ]
    }


def test_blocks_and_slots_that_are_given_back_too_early_are_seen(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = stopping(bench)
    bench.live(script)
    monkeypatch.setattr(Holdings, "give_back_ended", Holdings.give_back)
    bench.live(script, is_sound=False)


def test_a_row_that_is_not_dropped_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    script = stopping(bench)
    expected = bench.live(script, OFF)
    monkeypatch.setattr(StepPlan, "only", lambda self, chunks: self)
    with pytest.raises((AssertionError, KeyError)):
        check_same(bench.live(script), expected)


def test_tokens_of_a_step_whose_inputs_failed_are_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step behind one that failed is kept: what it computed from is not what was done again."""
    script = three(bench)
    expected = bench.live(script, OFF).messages
    monkeypatch.setattr(Executor, "abandon", lambda self: None)
    monkeypatch.setattr(LateDevice, "_feed", _feed_what_failed)
    assert bench.live(script, device={"faults": {5: RuntimeError("planted")}}).messages != expected


def _feed_what_failed(self: LateDevice, this: object, before: object) -> None:
    before.fault, fault = None, before.fault  # type: ignore[attr-defined]
    _FEED(self, this, before)  # type: ignore[arg-type]
    if fault is not None:
        for snapshot in this.snapshots:  # type: ignore[attr-defined]
            snapshot.output_ids[-1] = 7


_FEED = LateDevice._feed


def test_going_ahead_past_an_abort_in_the_inbox_is_seen(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = life_of_a_server(bench, 1)
    expected = bench.live(script, OFF)
    monkeypatch.setattr(Surroundings, "is_quiet", property(lambda self: True))
    found = bench.live(script)
    assert (found.messages, found.events) != (expected.messages, expected.events)


def test_off_never_goes_ahead(bench: Bench) -> None:
    assert bench.live(three(bench), OFF).num_ahead == 0
