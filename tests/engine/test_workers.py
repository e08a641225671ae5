"""Who computes with how many processors, and that a server keeps one team of workers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.workers import begin_thread, leave_one_to_others, run_apart, take_processors

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _number_in_a_later_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_who_takes_the_processors_leaves_one_to_itself_and_to_later_threads() -> None:
    assert take_processors() == 2
    assert (torch.get_num_threads(), _number_in_a_later_thread()) == (1, 1)


def test_a_begun_thread_has_its_number_and_changes_nobody_elses() -> None:
    take_processors()
    ask, answered, found = threading.Event(), threading.Event(), list[int]()

    def work() -> None:
        ask.wait()
        found.append(torch.get_num_threads())
        answered.set()

    thread = begin_thread(work, "test", 3)
    assert (torch.get_num_threads(), _number_in_a_later_thread()) == (1, 1)
    ask.set()
    thread.join()
    assert answered.is_set()
    assert found == [3]


def test_without_a_number_a_thread_has_the_default() -> None:
    found: list[int] = []
    begin_thread(lambda: found.append(torch.get_num_threads()), "test", None).join()
    assert found == [2]


def test_work_apart_gives_its_result_and_its_error() -> None:
    main = threading.get_ident()
    assert run_apart(threading.get_ident, 1) != main
    assert run_apart(torch.get_num_threads, 3) == 3
    assert torch.get_num_threads() == 2
    with pytest.raises(LookupError, match="nothing here"):
        run_apart(_fail, 1)


def test_what_works_apart_may_begin_a_thread_and_changes_nobody_elses_number() -> None:
    take_processors()
    run_apart(lambda: begin_thread(lambda: None, "test", 3), 2).join()
    assert (torch.get_num_threads(), _number_in_a_later_thread()) == (1, 1)


def _fail() -> None:
    raise LookupError("nothing here")


def test_what_is_left_to_others_is_not_taken_from_oneself() -> None:
    leave_one_to_others()
    assert (torch.get_num_threads(), _number_in_a_later_thread()) == (2, 1)


_COUNT = """
import asyncio, os, sys, threading, time, torch
from pathlib import Path
from PIL import Image
from adapters.registry import Registry
from adapters.validation import Limits
from base.prompt import ImagePart, Message, TextPart
from engine.observer import SilentObserver
from engine.request import GenerationRequest
from engine.sampling import SamplingParams
from server.housing import housing
from server.settings import Settings

def num_workers():
    python = {thread.native_id for thread in threading.enumerate()}
    return sum(int(name) not in python for name in os.listdir("/proc/self/task"))

torch.set_num_threads(2)
before = num_workers()
settings = Settings(base="pocket", engine_process="no", device="cpu", kv_memory="64MiB")
with housing(settings, Path("packages")) as house:
    registry = Registry(Path("state"), house.sites, Limits(), [house.spec.name])
    ref = registry.register("json", Path(sys.argv[1]), within=Path("/"))[0].ref
    client = house.open_engine(registry, SilentObserver())

    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [1], f"threads that begin later have {later[0]} processors"

    async def ask():
        parts = (ImagePart(Image.new("RGB", (84, 56))), TextPart("a red circle"))
        prompt = await asyncio.to_thread(house.processor.prepare_chat, [Message("user", parts)])
        sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        async for _ in client.submit(GenerationRequest("one", prompt, ref, sampling, 0.0)):
            pass

    asyncio.run(ask())
    ends = time.monotonic() + 10
    while num_workers() - before > 1 and time.monotonic() < ends:
        time.sleep(0.05)  # teams that ended are leaving
    print("workers", num_workers() - before)
    client.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by Linux's /proc")
def test_a_server_that_has_loaded_and_served_keeps_one_worker_for_two_processors(tmp_path: Path) -> None:
    """A team more, of whoever loaded or of a helper, and each decode step would take a third longer. What others may
    have: the threads of numpy, of tokenizers, of torch's import.
    """
    others = {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", _COUNT, str(ROOT / "adapters/samples/json")],
        cwd=tmp_path,
        env=os.environ | others | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[-2] == "workers 1", ran.stdout
