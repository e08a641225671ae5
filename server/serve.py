"""run_server: from settings to a running server and back. The composition root: the one place that knows every room.

Heavy imports happen inside the functions, so that a wrong setting is reported before torch is read.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from server.keys import KeyFileError, KeyRing, read_keys
from server.logs import configure_logging
from server.places import PlaceError, adapter_roots, open_state_dir, remote_sources

if TYPE_CHECKING:
    from adapters.sources.remote import RemoteSources
    from engine.memory import MemoryPlan
    from server.housing import House
    from server.roots import RootsReport
    from server.settings import Settings
    from server.startpage import StartPage
    from server.state import ServerState

logger = logging.getLogger("lorikeet.server")

BACKLOG = 2048
PICTURE_KINDS = (".png", ".jpg", ".jpeg", ".webp")


class StartError(Exception):
    """The server cannot start; ``str()`` says what to change."""


def run_server(settings: Settings) -> None:
    """Load, listen, serve until a signal, and leave cleanly. Ends the process with status 1 if it cannot start."""
    configure_logging(settings.log_level, settings.log_format)
    try:
        with _ending_on_sigterm(), _listening(settings) as listener:
            url = _url(settings.host, listener.getsockname()[1])
            with _state(settings) as (state, page):
                text = replace(page, url=url).text()
                _serve(state, listener, lambda: _write(text))
    except StartError as error:
        _write(f"lorikeet serve: {error}\n", to_errors=True)
        raise SystemExit(1) from error


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """While loading, SIGTERM just ends the process; a container's first process would ignore it otherwise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _url(host: str, port: int) -> str:
    """Where this machine reaches the server."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host).strip("[]")
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _serve(state: ServerState, listener: socket.socket, on_started: Callable[[], None]) -> None:
    import uvicorn

    from server.admin import restore_pins
    from server.app import create_app
    from server.draining import DrainingServer
    from server.eventloop import new_event_loop
    from server.http11 import HttpProtocol
    from server.upkeep import Upkeep, stop

    config = uvicorn.Config(
        create_app(state),
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=75,  # longer than the usual proxy's 60 s, so that it is never us who closes first
    )

    async def serve() -> None:
        await restore_pins(state)
        keeping = asyncio.create_task(Upkeep(state).run())
        try:
            await DrainingServer(config, state, on_started).serve(sockets=[listener])
        finally:
            await stop(keeping)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """The address, taken before anything is loaded; connections are accepted once the server is ready."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host.strip("[]"), settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio sets TCP_NODELAY only where the protocol is named; without it a kept connection waits 40 ms a request
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise StartError(f"cannot use host {settings.host}: {error.strerror or error}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise StartError(
                f"cannot listen on {settings.host}:{settings.port} ({error.strerror}): choose another with --port"
            ) from error
        yield listener


@contextmanager
def _state(settings: Settings) -> Iterator[tuple[ServerState, StartPage]]:
    """Everything that is behind the routes, and the start page; closed again at the end."""
    places = _check_places(settings)
    from server.housing import HousingError, housing

    try:
        with housing(settings, places[2][0] / "packages") as house:
            yield from _opened(settings, house, places)
    except HousingError as error:
        raise StartError(str(error)) from error


def _opened(settings: Settings, house: House, places: Places) -> Iterator[tuple[ServerState, StartPage]]:
    """The state over a base that is there; closed again at the end."""
    ring, roots, (state_dir, does_last), remotes = places
    from adapters.errors import AdapterError
    from adapters.registry import Registry
    from adapters.sources.local import LocalSource
    from adapters.validation import Limits
    from server.auth import Gate
    from server.media import MediaLoader
    from server.metrics import Metrics
    from server.profiles import package_defaults
    from server.roots import register_roots
    from server.state import ServerState, unready_reasons
    from server.uploads import Uploads

    limits = Limits(max_rank=settings.max_rank, max_package_bytes=int(settings.max_adapter_size))
    metrics = Metrics(house.spec.name)
    names = _base_names(settings, house.spec.name)
    try:
        registry = Registry(
            state_dir,
            house.sites,
            limits,
            names,
            base_fingerprint=house.spec.fingerprint,
            read_defaults=package_defaults,
            max_store_bytes=None if settings.adapter_store_size is None else int(settings.adapter_store_size),
            on_deleted=metrics.count_deleted,
        )
    except (AdapterError, OSError) as error:
        raise StartError(f"cannot open the registry in {state_dir}: {error}") from error
    uploads = Uploads(state_dir / "uploads", int(settings.max_adapter_size))
    uploads.clear_orphans()
    source = LocalSource(roots)
    report = register_roots(source, registry, state_dir)
    config = settings.engine_config()
    engine = house.open_engine(registry, metrics)
    state = ServerState(
        settings=settings,
        registry=registry,
        source=source,
        engine=engine,
        processor=house.processor,
        base=house.spec,
        media=MediaLoader.of(settings, house.processor.images.max_pixels),
        metrics=metrics,
        gate=Gate(ring, is_loopback=settings.is_loopback),
        uploads=uploads,
        remotes=remotes,
        max_model_len=engine.max_model_len,
    )
    metrics.watch(
        config.num_slots,
        config.block_size,
        engine.status,
        lambda: not unready_reasons(state),
        lambda: registry.store_bytes,
    )
    try:
        yield state, _page(state, house, engine.memory, report, None if does_last else state_dir)
    finally:
        engine.close()
        uploads.close()
        state.media.close()
        registry.close()


Places = tuple[KeyRing, tuple[Path, ...], tuple[Path, bool], "RemoteSources"]


def _check_places(settings: Settings) -> Places:
    """What can be wrong with the operator's files, found before the base is loaded."""
    try:
        ring = read_keys(settings.api_key, settings.api_keys_file)
        roots, state_dir = adapter_roots(settings), open_state_dir(settings)
        return ring, roots, state_dir, remote_sources(settings, state_dir[0])
    except (KeyFileError, PlaceError) as error:
        raise StartError(str(error)) from error


def _base_names(settings: Settings, served: str) -> tuple[str, ...]:
    """Names that a package may give for its base: the served one, and the hub id that was asked for."""
    is_folder = Path(settings.base).exists()
    return (served,) if is_folder or settings.base == served else (served, settings.base)


def _page(
    state: ServerState, house: House, plan: MemoryPlan, report: RootsReport, passing_dir: Path | None
) -> StartPage:
    from server.startpage import StartPage
    from server.version import VERSION

    settings = state.settings
    notes = []
    if passing_dir is not None:
        notes.append(
            f"Note: registered adapters are kept in {passing_dir}, which may be cleared: set --state-dir."
        )
    if settings.insecure_no_auth and not settings.is_loopback and not settings.has_keys:
        notes.append("Note: other machines can use this server without a key; its admin routes are off.")
    return StartPage(
        url=_url(settings.host, settings.port),
        base=house.spec.name,
        device=house.device,
        adapters=[entry.ref.name for entry in state.registry.entries()],
        skipped=report.failures,
        memory=plan.parts,
        budget_bytes=plan.budget_bytes,
        settings=settings.rows(),
        has_keys=settings.has_keys,
        picture=_picture(),
        version=VERSION,
        notes=notes,
    )


def _picture() -> Path | None:
    """A bundled picture for the example line."""
    from base.pocket import PICTURES

    pictures = sorted(path for path in PICTURES.glob("*") if path.suffix.lower() in PICTURE_KINDS)
    return pictures[0] if pictures else None


def _write(text: str, *, to_errors: bool = False) -> None:
    stream = sys.stderr if to_errors else sys.stdout
    stream.write(text)
    stream.flush()
