"""What the engine tells of its tiers is what happened: lookups, loads by stage, stalls by cause, evictions by tier."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from adapters.ref import AdapterRef
from base.pocket import CHECKPOINT
from engine.config import EngineConfig
from engine.observer import AdapterEvicted, AdapterLookup, AdapterMoved, DecodeStalled, Event, StepDone
from tests.support.serving import Ask, Rig

Told = TypeVar("Told", bound=Event)
SAMPLES = Path(__file__).resolve().parents[2] / "adapters" / "samples"
NAMES = ("french", "json", "patterns")


def make_rig(state: Path, host_bytes: int) -> Rig:
    config = EngineConfig(num_slots=1, max_model_len=256, kv_bytes=4 << 20, host_adapter_bytes=host_bytes)
    rig = Rig(str(CHECKPOINT), state, config)
    rig.register({name: SAMPLES / name for name in NAMES})
    return rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = make_rig(tmp_path, 1 << 30)
    yield made
    made.close()


def ask(rig: Rig, *names: str) -> None:
    asyncio.run(rig.alone([Ask("Hello!", name, num_tokens=2) for name in names]))


def told(rig: Rig, kind: type[Told]) -> list[Told]:
    return [event for event in rig.recorder.events if isinstance(event, kind)]


def test_each_new_request_says_where_its_adapter_was(rig: Rig) -> None:
    ask(rig, "french", "french", "json", "french")
    found = [(e.ref.name, e.was_on_device, e.was_on_host) for e in told(rig, AdapterLookup)]
    assert found == [
        ("french", False, False),
        ("french", True, True),
        ("json", False, False),
        ("french", False, True),
    ]
    evicted = [(e.ref.name, e.reason, e.tier) for e in told(rig, AdapterEvicted)]
    assert evicted == [("french", "lru", "device"), ("json", "lru", "device")]
    stages = [set(e.seconds) for e in told(rig, AdapterMoved)]
    assert stages == [{"read", "copy", "probe"}] * 2 + [{"read", "copy"}]  # what is proven stays proven


def test_unloading_leaves_both_tiers_and_says_so(rig: Rig) -> None:
    ask(rig, "french")
    asyncio.run(rig.engine.unload_adapter(rig.registry.resolve("french")))
    evicted = [(e.ref.name, e.reason, e.tier) for e in told(rig, AdapterEvicted)]
    assert evicted == [("french", "unload", "device"), ("french", "unload", "host")]


def test_a_full_host_tier_says_who_had_to_leave(tmp_path: Path) -> None:
    whole = make_rig(tmp_path / "whole", 1 << 30)
    ask(whole, *NAMES)
    all_of_them = whole.engine.status().host_bytes
    whole.close()
    rig = make_rig(tmp_path / "small", all_of_them - 1)
    ask(rig, *NAMES)
    host = [e.ref.name for e in told(rig, AdapterEvicted) if e.tier == "host"]
    assert host and set(host) <= {"french", "json"}
    assert rig.engine.status().host_bytes < all_of_them
    rig.close()


def test_stalls_are_told_only_when_somebody_was_kept_waiting(rig: Rig) -> None:
    ask(rig, "french", "json")
    assert told(rig, DecodeStalled) == []

    async def beside() -> None:
        long = asyncio.create_task(rig.answer(Ask("Tell me a story.", num_tokens=80)))
        while not rig.engine.status().running:
            await asyncio.sleep(0.001)
        await rig.answer(Ask("Hello!", "patterns", num_tokens=2))
        await long

    asyncio.run(beside())
    stalls = told(rig, DecodeStalled)
    assert {stall.cause for stall in stalls} == {"adapter_copy", "adapter_probe"}
    assert all(stall.seconds >= 0 for stall in stalls)


def test_a_step_says_of_each_phase_how_long_it_took_and_what_was_computed(rig: Rig) -> None:
    ask(rig, "french")
    steps = told(rig, StepDone)
    names = {"receive", "adapters", "plan", "encode", "batch", "forward", "sample", "commit", "send"}
    assert steps and all(set(step.seconds) == set(step.cpu_seconds) == names for step in steps)
    assert all(step.cpu_seconds["forward"] > 0 for step in steps)


def test_names_are_those_that_the_registry_gave(rig: Rig) -> None:
    ask(rig, "french")
    assert all(isinstance(e.ref, AdapterRef) and rig.registry.has(e.ref) for e in told(rig, AdapterLookup))
