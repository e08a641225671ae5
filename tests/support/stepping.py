"""An engine without a thread, stepped by a script: what was sent and told in each step, to the last field but times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any
from unittest.mock import patch

from adapters.layer import detach
from base.model import BaseModel
from engine.build import PackageSource, build_parts
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import Inbound, Outbound
from engine.observer import Event, SteppedAhead
from engine.sequence import Sequence as Row

TIMES = {"seconds", "cpu_seconds", "queue_s", "swap_s", "timings"}
Script = Mapping[int, Sequence[Inbound]]
"""By step: what comes into the inbox while it runs, after it was looked into."""
Told = tuple[object, ...]


class InlineThreads:
    """A ThreadPoolExecutor that has done everything when it is asked to begin."""

    def __init__(self, *_: object, **__: object) -> None:
        return None

    def submit(self, work: Callable[..., object], *values: object) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*values))
        except Exception as error:  # noqa: BLE001  (it is the future's to tell)
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None:
        return None


@dataclass
class Life:
    """What an engine said, step by step."""

    messages: list[tuple[int, Told]] = field(default_factory=list)
    events: list[tuple[int, Told]] = field(default_factory=list)
    blocks_used: int = -1
    """When nothing was left to do."""
    num_ahead: int = 0
    num_dropped: int = 0
    num_steps: int = 0

    def of(self, request_id: str) -> list[Told]:
        """One request's messages, in order."""
        return [told for _, told in self.messages if told[1] == request_id]

    def without_steps(self) -> dict[str, list[Told]]:
        return {name: self.of(name) for name in dict.fromkeys(str(told[1]) for _, told in self.messages)}


class Stepped:
    """Made by ``stepped``."""

    def __init__(self, base: BaseModel, source: PackageSource, config: EngineConfig) -> None:
        self.life = Life()
        self._step = 0
        self.engine: Engine = build_parts(base, source, config, self, self._deliver).engine

    def _deliver(self, messages: Sequence[Outbound]) -> None:
        self.life.messages += [(self._step, plain(message)) for message in messages]

    def record(self, event: Event) -> None:
        """As an Observer."""
        if isinstance(event, SteppedAhead):
            self.life.num_ahead += 1
            self.life.num_dropped += event.num_dropped
        else:
            self.life.events.append((self._step, plain(event)))

    def note(self, *told: object) -> None:
        """An answer that is no message: of a load or unload."""
        self.life.events.append((self._step, told))

    def live(self, script: Script, most: int = 400, *, is_between: bool = False) -> Life:
        """Until nothing is left to do. ``is_between``: messages come before their step, and not in it."""
        engine, receive = self.engine, self.engine._receive

        def receive_and_send() -> None:
            receive()
            if not is_between:
                self._put(script)

        with patch.object(engine, "_receive", receive_and_send):
            while self._step < most and not (self._step > max(script) and self._is_idle()):
                if is_between:
                    self._put(script)
                engine.step()
                self._step += 1
        assert self._is_idle(), "there is no end to it"
        self.life.blocks_used = engine._scheduler.num_blocks_used
        self.life.num_steps = engine.num_steps
        return self.life

    def _put(self, script: Script) -> None:
        for message in script.get(self._step, ()):
            self.engine.inbox.put(message)

    def _is_idle(self) -> bool:
        engine = self.engine
        has_rows = engine._sequences or engine._scheduler.is_ahead
        return not (
            has_rows or engine._swaps.has_work or engine._swaps.has_pending or not engine.inbox.empty()
        )

    @property
    def running(self) -> list[Row]:
        return self.engine._scheduler.running


@contextmanager
def stepped(base: BaseModel, source: PackageSource, config: EngineConfig) -> Iterator[Stepped]:
    """An engine over ``base``, which is given back as it was."""
    with patch("adapters.mover.ThreadPoolExecutor", InlineThreads):
        try:
            yield Stepped(base, source, config)
        finally:
            detach(base.module)


def plain(value: object) -> Told:
    """A message or event without its times."""
    named = {each.name: getattr(value, each.name) for each in fields(value)}  # type: ignore[arg-type]
    told = [
        str(each) if isinstance(each, Exception) else each
        for name, each in named.items()
        if name not in TIMES
    ]
    return (type(value).__name__, *told)


def now() -> float:
    return time.monotonic()
