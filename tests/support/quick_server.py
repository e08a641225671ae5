"""QuickServer: uvicorn on a thread for tests, without its waits.

uvicorn looks ten times a second whether it should stop, and then sleeps for as long again; and asyncio answers without
delay only on sockets whose protocol is named (server/serve.py names it too), else a kept connection waits 40 ms a
request. Over some thousands of requests and hundreds of servers that was half of the wire tests' time.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager

import uvicorn

from server.eventloop import new_event_loop

PAUSE_S = 0.002


class QuickServer(uvicorn.Server):
    """Runs on a thread of its own, from ``running`` on."""

    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"

    @contextmanager
    def running(self) -> Iterator[None]:
        is_started = threading.Event()

        async def run(listener: socket.socket) -> None:
            self.loop = asyncio.get_running_loop()
            self._is_told = asyncio.Event()
            serving = asyncio.create_task(self.serve(sockets=[listener]))
            while not self.started and not serving.done():
                await asyncio.sleep(0)
            is_started.set()
            await serving

        with _listening() as listener:
            thread = threading.Thread(target=serve, args=(run(listener),), daemon=True)
            thread.start()
            assert is_started.wait(20)
            assert self.started
            try:
                yield
            finally:
                self.loop.call_soon_threadsafe(self._is_told.set)
                thread.join(timeout=10)

    async def main_loop(self) -> None:
        await self.on_tick(0)  # the date that answers carry
        await self._is_told.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, in short steps: what is still answered may end, for as long as the settings say."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        limit_s = self.config.timeout_graceful_shutdown
        end_s = time.monotonic() + (10 if limit_s is None else limit_s)
        while (self.server_state.connections or self.server_state.tasks) and time.monotonic() < end_s:
            await asyncio.sleep(PAUSE_S)
        for task in self.server_state.tasks:
            task.cancel(msg="the test is over")


def serve(work: Coroutine[None, None, None]) -> None:
    """On the kind of loop that serves."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(work)


def _listening() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    return listener
