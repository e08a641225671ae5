"""From settings to a running server and back: places, roots, the start page, and how it leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import uvicorn

from adapters.registry import Registry
from adapters.sources.local import LocalSource
from adapters.validation import Limits
from engine.errors import Draining
from engine.request import GenerationRequest
from server.draining import DrainingServer
from server.http11 import HttpProtocol
from server.logs import JsonLines, TextLines, trace_of
from server.places import PlaceError, adapter_roots, open_state_dir
from server.roots import register_roots
from server.serve import run_server
from server.settings import Settings
from server.startpage import StartPage, curl_line
from tests.fakes import FakeEngineClient, FakeStream, Item, delta, finish
from tests.support.packages import make_package, tiny_sites
from tests.support.quick_server import serve
from tests.support.surface import Surface, make_surface

ROOT = Path(__file__).resolve().parents[2]
CHAT = {"messages": [{"role": "user", "content": "hello"}], "stream": True}


# ---- places ----------------------------------------------------------------------------------------------------


def test_the_state_folder_is_in_the_users_data_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert open_state_dir(Settings()) == (tmp_path / "data" / "lorikeet" / "pocket", True)
    assert open_state_dir(Settings(state_dir=tmp_path / "own")) == (tmp_path / "own", True)
    assert (tmp_path / "own").is_dir()


def test_an_unwritable_home_falls_back_and_an_unwritable_choice_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(blocker / "data"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder, does_last = open_state_dir(Settings())
    assert folder == tmp_path / f"lorikeet-{os.getuid()}" / "pocket"
    assert not does_last
    with pytest.raises(PlaceError, match="--state-dir"):
        open_state_dir(Settings(state_dir=blocker / "state"))


def test_adapter_roots(tmp_path: Path) -> None:
    assert adapter_roots(Settings(adapter_root=(tmp_path,))) == (tmp_path,)
    assert adapter_roots(Settings())[0].parts[-2:] == ("adapters", "samples")
    assert adapter_roots(Settings(base="Qwen/Qwen2.5-VL-3B-Instruct")) == ()
    with pytest.raises(PlaceError, match="not a folder"):
        adapter_roots(Settings(adapter_root=(tmp_path / "none",)))


# ---- the packages in the roots ---------------------------------------------------------------------------------


@contextmanager
def started(folder: Path) -> Iterator[tuple[Registry, LocalSource]]:
    registry = Registry(folder / "state", tiny_sites(), Limits(), ["x"])
    try:
        yield registry, LocalSource([folder / "root"])
    finally:
        registry.close()


def names(registry: Registry) -> list[str]:
    return [entry.ref.name for entry in registry.entries()]


def test_packages_in_the_roots_are_registered_and_a_bad_one_stops_nothing(tmp_path: Path) -> None:
    make_package(tmp_path / "root" / "a", seed=1)
    make_package(tmp_path / "root" / "org" / "b", seed=2)
    make_package(tmp_path / "root" / "too-large", seed=3, rank=128)
    with started(tmp_path) as (registry, source):
        report = register_roots(source, registry, tmp_path / "state")
        assert names(registry) == ["a", "org/b"]
        assert registry.entry("org/b").source == "local:org/b"
    assert report.num_found == 3
    assert list(report.failures) == ["too-large"]
    assert "128" in report.failures["too-large"]


def test_a_deleted_adapter_stays_deleted_and_changed_content_is_the_next_version(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        make_package(tmp_path / "root" / name, seed=i)
    with started(tmp_path) as (registry, source):
        register_roots(source, registry, tmp_path / "state")
        registry.remove("a")
    make_package(tmp_path / "root" / "b", seed=9)
    with started(tmp_path) as (registry, source):
        report = register_roots(source, registry, tmp_path / "state")
        assert names(registry) == ["b"]
        assert registry.resolve("b").version == 2
    assert report.registered == ["b"]


def test_a_lost_registry_is_filled_again(tmp_path: Path) -> None:
    make_package(tmp_path / "root" / "a")
    for _ in range(2):
        with started(tmp_path) as (registry, source):
            register_roots(source, registry, tmp_path / "state")
            assert names(registry) == ["a"]
        index = tmp_path / "state" / "roots.json"
        kept = json.loads(index.read_text())
        (tmp_path / "state" / "registry.sqlite").rename(tmp_path / "old.sqlite")
        for extra in tmp_path.glob("state/registry.sqlite-*"):
            extra.unlink()
        assert kept["packages"]
        index.write_text(json.dumps(kept))


# ---- the start page --------------------------------------------------------------------------------------------


def page(**changes: object) -> StartPage:
    values: dict[str, object] = {
        "url": "http://127.0.0.1:8000",
        "base": "lorikeet-pocket",
        "device": "cpu",
        "adapters": ["json", "french"],
        "skipped": {"broken": "it is broken"},
        "memory": {"language_4bit": 3 << 20, "vision": 1 << 20, "head": 0},
        "settings": Settings(port=9).with_origins({"port": "flag"}).rows(),
        "has_keys": False,
        "picture": None,
        "version": "0.1.0",
    }
    return StartPage(**{**values, **changes})  # type: ignore[arg-type]


def test_the_start_page_fits_a_screen_and_shows_every_setting_with_its_origin() -> None:
    text = page().text()
    assert text.count("\n") < 50
    assert "port = 9  (flag)" in text
    for name in Settings.model_fields:
        assert f"{name}=" in text or f"{name} =" in text
    assert "Memory, 4.0 MiB" in text
    assert "broken: it is broken" in text


@pytest.mark.parametrize("has_keys", [False, True])
@pytest.mark.parametrize("has_picture", [False, True])
def test_the_curl_line_is_one_shell_command_with_valid_json(
    tmp_path: Path, has_keys: bool, has_picture: bool
) -> None:
    picture = tmp_path / "a picture's name.png"
    picture.write_bytes(b"\x89PNG" * 100)
    line = curl_line("http://127.0.0.1:8000", ["json"], picture if has_picture else None, has_keys)
    assert "\n" not in line
    shown = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}; {line}"],
        capture_output=True,
        text=True,
        check=True,
        env={"LORIKEET_API_KEY": "the-key", "PATH": os.environ["PATH"]},
    ).stdout.split("\n")
    body = json.loads(shown[shown.index("-d") + 1])
    assert (body["model"], body["temperature"]) == ("json", 0)
    assert ("authorization: Bearer the-key" in shown) == has_keys
    if has_picture:
        assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


# ---- starting --------------------------------------------------------------------------------------------------


def test_a_start_that_cannot_succeed_says_why_before_the_base_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.housing.housing", lambda *_: pytest.fail("the base was loaded"))
    monkeypatch.setattr("server.serve.configure_logging", lambda level, kind: None)
    keys = tmp_path / "keys.toml"
    keys.write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for settings, why in (
            (Settings(port=port), "--port"),
            (Settings(port=0, adapter_root=(tmp_path / "none",)), "not a folder"),
            (Settings(port=0, api_keys_file=keys), "[[key]]"),
            (Settings(port=0, state_dir=keys / "x"), "--state-dir"),
        ):
            with pytest.raises(SystemExit) as caught:
                run_server(settings)
            assert caught.value.code == 1
            assert why in capsys.readouterr().err


def test_an_unknown_base_is_an_error_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        with pytest.raises(SystemExit):
            run_server(
                Settings(port=0, base=str(tmp_path), state_dir=tmp_path / "state", local_files_only=True)
            )
    finally:
        root.handlers[:] = handlers
    assert "lorikeet serve: cannot" in capsys.readouterr().err


# ---- logs ------------------------------------------------------------------------------------------------------


def test_a_failure_is_logged_without_its_message_or_paths() -> None:
    try:
        json.loads("{secret")
    except ValueError:
        info = sys.exc_info()
    record = logging.LogRecord("lorikeet.x", logging.ERROR, "f", 1, "request.failed id=%s", ("1",), info)
    for line in (TextLines().format(record), JsonLines().format(record)):
        assert "secret" not in line
        assert "/" not in line
        assert "request.failed" in line
        assert "\n" not in line
    assert trace_of(info).startswith("JSONDecodeError@tests.server.test_serve:")
    assert json.loads(JsonLines().format(record))["event"] == "request.failed"


# ---- leaving ---------------------------------------------------------------------------------------------------


class GatedEngine(FakeEngineClient):
    """Streams one word, waits for the gate, and fails what is left when it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: asyncio.Event | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def submit(self, request: GenerationRequest) -> FakeStream:
        self.loop = asyncio.get_running_loop()
        self.gate = asyncio.Event()
        return FakeStream(request, self._items(request, self.gate))

    def _items(self, request: GenerationRequest, gate: asyncio.Event) -> Iterator[Item]:
        yield delta("before ")
        yield gate
        if self.is_closed:
            yield Draining("the server stopped")
        yield delta("after")
        yield finish(request, 2)

    def open(self) -> None:
        assert self.loop is not None
        assert self.gate is not None
        self.loop.call_soon_threadsafe(self.gate.set)

    def close(self) -> None:
        super().close()
        self.open()


