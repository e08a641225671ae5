"""`lorikeet serve --engine-process yes`: the engine is killed under load, clients are told, and the server goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from peft import LoraConfig

from base.pocket import CHECKPOINT
from tests.support.oracle import load_stock
from tests.support.packages import peft_adapter
from tests.support.zoo import LANGUAGE
from tests.test_end_to_end import Server

ASK = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine-process")
    model = load_stock(CHECKPOINT, quantized=False)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=LANGUAGE)
    peft_adapter(model, config, folder / "adapters" / "words", 0).unload()
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    started = Server(root, "--engine-process", "yes")
    yield started
    engine = engine_pid(started)
    assert started.end() == 0
    assert not Path(f"/proc/{engine}").exists()


def engine_pid(server: Server) -> int:
    """The server's one child that holds the engine."""
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        children += (thread / "children").read_text().split()
    (found,) = {c for c in children if b"engine.child" in Path(f"/proc/{c}/cmdline").read_bytes()}
    return int(found)


def wait_for(fact: Callable[[], object], timeout_s: float = 100.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def answer(server: Server, model: str) -> str:
    with server.openai() as client:
        done = client.chat.completions.create(model=model, messages=ASK, max_tokens=12, temperature=0)  # type: ignore[arg-type]
        return str(done.choices[0].message.content)


def get(server: Server, path: str) -> httpx2.Response:
    return httpx2.get(f"{server.url}{path}", timeout=10)


def test_a_killed_engine_costs_its_streams_and_nothing_else(server: Server) -> None:
    before = answer(server, "lorikeet-pocket"), answer(server, "words")
    assert httpx2.post(f"{server.url}/v1/adapters/words/pin", timeout=60).status_code < 300
    with server.openai() as client:
        long = {"max_tokens": 900, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
        stream = client.chat.completions.create(model="words", messages=ASK, **long)  # type: ignore[call-overload]
        next(iter(stream))
        os.kill(engine_pid(server), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="restarted"):
            for _ in stream:
                pass
    assert get(server, "/ready").status_code == 503
    assert get(server, "/health").status_code == 200
    with server.openai() as client, pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="words", messages=ASK, max_tokens=4)  # type: ignore[arg-type]
    assert refused.value.code == "engine_restarting"
    assert refused.value.response.headers["retry-after"]
    wait_for(lambda: get(server, "/ready").status_code == 200)
    wait_for(
        lambda: get(server, "/v1/adapters/words").json()["tier"] == "device"
    )  # nobody asked: it is pinned
    assert (answer(server, "lorikeet-pocket"), answer(server, "words")) == before


def test_events_of_the_other_process_are_counted(server: Server) -> None:
    answer(server, "words")
    assert 'lorikeet_generation_tokens_total{adapter="words' in get(server, "/metrics").text
