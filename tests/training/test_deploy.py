"""Deploying to a running server under load: what is in flight keeps its version, and nothing else is ever served."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters.package import package_digest
from base.pocket import CHECKPOINT
from server.keys import Caller, Key, KeyRing, hash_key
from tests.support.live_server import live_server
from tests.support.serving import Rig
from training import deploy as module
from training.deploy import Deployed, DeployError, deploy

SAMPLES = Path(__file__).resolve().parents[2] / "adapters" / "samples"
OLD, NEW = SAMPLES / "french", SAMPLES / "patterns"
KEY = "a-good-admin-key"
NUM_STREAMS = 8
NUM_TOKENS = 96
LIVE_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Rig]]:
    ring = KeyRing([Key(hash_key(KEY), Caller("ops", frozenset({"admin", "infer"})))])
    with live_server(CHECKPOINT, tmp_path_factory.mktemp("live"), ring) as (url, rig):
        yield url, rig


@pytest.fixture(scope="module")
def client(server: tuple[str, Rig]) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    limits = httpx2.Limits(max_connections=64)
    with httpx2.Client(
        base_url=server[0], headers=headers, timeout=100, limits=limits, trust_env=False
    ) as client:
        yield client


def chat(model: str, index: int, num_tokens: int = NUM_TOKENS) -> dict[str, object]:
    messages = [{"role": "user", "content": f"What do you see, number {index}?"}]
    return {
        "model": model,
        "messages": messages,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def answer(client: httpx2.Client, model: str, index: int, num_tokens: int = NUM_TOKENS) -> str:
    reply = client.post("/v1/chat/completions", json=chat(model, index, num_tokens))
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def stream(client: httpx2.Client, model: str, index: int, begun: threading.Event) -> tuple[str, str]:
    """(who served it, what it said); sets ``begun`` at the first word."""
    text = ""
    body = chat(model, index) | {"stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                frame = json.loads(line[6:])
                assert "error" not in frame, frame
                text += frame["choices"][0]["delta"].get("content") or ""
                if text:
                    begun.set()
        return reply.headers["x-adapter"], text


def test_deploying_under_load_changes_no_token_in_flight_and_is_live_within_two_seconds(
    server: tuple[str, Rig], client: httpx2.Client
) -> None:
    url, rig = server
    rig.registry.register("invoice", OLD)
    indices = range(NUM_STREAMS)
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        old = list(pool.map(lambda index: answer(client, "invoice@1", index), indices))
    begun = [threading.Event() for _ in indices]
    probes: list[str] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            probes.append(answer(client, "invoice", 0, 4))

    notes: list[str] = []
    with ThreadPoolExecutor(NUM_STREAMS + 1) as pool:
        streams = [pool.submit(stream, client, "invoice", index, begun[index]) for index in indices]
        for event in begun:
            assert event.wait(timeout=60)
        asking = pool.submit(keep_asking)
        deployed = deploy(NEW, "invoice", url, KEY, notes.append)
        num_still_running = sum(not future.done() for future in streams)
        live = client.post("/v1/chat/completions", json=chat("invoice", 0, 4))
        is_over.set()
        asking.result()
        results = [future.result() for future in streams]

    assert live.headers["x-adapter"] == "invoice@2"
    assert deployed == Deployed("invoice@2", deployed.seconds, package_digest(NEW), is_new=True)
    assert deployed.seconds < LIVE_WITHIN_S
    assert num_still_running > 0, "the streams must outlast the deployment, or this shows nothing"
    assert results == [("invoice@1", text) for text in old]
    new = answer(client, "invoice@2", 0, 4)
    before = answer(client, "invoice@1", 0, 4)
    assert before != new
    assert probes == [before] * probes.count(before) + [new] * probes.count(new), (
        "old, then new, nothing else"
    )
    assert "invoice@2 is live" in notes[-1]
    assert any("adapter_model.safetensors" in note for note in notes)


def test_the_same_package_again_changes_nothing(server: tuple[str, Rig]) -> None:
    url, rig = server
    first = deploy(OLD, "again", url, KEY, lambda note: None)
    again = deploy(OLD, "again", f"{url}/v1/", KEY, lambda note: None)
    assert (first.ref, first.is_new, again.ref, again.is_new) == ("again@1", True, "again@1", False)
    assert rig.registry.entry("again").source == "upload"


def test_a_refused_package_says_why_and_leaves_the_old_version(
    server: tuple[str, Rig], tmp_path: Path
) -> None:
    url, rig = server
    deploy(OLD, "kept", url, KEY, lambda note: None)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in OLD.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "r": 1000}))
    with pytest.raises(DeployError) as refusal:
        deploy(broken, "kept", url, KEY, lambda note: None)
    assert refusal.value.code == "adapter_rejected"
    assert refusal.value.reason
    assert refusal.value.reason in str(refusal.value)
    assert rig.registry.resolve("kept").version == 1
    assert len(rig.registry.versions("kept")) == 1


@pytest.mark.parametrize("key", [None, "not-the-right-key"])
def test_a_wrong_key_says_what_to_do(server: tuple[str, Rig], key: str | None) -> None:
    with pytest.raises(DeployError, match="--api-key") as refusal:
        deploy(OLD, "invoice", server[0], key, lambda note: None)
    assert refusal.value.code == "invalid_api_key"


def test_a_name_that_is_none_is_told(server: tuple[str, Rig]) -> None:
    with pytest.raises(DeployError, match="cannot name an adapter"):
        deploy(OLD, "a b", server[0], KEY, lambda note: None)


def test_a_folder_that_is_no_package_is_told(server: tuple[str, Rig], tmp_path: Path) -> None:
    with pytest.raises(DeployError) as refusal:
        deploy(tmp_path, "x", server[0], KEY, lambda note: None)
    assert refusal.value.reason == "missing_file"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://", "nonsense", "ftp://127.0.0.1"])
def test_a_server_that_does_not_answer_is_told(url: str) -> None:
    with pytest.raises(DeployError, match=r"no answer|no address"):
        deploy(OLD, "x", url, None, lambda note: None)


# ---- other servers ---------------------------------------------------------------------------------------------


Reply = tuple[int, dict[str, str], bytes]


class Scripted(BaseHTTPRequestHandler):
    """Answers each request with the next of ``replies``; the last one for ever."""

    replies: list[Reply] = []
    seen: list[str] = []

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        type(self).seen.append(f"{self.command} {self.path}")
        status, headers, body = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 (the standard library's names)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def scripted() -> Iterator[tuple[str, type[Scripted]]]:
    handler = type("Handler", (Scripted,), {"replies": [], "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def envelope(status: int, code: str, **headers: str) -> Reply:
    error = {"message": "because", "type": "x", "param": None, "code": code}
    return status, headers, json.dumps({"error": error}).encode()


def test_a_busy_server_is_asked_again_as_it_says(
    scripted: tuple[str, type[Scripted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = scripted
    waits: list[float] = []
    monkeypatch.setattr("training.deploy.time.sleep", waits.append)
    record = {"id": "up-1", "source": "upload:up-1", "name": "a", "version": 3, "digest": package_digest(OLD)}
    ok: Reply = (201, {}, json.dumps(record).encode())
    busy = envelope(429, "too_many_loads", **{"retry-after": "7"})
    handler.replies = [busy, busy, ok]
    assert deploy(OLD, "a", url, None, lambda note: None).ref == "a@3"
    assert waits == [7.0, 7.0]
    assert handler.seen[-2:] == ["POST /v1/adapters", "GET /v1/adapters/a"]


def test_a_server_that_stays_busy_is_given_up(
    scripted: tuple[str, type[Scripted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUSY_TIMEOUT_S", 0.0)
    scripted[1].replies = [envelope(429, "too_many_loads")]
    with pytest.raises(DeployError, match="because"):
        deploy(OLD, "a", scripted[0], None, lambda note: None)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (envelope(404, "not_found"), "update it"),
        (envelope(503, "draining"), "when it is back"),
        (envelope(403, "insufficient_scope"), "scope admin"),
        (envelope(507, "insufficient_storage"), "because"),
        ((200, {}, b"<html>"), "is it a Lorikeet server"),
        ((404, {}, b"<html>"), "is it a Lorikeet server"),
        ((201, {}, b"{}"), "is it a Lorikeet server"),
    ],
)
def test_what_another_server_says_is_told(
    scripted: tuple[str, type[Scripted]], reply: Reply, said: str
) -> None:
    scripted[1].replies = [reply]
    with pytest.raises(DeployError, match=said):
        deploy(OLD, "a", scripted[0], None, lambda note: None)


def test_what_was_uploaded_in_vain_is_given_up(scripted: tuple[str, type[Scripted]]) -> None:
    url, handler = scripted
    upload: Reply = (201, {}, json.dumps({"id": "up-1", "source": "upload:up-1"}).encode())
    handler.replies = [upload] * 4 + [envelope(422, "adapter_rejected")]
    with pytest.raises(DeployError, match="because"):
        deploy(OLD, "a", url, None, lambda note: None)
    assert handler.seen[-1] == "DELETE /v1/adapter-uploads/up-1"


def test_another_s_promotion_meanwhile_is_told(scripted: tuple[str, type[Scripted]]) -> None:
    url, handler = scripted
    upload: Reply = (201, {}, json.dumps({"id": "up-1", "source": "upload:up-1"}).encode())
    theirs = {"name": "a", "version": 9, "digest": "0" * 64}
    handler.replies = [upload] * (1 + len(list(OLD.iterdir()))) + [
        (201, {}, json.dumps({"name": "a", "version": 8}).encode()),
        (200, {}, json.dumps(theirs).encode()),
    ]
    with pytest.raises(DeployError, match="a@8 is registered, but a means a@9"):
        deploy(OLD, "a", url, None, lambda note: None)


def test_the_clock_runs_from_the_call(server: tuple[str, Rig]) -> None:
    begin_s = time.monotonic()
    deployed = deploy(NEW, "clock", server[0], KEY, lambda note: None)
    assert 0 < deployed.seconds <= time.monotonic() - begin_s
