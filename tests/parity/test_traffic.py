"""Many adapters under load: nothing fails, nothing waits for ever, and no answer depends on who else is there."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from peft import LoraConfig

from adapters.errors import AdapterNotFound, AdapterRejected, RejectReason
from adapters.layer import MultiLoraLinear
from base.pocket import CHECKPOINT
from engine.config import EngineConfig
from engine.errors import AdapterUnavailable
from engine.messages import UnloadReport
from engine.observer import AdapterEvicted, AdapterMoved
from engine.stream import Delta
from tests.support.oracle import load_stock
from tests.support.packages import peft_adapter
from tests.support.scenes import scene
from tests.support.serving import Answer, Ask, Rig, gather
from tests.support.zoo import LANGUAGE, MERGER

NUM_ADAPTERS = 12
PICTURES = (scene("red", "circle"), scene("blue", "square", (150, 110)))
TEXTS = (
    "Describe the picture.",
    "Who are you?",
    "What color is it?",
    "Hello!",
    "How many objects are there?",
)


def _config(index: int) -> LoraConfig:
    """Ranks and parts mixed; every fourth has vision weights."""
    targets = f"({LANGUAGE})|({MERGER})" if index % 4 == 3 else LANGUAGE
    return LoraConfig(r=(4, 8, 16)[index % 3], lora_alpha=16, target_modules=targets)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    root = tmp_path_factory.mktemp("traffic")
    model = load_stock(CHECKPOINT, quantized=False)
    packages = {}
    for index in range(NUM_ADAPTERS):
        packages[f"a{index}"] = root / f"a{index}"
        peft_adapter(model, _config(index), packages[f"a{index}"], seed=index).unload()
    made = Rig(str(CHECKPOINT), root / "state", EngineConfig(num_slots=8, max_batch_tokens=256))
    made.register(packages)
    yield made
    made.close()


def ask(index: int, num_tokens: int = 8) -> Ask:
    """The index-th of a fixed mixture over the base and all adapters."""
    adapter = None if index % (NUM_ADAPTERS + 1) == NUM_ADAPTERS else f"a{index % (NUM_ADAPTERS + 1)}"
    images = (PICTURES[index % 2],) if index % 5 in (0, 2, 4) else ()
    return Ask(TEXTS[index % 5], adapter, images, num_tokens)


def test_64_streams_over_12_adapters_and_the_base_in_8_slots_answer_as_alone(rig: Rig) -> None:
    asks = [ask(i) for i in range(64)]
    together = asyncio.run(rig.answers(asks))
    alone = asyncio.run(rig.alone(asks))
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert any(isinstance(e, AdapterEvicted) for e in rig.recorder.events)


def test_loading_unloading_and_deleting_adapters_changes_no_token_of_16_streams(
    rig: Rig, tmp_path: Path
) -> None:
    asks = [ask(i, num_tokens=48) for i in (0, 1, 2, 3, 12, 13, 14, 15)] * 2
    quiet = asyncio.run(rig.alone(asks[:8])) * 2

    async def churn() -> int:
        turns = 0
        for turn in range(12):
            name = f"a{4 + turn % 8}"
            await rig.engine.load_adapter(rig.registry.resolve(name))
            await rig.engine.unload_adapter(rig.registry.resolve(name))
            turns += 1
        return turns

    async def delete() -> None:
        source = peft_source(tmp_path)
        rig.registry.register("doomed", source)
        ref = rig.registry.resolve("doomed")
        await rig.engine.load_adapter(ref)
        rig.registry.remove("doomed")
        await rig.engine.unload_adapter(ref)
        with pytest.raises(AdapterNotFound):
            rig.registry.resolve("doomed")

    async def both() -> list[Answer]:
        streams = [asyncio.create_task(gather(rig.submit(each))) for each in asks]
        turns, _ = await asyncio.gather(churn(), delete())
        assert turns == 12
        return list(await asyncio.gather(*streams))

    assert [a.token_ids for a in asyncio.run(both())] == [a.token_ids for a in quiet]


def peft_source(folder: Path) -> Path:
    peft_adapter(load_stock(CHECKPOINT, quantized=False), _config(1), folder / "doomed", seed=99)
    return folder / "doomed"


def test_an_adapter_deleted_under_a_running_stream_lets_it_finish_untouched(rig: Rig, tmp_path: Path) -> None:
    rig.registry.register("doomed2", peft_source(tmp_path))
    each = Ask("Describe the picture.", "doomed2", (PICTURES[0],), 40)
    before = asyncio.run(rig.answer(each))

    async def scenario() -> Answer:
        ref = rig.registry.resolve("doomed2")
        lease = rig.registry.lease(ref)
        stream = rig.submit(each)
        first = await anext(stream)
        assert isinstance(first, Delta)
        rig.registry.remove("doomed2")
        unload = asyncio.create_task(rig.engine.unload_adapter(ref))
        rest = await gather(stream)
        lease.release()
        report = await unload
        assert report.freed_host_bytes > 0
        return Answer(first.token_ids + rest.token_ids, first.text + rest.text, rest.finish)

    assert asyncio.run(scenario()).token_ids == before.token_ids


def test_1000_load_unload_cycles_end_where_they_began(rig: Rig) -> None:
    ref = rig.registry.resolve("a5")

    async def cycle(times: int) -> UnloadReport:
        for _ in range(times):
            await rig.engine.load_adapter(ref)
            before = rig.engine.status()
            report = await rig.engine.unload_adapter(ref)
            after = rig.engine.status()
            assert report.freed_device_bytes == before.slot_bank_bytes - after.slot_bank_bytes
            assert report.freed_host_bytes == before.host_bytes - after.host_bytes > 0
        return report

    asyncio.run(cycle(50))
    rig.recorder.events.clear()
    gc.collect()
    bank_before = rig.engine.status().slot_bank_bytes
    rss_before = psutil.Process().memory_info().rss
    asyncio.run(cycle(1000))
    rig.recorder.events.clear()
    gc.collect()
    assert rig.engine.status().slot_bank_bytes == bank_before
    assert psutil.Process().memory_info().rss <= rss_before * 1.01


def test_unloading_reports_what_was_freed_and_a_later_request_loads_it_again(rig: Rig) -> None:
    async def scenario() -> tuple[int, Answer]:
        ref = rig.registry.resolve("a2")
        await rig.engine.unload_adapter(ref)
        empty = rig.engine.status()
        await rig.engine.load_adapter(ref)
        report = await rig.engine.unload_adapter(ref)
        after = rig.engine.status()
        assert (after.slot_bank_bytes, after.host_bytes) == (empty.slot_bank_bytes, empty.host_bytes)
        assert report.freed_host_bytes > 0
        return report.freed_device_bytes, await rig.answer(ask(2))

    rig.recorder.events.clear()
    asyncio.run(scenario())
    moved = [e for e in rig.recorder.events if isinstance(e, AdapterMoved) and e.ref.name == "a2"]
    assert len(moved) == 2


def test_an_adapter_that_does_nothing_to_the_logits_is_refused_by_the_probe(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.registry.register("mute", peft_source(tmp_path))
    rig.registry.set_pinned("mute", is_pinned=False)
    ref = rig.registry.resolve("mute")
    asyncio.run(rig.engine.unload_adapter(ref))
    with monkeypatch.context() as patch:
        patch.setattr(MultiLoraLinear, "forward", lambda self, x: self.base(x))
        rig_probe_forgets(rig)
        with pytest.raises(AdapterRejected) as refusal:
            asyncio.run(rig.engine.load_adapter(ref))
        assert refusal.value.reason is RejectReason.NO_EFFECT
        with pytest.raises(AdapterUnavailable):
            asyncio.run(rig.answer(Ask("Hello!", "mute")))
    asyncio.run(rig.engine.load_adapter(ref))
    assert asyncio.run(rig.answer(Ask("Hello!", "mute"))).token_ids


def rig_probe_forgets(rig: Rig) -> None:
    """Every content is new to the probe again."""
    rig.core._swaps._proving._proven.clear()
