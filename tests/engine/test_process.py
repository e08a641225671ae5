"""The engine in its own process: the same tokens as on a thread; what happens when it dies, hangs, is orphaned."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import AdapterNotFound
from adapters.ref import AdapterRef
from base.config import BaseConfig
from base.pocket import CHECKPOINT
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.errors import Draining, EngineDown, GrammarError
from engine.observer import Event, SequenceEnded
from engine.process import ROOT, EngineProcess, EngineStartError, Upward
from engine.remote import Begin, EngineFacts
from engine.sampling import GrammarSpec
from engine.stream import Delta
from tests.support.scenes import scene
from tests.support.serving import Answer, Ask, Recorder, Rig, gather
from tests.support.zoo import make_zoo

CONFIG = EngineConfig(num_slots=2, max_model_len=1024, kv_bytes=8 << 20)
ASKS = [
    Ask("Hello!"),
    Ask("Describe the picture.", None, (scene(),)),
    Ask("Who are you?", "rank4"),
    Ask("What color is it?", "everything", (scene("blue", "square"),)),
]
LONG = Ask("Tell me of the sea.", None, (), 400)


def begin_at(folder: Path, **changes: object) -> Begin:
    base = BaseConfig(source=str(CHECKPOINT), device="cpu")
    return replace(Begin(base, CONFIG, str(folder / "packages"), 30), **changes)  # type: ignore[arg-type]


class Remote:
    """As a Rig, but the engine is a process; prompts are a Rig's own."""

    def __init__(self, rig: Rig, state: Path, hung_after_s: float = 60.0) -> None:
        self.process = EngineProcess(begin_at(state), hung_after_s)
        self.process.begin()
        self.facts: EngineFacts = self.process.wait_ready()
        self.recorder = Recorder()
        self.rig = rig
        self.engine = EngineClient(CONFIG, self.facts.max_model_len, rig.base.processor, self.facts.memory)
        self.engine.connect(self.process)
        self.process.connect(Upward(self.engine.deliver, self.engine.fail_streams, self.recorder))

    async def answers(self, asks: list[Ask]) -> list[Answer]:
        streams = [self.engine.submit(self.rig.request(ask)) for ask in asks]
        return list(await asyncio.gather(*(gather(stream) for stream in streams)))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("process")


@pytest.fixture(scope="module")
def rig(state: Path) -> Iterator[Rig]:
    made = Rig(str(CHECKPOINT), state, CONFIG)
    made.register(make_zoo(CHECKPOINT, state / "zoo", ("rank4", "everything")))
    yield made
    made.close()


@pytest.fixture(scope="module")
def remote(rig: Rig, state: Path) -> Iterator[Remote]:
    made = Remote(rig, state)
    yield made
    made.engine.close()


def wait_for(fact: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_both_ways_give_the_same_tokens_and_events(rig: Rig, remote: Remote) -> None:
    here, there = asyncio.run(rig.answers(ASKS)), asyncio.run(remote.answers(ASKS))
    assert [a.token_ids for a in there] == [a.token_ids for a in here]
    assert [a.text for a in there] == [a.text for a in here]

    def ends(events: list[Event]) -> list[tuple[AdapterRef, int]]:
        found = [(e.adapter, e.num_output_tokens) for e in events if isinstance(e, SequenceEnded)]
        return sorted(found, key=str)

    wait_for(lambda: len(ends(remote.recorder.events)) == len(ASKS))
    assert ends(remote.recorder.events) == ends(rig.recorder.events)[: len(ASKS)]
    assert remote.facts.spec == rig.base.spec
    assert dict(remote.facts.sites) == dict(rig.sites)


def test_adapters_are_loaded_unloaded_and_refused_across(rig: Rig, remote: Remote) -> None:
    async def scenario() -> None:
        ref = rig.registry.resolve("rank4")
        report = await remote.engine.load_adapter(ref, pin=True)
        assert report.ref == ref
        (slot,) = [s for s in remote.engine.status().slots if s.ref == ref]
        assert slot.is_pinned and slot.num_bytes == report.num_bytes > 0
        assert (await remote.engine.unload_adapter(ref)).freed_host_bytes > 0
        assert all(s.ref != ref for s in remote.engine.status().slots)
        with pytest.raises(AdapterNotFound):
            await remote.engine.load_adapter(AdapterRef("gone", 1, "0" * 64))

    asyncio.run(scenario())


def test_grammars_are_compiled_across_and_bad_ones_are_told(rig: Rig, remote: Remote) -> None:
    async def scenario() -> None:
        spec = GrammarSpec("regex", "[ab]{3}")
        await remote.engine.compile_grammar(spec)
        request = rig.request(Ask("x"), grammar=spec, ignore_eos=False)
        answer = await gather(remote.engine.submit(request))
        assert set(answer.text) <= {"a", "b"} and len(answer.text) == 3
        with pytest.raises(GrammarError):
            await remote.engine.compile_grammar(GrammarSpec("regex", "("))

    asyncio.run(scenario())


def test_an_abort_frees_its_place_across(rig: Rig, remote: Remote) -> None:
    async def scenario() -> None:
        stream = remote.engine.submit(rig.request(LONG))
        await anext(aiter(stream))
        stream.abort()

    asyncio.run(scenario())
    wait_for(lambda: not remote.engine.status().running and remote.engine.status().kv_blocks_used == 0)


def test_a_callable_is_refused_where_it_cannot_cross(rig: Rig, remote: Remote) -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="on_logits"):
            remote.engine.submit(replace(rig.request(LONG), on_logits=print))

    asyncio.run(scenario())


