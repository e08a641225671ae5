"""What goes wrong for one request stays with it: its neighbours' tokens are those of a quiet day, and nothing leaks."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from adapters.errors import AdapterNotLoaded
from base.pocket import CHECKPOINT
from engine.config import EngineConfig
from engine.errors import (
    AdapterUnavailable,
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    EngineDown,
    EngineError,
    NumericalError,
    QueueFull,
    StepFailed,
)
from engine.observer import ImageLookup, ImagesEncoded
from engine.runner import Runner, StepLogits
from engine.scheduler import Scheduler
from engine.step import StepPlan
from engine.stream import Delta
from tests.support.oracle import load_stock
from tests.support.packages import peft_adapter
from tests.support.scenes import scene
from tests.support.serving import Answer, Ask, Rig, gather
from tests.support.zoo import LANGUAGE

ASKS = [Ask("Hello!"), Ask("Describe the picture.", None, (scene(),)), Ask("Who are you?"), Ask("Thanks!")]
CULPRIT = 2


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    config = EngineConfig(max_waiting=6, max_waiting_tokens=600, max_model_len=256, kv_bytes=4 << 20)
    made = Rig(str(CHECKPOINT), tmp_path_factory.mktemp("failures"), config)
    yield made
    made.close()


@pytest.fixture(scope="module")
def quiet(rig: Rig) -> list[Answer]:
    return asyncio.run(rig.alone(ASKS))


def settle(rig: Rig) -> None:
    """Wait until the engine holds nothing, and check that it does not."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        status = rig.engine.status()
        if status.kv_blocks_used == 0 and not status.running and not status.waiting:
            return
        time.sleep(0.01)
    raise AssertionError(f"the engine still holds something: {rig.engine.status()}")


async def outcomes(rig: Rig, asks: list[Ask]) -> list[Answer | EngineError]:
    async def one(ask: Ask) -> Answer | EngineError:
        try:
            return await gather(rig.submit(ask))
        except EngineError as error:
            return error

    return list(await asyncio.gather(*(one(ask) for ask in asks)))


def check_neighbours(rig: Rig, got: list[Answer | EngineError], quiet: list[Answer]) -> EngineError:
    """Everybody but the culprit has the tokens of a quiet day; what the culprit got is returned."""
    for i, (answer, reference) in enumerate(zip(got, quiet, strict=True)):
        if i != CULPRIT:
            assert isinstance(answer, Answer)
            assert answer.token_ids == reference.token_ids
    settle(rig)
    failure = got[CULPRIT]
    assert isinstance(failure, EngineError)
    return failure


def holds_culprit(rig: Rig, plan: StepPlan) -> bool:
    ids = rig.prompt(ASKS[CULPRIT]).ids
    return any(chunk.sequence.request.prompt.ids == ids for chunk in plan.chunks)


