"""Where the engine lives: on a thread of this process, or in a process of its own; which, is decided and built here.

Owns the loading of the base, which happens where the engine is. A server whose engine has its own process holds the
processor and no weights, and its streams never wait for a step's Python.

Place in a request's way: none; once, at start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapters.registry import Registry
    from adapters.sites import Site
    from base.processor import Processor
    from base.spec import BaseSpec
    from engine.client import EngineClient
    from engine.observer import Observer
    from server.settings import Settings

logger = logging.getLogger("lorikeet.server")


class HousingError(Exception):
    """The base or the engine cannot be started; ``str()`` says what to change."""


@dataclass(frozen=True, slots=True)
class House:
    """What a server knows of its base before it opens the registry, and the engine that is built over both."""

    spec: BaseSpec
    sites: Mapping[str, Site]
    processor: Processor
    device: str
    open_engine: Callable[[Registry, Observer], EngineClient]
    """Once. Raises HousingError. The caller closes the engine before the house."""


@contextmanager
def housing(settings: Settings, packages: Path) -> Iterator[House]:
    """``packages`` is the store's folder. Raises HousingError."""
    from base.errors import BaseError

    logger.info("server.loading base=%s", settings.base)
    way = _in_a_process if has_own_process(settings) else _on_a_thread
    try:
        house, close = way(settings, packages)
    except BaseError as error:
        raise HousingError(str(error)) from error
    try:
        yield house
    finally:
        close()


def has_own_process(settings: Settings) -> bool:
    """auto: beside a GPU, whose steps are short enough for the server's Python to be in their way."""
    if settings.engine_process != "auto":
        return settings.engine_process == "yes"
    if settings.device != "auto":
        return settings.device.startswith("cuda")
    import torch

    return torch.cuda.is_available()


def _on_a_thread(settings: Settings, packages: Path) -> tuple[House, Callable[[], None]]:
    import torch

    from adapters.sites import discover_sites
    from base.errors import BaseError
    from base.loader import load_base
    from engine.build import build_engine
    from engine.exhaustion import is_out_of_memory
    from engine.workers import run_apart, take_processors

    num_threads = take_processors()
    base = run_apart(lambda: load_base(settings.base_config()), num_threads)
    if base.device.type != "cpu":
        # no step waits for processors: whoever stages adapters may have them
        torch.set_num_threads(num_threads)

    def open_engine(registry: Registry, observer: Observer) -> EngineClient:
        def build() -> EngineClient:
            return build_engine(base, registry, settings.engine_config(), observer, num_threads)

        try:
            return run_apart(build, num_threads)
        except (BaseError, ValueError, MemoryError) as error:
            raise HousingError(str(error)) from error
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise HousingError(
                "the device has no memory for the engine: lower kv_memory or num_slots"
            ) from error

    def give_back() -> None:
        torch.set_num_threads(num_threads)

    sites = discover_sites(base.module)
    return House(base.spec, sites, base.processor, str(base.device), open_engine), give_back


def _in_a_process(settings: Settings, packages: Path) -> tuple[House, Callable[[], None]]:
    from base.loader import open_processor
    from engine.client import EngineClient
    from engine.process import EngineProcess, EngineStartError, Upward
    from engine.remote import Begin

    level = logging.getLogger("lorikeet").getEffectiveLevel()
    process = EngineProcess(
        Begin(settings.base_config(), settings.engine_config(), str(packages.resolve()), level)
    )
    process.begin()
    try:
        processor = open_processor(settings.base_config())  # meanwhile
        facts = process.wait_ready()
    except BaseException as error:
        process.close()
        if isinstance(error, EngineStartError):
            raise HousingError(str(error)) from error
        raise

    def open_engine(registry: Registry, observer: Observer) -> EngineClient:
        client = EngineClient(settings.engine_config(), facts.max_model_len, processor, facts.memory)
        client.connect(process)
        process.connect(Upward(client.deliver, client.fail_streams, observer))
        return client

    return House(facts.spec, facts.sites, processor, facts.device, open_engine), process.close