@contextmanager
def leaving(surface: Surface) -> Iterator[tuple[str, DrainingServer, threading.Thread]]:
    config = uvicorn.Config(
        surface.app,
        port=0,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    began = threading.Event()
    server = DrainingServer(config, surface.state, began.set)
    listener = config.bind_socket()
    thread = threading.Thread(target=serve, args=(server.serve(sockets=[listener]),), daemon=True)
    thread.start()
    assert began.wait(30)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def gated_surface(folder: Path, *, drain_timeout_s: float = 30.0) -> tuple[Surface, GatedEngine]:
    surface = make_surface(folder, drain_timeout_s=drain_timeout_s)
    engine = GatedEngine()
    surface.state.engine = engine
    return surface, engine


def test_sigterm_refuses_new_requests_and_lets_streams_finish(tmp_path: Path) -> None:
    surface, engine = gated_surface(tmp_path)
    with (
        leaving(surface) as (url, server, thread),
        httpx2.Client(base_url=url, trust_env=False) as client,
        client.stream("POST", "/v1/chat/completions", json=CHAT) as stream,
    ):
        lines = stream.iter_lines()
        while "before" not in next(lines):
            pass
        server.handle_exit(signal.SIGTERM, None)
        assert client.get("/ready").status_code == 503
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        engine.open()
        rest = "".join(lines)
        assert "after" in rest
        assert "error" not in rest
        assert rest.endswith("data: [DONE]")
        thread.join(10)
        assert not thread.is_alive()
    assert not engine.is_closed


def test_streams_that_outlast_the_drain_get_an_error_event(tmp_path: Path) -> None:
    surface, engine = gated_surface(tmp_path, drain_timeout_s=0.2)
    with (
        leaving(surface) as (url, server, thread),
        httpx2.Client(base_url=url, trust_env=False) as client,
        client.stream("POST", "/v1/chat/completions", json=CHAT) as stream,
    ):
        lines = stream.iter_lines()
        while "before" not in next(lines):
            pass
        server.handle_exit(signal.SIGTERM, None)
        rest = "".join(lines)
        assert '"code":"draining"' in rest
        assert rest.endswith("data: [DONE]")
        thread.join(10)
        assert not thread.is_alive()
    assert engine.is_closed


def test_an_idle_server_leaves_at_once(tmp_path: Path) -> None:
    surface = make_surface(tmp_path)
    with leaving(surface) as (_, server, thread):
        begin_s = time.monotonic()
        server.handle_exit(signal.SIGINT, None)
        thread.join(10)
        assert time.monotonic() - begin_s < 5
        assert not thread.is_alive()


@pytest.mark.slow
def test_the_process_exits_0_after_a_drain_and_at_once_on_a_second_signal(tmp_path: Path) -> None:
    folders = [tmp_path / "patient", tmp_path / "hasty"]
    for folder in folders:
        folder.mkdir()
    patient, hasty = (
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.drain_server", str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    )
    try:
        with _open_stream(patient) as lines:
            patient.send_signal(signal.SIGTERM)
            (folders[0] / "go").touch()
            assert "".join(lines).endswith("data: [DONE]")
        assert patient.wait(20) == 0
        assert patient.stdout is not None
        assert patient.stdout.read() == "left\n"
        with _open_stream(hasty):
            hasty.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert hasty.poll() is None
            hasty.send_signal(signal.SIGINT)
            assert hasty.wait(10) == 128 + signal.SIGINT
    finally:
        for process in (patient, hasty):
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def _open_stream(process: subprocess.Popen[str]) -> Iterator[Iterator[str]]:
    """A streamed chat whose first word has come."""
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    with (
        httpx2.Client(base_url=url, trust_env=False, timeout=30) as client,
        client.stream("POST", "/v1/chat/completions", json=CHAT) as stream,
    ):
        lines = stream.iter_lines()
        while "before" not in next(lines):
            pass
        yield lines