def test_a_step_that_throws_fails_only_the_culprit(
    rig: Rig, quiet: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runner.run

    def throwing(self: Runner, plan: StepPlan) -> StepLogits:
        if holds_culprit(rig, plan) and any(c.is_decode for c in plan.chunks):
            raise RuntimeError("planted")
        return run(self, plan)

    monkeypatch.setattr(Runner, "run", throwing)
    failure = check_neighbours(rig, asyncio.run(outcomes(rig, ASKS)), quiet)
    assert isinstance(failure, StepFailed)
    assert "planted" not in str(failure)


def test_a_step_is_retried_with_the_room_of_the_failed_one(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Runner.run
    held: list[weakref.ref[torch.Tensor]] = []
    were_alive: list[bool] = []

    def throwing(self: Runner, plan: StepPlan) -> StepLogits:
        were_alive.extend(tensor() is not None for tensor in held)
        if len(plan.chunks) > 1:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("planted")
        return run(self, plan)

    monkeypatch.setattr(Runner, "run", throwing)
    assert all(isinstance(got, Answer) for got in asyncio.run(outcomes(rig, ASKS)))
    assert held and not any(were_alive)


def test_nan_from_the_model_fails_that_request_alone(
    rig: Rig, quiet: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runner.run

    def poisoned(self: Runner, plan: StepPlan) -> StepLogits:
        step = run(self, plan)
        logits = step.logits.clone()
        row = 0
        for chunk, count in zip(plan.chunks, step.counts, strict=True):
            if chunk.sequence.request.prompt.ids == rig.prompt(ASKS[CULPRIT]).ids:
                logits[row : row + count] = torch.nan
            row += count
        return replace(step, logits=logits)

    monkeypatch.setattr(Runner, "run", poisoned)
    assert isinstance(check_neighbours(rig, asyncio.run(outcomes(rig, ASKS)), quiet), NumericalError)


def test_an_abort_ends_generation_within_a_step_and_frees_everything(rig: Rig) -> None:
    async def scenario() -> None:
        stream = rig.submit(Ask("Hello!", num_tokens=200))
        assert isinstance(await anext(stream), Delta)
        stream.abort()
        stream.abort()

    before = rig.engine.status().steps
    asyncio.run(scenario())
    settle(rig)
    assert rig.engine.status().steps - before < 50


def test_a_full_queue_refuses_at_once_and_nothing_is_allocated(rig: Rig) -> None:
    async def scenario() -> tuple[list[Answer], list[QueueFull]]:
        streams, refusals = [], []
        for _ in range(12):
            try:
                streams.append(rig.submit(Ask("Hello!", num_tokens=4)))
            except QueueFull as refusal:
                refusals.append(refusal)
        return [await gather(stream) for stream in streams], refusals

    answers, refusals = asyncio.run(scenario())
    assert len(answers) >= 6
    assert refusals
    assert all(refusal.retry_after_s > 0 for refusal in refusals)
    settle(rig)


def test_a_prompt_longer_than_the_context_is_refused_with_numbers(rig: Rig) -> None:
    async def scenario() -> None:
        rig.submit(Ask("word " * 400))

    with pytest.raises(ContextTooLong, match="255"):
        asyncio.run(scenario())


def test_an_answer_ends_where_the_context_does(rig: Rig) -> None:
    answer = asyncio.run(rig.answer(Ask("Hello!", num_tokens=10_000)))
    assert answer.finish.reason == "length"
    assert answer.finish.usage.prompt_tokens + answer.finish.usage.completion_tokens == 256


def test_a_deadline_ends_a_request_that_is_late(rig: Rig) -> None:
    async def scenario() -> None:
        on_time = rig.submit(Ask("Hello!", num_tokens=8))
        late = replace(rig.request(Ask("Hello!")), arrival_s=time.monotonic() - 100, total_timeout_s=1.0)
        with pytest.raises(DeadlineExceeded):
            await gather(rig.engine.submit(late))
        await gather(on_time)

    asyncio.run(scenario())
    settle(rig)


def test_a_request_that_cannot_be_born_fails_alone(rig: Rig, quiet: list[Answer]) -> None:
    async def scenario() -> Answer:
        bad = rig.submit(Ask("Hello!"), stop_token_ids=(10**9,))
        good = rig.submit(ASKS[0])
        with pytest.raises(StepFailed):
            await gather(bad)
        return await gather(good)

    assert asyncio.run(scenario()).token_ids == quiet[0].token_ids


def test_a_fault_outside_any_request_ends_the_streams_and_the_engine_goes_on(
    rig: Rig, quiet: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Scheduler.plan
    faults = [True]

    def failing(self: Scheduler, now: float) -> StepPlan:
        if self.running and faults:
            faults.pop()
            raise RuntimeError("planted")
        return plan(self, now)

    monkeypatch.setattr(Scheduler, "plan", failing)
    got = asyncio.run(outcomes(rig, ASKS))
    assert all(isinstance(each, EngineDown | Answer) for each in got)
    assert any(isinstance(each, EngineDown) for each in got)
    settle(rig)
    assert asyncio.run(rig.answer(ASKS[0])).token_ids == quiet[0].token_ids
    assert rig.engine.status().num_recoveries == 1


def test_an_image_asked_about_twice_is_encoded_once_and_counted(rig: Rig) -> None:
    picture = scene("green", "triangle", (130, 118))
    rig.recorder.events.clear()
    asyncio.run(
        rig.alone([Ask("Describe the picture.", None, (picture,)), Ask("What is it?", None, (picture,))])
    )
    assert [e.was_cached for e in rig.recorder.events if isinstance(e, ImageLookup)] == [False, True]
    encoded = [e for e in rig.recorder.events if isinstance(e, ImagesEncoded)]
    assert [e.num_images for e in encoded] == [1]


def test_without_on_demand_loading_a_request_for_an_unloaded_adapter_says_so(tmp_path: Path) -> None:
    rig = Rig(str(CHECKPOINT), tmp_path / "state", EngineConfig(kv_bytes=4 << 20, load_on_demand=False))
    rig.register({"away": peft_package(tmp_path / "away")})
    with pytest.raises(AdapterUnavailable) as failure:
        asyncio.run(rig.answer(Ask("Hello!", "away")))
    assert isinstance(failure.value.cause, AdapterNotLoaded)
    asyncio.run(rig.engine.load_adapter(rig.registry.resolve("away")))
    assert asyncio.run(rig.answer(Ask("Hello!", "away"))).token_ids
    rig.close()


def peft_package(folder: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LANGUAGE)
    peft_adapter(load_stock(CHECKPOINT, quantized=False), config, folder)
    return folder


def test_after_draining_has_begun_nothing_new_is_taken_and_what_runs_is_finished(
    tmp_path: Path,
) -> None:
    rig = Rig(str(CHECKPOINT), tmp_path, EngineConfig(kv_bytes=4 << 20))

    async def scenario() -> Answer:
        stream = rig.submit(Ask("Hello!", num_tokens=30))
        drain = asyncio.create_task(rig.engine.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            rig.submit(Ask("Hello!"))
        answer = await gather(stream)
        await drain
        return answer

    assert len(asyncio.run(scenario()).token_ids) == 30
    rig.close()
    rig.close()
