"""A background request takes nothing from anybody: it stands aside, and no metric knows it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from base.pocket import CHECKPOINT
from engine.config import EngineConfig
from engine.observer import FirstToken, SequenceEnded, SequenceStarted
from engine.reading import Stream
from tests.support.serving import Answer, Ask, Rig, gather

LONG, SHORT = Ask("Tell me a story.", num_tokens=60), Ask("Hello!", num_tokens=8)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    config = EngineConfig(max_model_len=256, kv_bytes=4 << 20)
    made = Rig(str(CHECKPOINT), tmp_path_factory.mktemp("background"), config)
    yield made
    made.close()


def submit_in_background(rig: Rig, ask: Ask) -> Stream:
    return rig.engine.submit(replace(rig.request(ask), is_background=True))


def test_it_stands_aside_and_both_answers_are_those_of_a_quiet_day(rig: Rig) -> None:
    async def both() -> tuple[list[Answer], Answer, list[Answer], int]:
        quiet = await rig.alone([LONG, SHORT])
        rig.recorder.events.clear()
        stream = submit_in_background(rig, LONG)
        shadow = asyncio.create_task(gather(stream))
        while not rig.engine.status().kv_blocks_used:  # it has begun
            await asyncio.sleep(0.001)
        others = [await rig.answer(SHORT) for _ in range(3)]
        num_events = sum(
            isinstance(e, FirstToken | SequenceEnded | SequenceStarted) for e in rig.recorder.events
        )
        return quiet, await shadow, others, num_events

    (long, short), shadow, others, num_events = asyncio.run(both())
    assert [answer.token_ids for answer in others] == [short.token_ids] * 3
    assert shadow.token_ids == long.token_ids
    assert shadow.finish.timings.num_preemptions > 0
    assert num_events == 9  # three of each of the three that clients asked for
    told = [e for e in rig.recorder.events if isinstance(e, SequenceEnded)]
    assert len(told) == 3


def test_it_is_in_no_count_of_requests(rig: Rig) -> None:
    async def watch() -> None:
        shadow = asyncio.create_task(gather(submit_in_background(rig, LONG)))
        while not rig.engine.status().kv_blocks_used:
            await asyncio.sleep(0.001)
        status = rig.engine.status()
        assert not status.running and not status.waiting
        await shadow

    asyncio.run(watch())
