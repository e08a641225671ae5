"""The whole server over fakes, on a real socket: uvicorn in a thread, clients in the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import httpx2
import openai
import uvicorn

from server.app import create_app
from server.auth import Gate
from server.http11 import HttpProtocol
from server.keys import Key, KeyRing
from server.metrics import Metrics
from server.settings import Settings
from server.state import ServerState
from server.uploads import Uploads
from tests.fakes import FakeEngineClient, FakeMedia, FakeProcessor, FakeRegistry, fake_spec
from tests.support.quick_server import QuickServer

T = TypeVar("T")
ADAPTERS = ("french", "json", "org/nested")
CHAT = "/v1/chat/completions"
PIXEL = "data:image/png;base64,AAAA"


class Wire:
    """One server. Its fakes may be scripted between requests; ``reset`` puts them back."""

    def __init__(self, *keys: Key, **settings: object) -> None:
        self.engine = FakeEngineClient()
        self.registry = FakeRegistry(*ADAPTERS)
        self.processor = FakeProcessor()
        self.media = FakeMedia()
        self.settings = Settings(**settings)  # type: ignore[arg-type]
        fakes = SimpleNamespace(
            registry=self.registry,
            processor=self.processor,
            media=self.media,
            source=None,
            engine=self.engine,
        )
        self.state = ServerState(
            settings=self.settings,
            registry=cast(Any, fakes.registry),
            source=cast(Any, fakes.source),
            engine=self.engine,
            processor=cast(Any, fakes.processor),
            base=fake_spec(),
            media=cast(Any, fakes.media),
            metrics=Metrics("fake"),
            gate=Gate(KeyRing(keys), is_loopback=True),
            uploads=Uploads(Path("no-uploads-here"), max_bytes=0),
            max_model_len=self.engine.max_model_len,
        )
        self.url = ""
        self._loop: asyncio.AbstractEventLoop | None = None

    def reset(self) -> None:
        """Everything as it was made, but for the server and its state."""
        self.engine.__init__(max_model_len=self.engine.max_model_len)  # type: ignore[misc]
        self.registry.__init__(*ADAPTERS)  # type: ignore[misc]
        self.processor.__init__()  # type: ignore[misc]
        self.media.__init__()  # type: ignore[misc]

    # ---- clients -----------------------------------------------------------------------------------------------

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        """``body`` as JSON, or as it is if it is bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return httpx2.post(self.url + path, content=content, headers=names, timeout=20)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=20, **options)

    # ---- the server's loop -------------------------------------------------------------------------------------

    def on_loop(self, work: Callable[[], T]) -> T:
        """``work`` on the server's event loop, where its fakes live."""

        async def run() -> T:
            return work()

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=10)

    def until(self, is_so: Callable[[], bool]) -> None:
        """Waits for the server to get there: at most 5 s, checked at each turn of its loop."""

        async def watch() -> None:
            async with asyncio.timeout(5):
                while not is_so():
                    await asyncio.sleep(0)

        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(watch(), self._loop).result(timeout=10)

    @contextmanager
    def serving(self) -> Iterator[Wire]:
        config = uvicorn.Config(
            create_app(self.state),
            http=HttpProtocol,
            log_level="error",
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        server = QuickServer(config)
        with server.running():
            self._loop, self.url = server.loop, server.url
            yield self


def ask(text: str = "hi", /, **fields: object) -> dict[str, object]:
    """A chat's body."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error object, after checking the envelope."""
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) <= 4096
    body = response.json()
    assert set(body) == {"error"}
    assert {"message", "type", "param", "code"} <= set(body["error"])
    assert isinstance(body["error"]["code"], str)
    return cast(dict[str, Any], body["error"])


def frames_of(text: str) -> list[Any]:
    """The data events of a stream, parsed; comments left out. The end mark must be the last."""
    assert "\r" not in text
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def chat(wire: Wire, body: dict[str, object] | None = None) -> dict[str, Any]:
    """A whole chat's answer."""
    response = wire.post(CHAT, ask() if body is None else body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def stream(wire: Wire, **fields: object) -> list[Any]:
    """A streamed chat's events."""
    response = wire.post(CHAT, ask(stream=True, **fields))
    assert response.status_code == 200, response.text
    return frames_of(response.text)
