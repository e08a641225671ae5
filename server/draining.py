"""DrainingServer: uvicorn, except for how it stops. The first signal drains, the second ends the process now.

uvicorn alone closes its listener at once, so a client would get a refused connection instead of 503 draining; and it
raises the signal again at the end, so the exit status would not be 0.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from server.state import ServerState

logger = logging.getLogger("lorikeet.server")

LAST_WORDS_S = 2.0
"""After the time is up, streams that were cut get so long to send their error event."""
COUNTDOWN_S = 5.0


class DrainingServer(uvicorn.Server):
    """``on_started`` is called once connections are accepted."""

    def __init__(self, config: uvicorn.Config, state: ServerState, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._state = state
        self._on_started = on_started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler, on the main thread between two byte codes: it only flags and schedules."""
        if self._state.drain.is_draining:
            os._exit(128 + sig)
        self._state.drain.begin()
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._start_drain, signal.Signals(sig).name)

    def _start_drain(self, name: str) -> None:
        self._drain = asyncio.create_task(self.leave(name))

    async def leave(self, why: str) -> None:
        """Answer what is in flight, then stop."""
        num, timeout_s = self._state.drain.num_in_flight, self._state.settings.drain_timeout_s
        logger.info("server.draining why=%s in_flight=%d timeout_s=%g", why, num, timeout_s)
        if not await self._wait(timeout_s):
            logger.warning("server.cut in_flight=%d", self._state.drain.num_in_flight)
            await self._state.engine.drain(0)
            await asyncio.to_thread(self._state.engine.close)
            await self._state.drain.wait_idle(LAST_WORDS_S)
        logger.info("server.stopped")
        self.should_exit = True

    async def _wait(self, timeout_s: float) -> bool:
        """True once nothing is in flight; says now and then how long it will still wait."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            if await self._state.drain.wait_idle(min(left_s, COUNTDOWN_S)):
                return True
            left_s = max(0.0, deadline_s - time.monotonic())
            logger.info("server.draining in_flight=%d left_s=%.0f", self._state.drain.num_in_flight, left_s)
        return self._state.drain.num_in_flight == 0