def test_a_killed_engine_ends_what_waits_for_it_at_once_and_comes_back(rig: Rig, remote: Remote) -> None:
    async def scenario() -> None:
        stream = remote.engine.submit(rig.request(LONG))
        assert isinstance(await anext(aiter(stream)), Delta)
        assert remote.process.pid is not None
        os.kill(remote.process.pid, signal.SIGSTOP)  # so that no answer can come first
        load = asyncio.create_task(remote.engine.load_adapter(rig.registry.resolve("everything")))
        await asyncio.sleep(0)
        os.kill(remote.process.pid, signal.SIGKILL)
        with pytest.raises(EngineDown, match="restarted"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDown):
            await load
        with pytest.raises(EngineDown):
            remote.engine.submit(rig.request(LONG))
        status = remote.engine.status()
        assert not status.is_alive and not status.is_ready and status.is_restarting
        assert not status.running and all(slot.ref is None for slot in status.slots)

    before = remote.engine.status()
    asyncio.run(scenario())
    wait_for(lambda: remote.engine.status().is_ready)
    after = remote.engine.status()
    assert after.num_restarts == before.num_restarts + 1
    assert after.num_recoveries == before.num_recoveries + 1
    reference = asyncio.run(rig.alone(ASKS[2:3]))
    assert asyncio.run(remote.answers(ASKS[2:3]))[0].token_ids == reference[0].token_ids


def test_a_frozen_engine_is_killed_and_replaced(
    rig: Rig, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_before, pid = remote.engine.status().num_recoveries, remote.process.pid

    async def scenario() -> None:
        stream = remote.engine.submit(rig.request(LONG))
        await anext(aiter(stream))
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineDown):
            async for _ in stream:
                pass

    with monkeypatch.context() as patch:
        patch.setattr(remote.process, "_hung_after_s", 2.0)  # from the next pulse on
        asyncio.run(scenario())
    wait_for(lambda: remote.engine.status().is_ready)
    assert remote.engine.status().num_recoveries == num_before + 1
    assert remote.process.pid != pid and pid is not None and not is_running(pid)


def test_closing_ends_streams_as_draining_and_leaves_no_process(rig: Rig, remote: Remote) -> None:
    """The last one over this process."""
    pid = remote.process.pid
    assert pid is not None

    async def scenario() -> None:
        stream = remote.engine.submit(rig.request(LONG))
        await anext(aiter(stream))
        await remote.engine.drain(0)
        await asyncio.to_thread(remote.engine.close)
        with pytest.raises(Draining):
            async for _ in stream:
                pass

    asyncio.run(scenario())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_cannot_start_says_why(state: Path) -> None:
    process = EngineProcess(begin_at(state, engine=replace(CONFIG, kv_bytes=5)))
    process.begin()
    with pytest.raises(EngineStartError, match="raise kv_memory"):
        process.wait_ready()
    process.close()


PARENT = """
import json, sys, time
from base.config import BaseConfig
from engine.config import EngineConfig
from engine.process import EngineProcess
from engine.remote import Begin
assert "transformers" not in sys.modules, "the server's half of this starts without the libraries of the base"
base, config = BaseConfig(source=sys.argv[1], device="cpu"), EngineConfig(num_slots=2, kv_bytes=8 << 20)
process = EngineProcess(Begin(base, config, sys.argv[2], 30))
process.begin()
process.wait_ready()
print(json.dumps(process.pid), flush=True)
time.sleep(600)
"""


def test_an_engine_does_not_outlive_its_server(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(CHECKPOINT), str(tmp_path / "packages")],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert parent.stdout is not None
    pid = json.loads(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_running(pid), 20)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # whoever adopted it may not have waited for it yet
