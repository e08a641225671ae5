"""A real server on a real socket, with a real registry of tiny packages and a fake engine behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import httpx2
import uvicorn
from fastapi import FastAPI

from adapters.registry import Registry
from adapters.sources.local import LocalSource
from adapters.validation import Limits
from server.app import create_app
from server.auth import Gate
from server.http11 import HttpProtocol
from server.keys import KeyRing
from server.media import MediaLoader
from server.metrics import Metrics
from server.profiles import package_defaults
from server.settings import Settings
from server.state import ServerState, unready_reasons
from server.uploads import Uploads
from tests.fakes import BASE_NAME, FakeEngineClient, FakeProcessor, fake_spec
from tests.support.quick_server import QuickServer

if TYPE_CHECKING:
    from base.processor import Processor


@dataclass(slots=True)
class Surface:
    """One server's parts, for tests that look behind the wire."""

    state: ServerState
    engine: FakeEngineClient
    registry: Registry
    root: Path
    """The allowed adapter root; ``package`` writes into it."""
    app: FastAPI

    def package(self, name: str, **options: object) -> Path:
        from tests.support.packages import (
            make_package,
        )  # PEFT and transformers: seconds that a drain test need not wait

        return make_package(self.root / name, **options)  # type: ignore[arg-type]

    def register(self, name: str, **options: object) -> None:
        self.registry.register(name, self.package(name, **options), source=f"local:{name}")


def make_surface(
    folder: Path,
    ring: KeyRing | None = None,
    *,
    is_loopback: bool = True,
    registry: Registry | None = None,
    **settings: object,
) -> Surface:
    root = folder / "root"
    root.mkdir(exist_ok=True)
    config = Settings(**settings)  # type: ignore[arg-type]
    metrics = Metrics(BASE_NAME)
    registry = registry or _open_registry(folder / "state", config, metrics)
    engine = FakeEngineClient()
    state = ServerState(
        settings=config,
        registry=registry,
        source=LocalSource([root]),
        engine=engine,
        processor=cast("Processor", FakeProcessor()),
        base=fake_spec(),
        media=MediaLoader.of(config, 1_000_000),
        metrics=metrics,
        gate=Gate(ring or KeyRing([]), is_loopback=is_loopback),
        uploads=Uploads(folder / "uploads", int(config.max_adapter_size)),
        max_model_len=engine.max_model_len,
    )
    metrics.watch(8, 16, engine.status, lambda: not unready_reasons(state), lambda: registry.store_bytes)
    return Surface(state, engine, registry, root, create_app(state))


def _open_registry(folder: Path, settings: Settings, metrics: Metrics) -> Registry:
    from tests.support.packages import tiny_sites

    return Registry(
        folder,
        tiny_sites(),
        Limits(),
        [BASE_NAME],
        read_defaults=package_defaults,
        max_store_bytes=settings.adapter_store_size,
        on_deleted=metrics.count_deleted,
    )


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app under uvicorn on a free port, in a thread; gives its URL."""
    config = uvicorn.Config(
        app, http=HttpProtocol, ws="none", lifespan="off", log_config=None, access_log=False
    )
    server = QuickServer(config)
    with server.running():
        yield server.url


@contextmanager
def client_of(surface: Surface, **headers: str) -> Iterator[httpx2.Client]:
    with serving(surface.app) as url, httpx2.Client(base_url=url, headers=headers, trust_env=False) as client:
        yield client
