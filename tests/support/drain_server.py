"""A process that serves a fake engine as ``lorikeet serve`` would: ``python -m tests.support.drain_server FOLDER``.

Prints its URL. A chat streams one word and then waits for the file FOLDER/go.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engine.request import GenerationRequest
from engine.stream import Delta, Finish
from server.serve import _listening, _serve, _url
from tests.fakes import FakeEngineClient, FakeRegistry, FakeStream, delta, finish
from tests.support.surface import make_surface

if TYPE_CHECKING:
    from adapters.registry import Registry


class GatedStream(FakeStream):
    """One delta at once; the rest when the gate file exists."""

    def __init__(self, request: GenerationRequest, gate: Path) -> None:
        super().__init__(request, [delta("before "), delta("after"), finish(request, 2)])
        self._gate = gate
        self._num = 0

    def __aiter__(self) -> AsyncIterator[Delta | Finish]:
        return self

    async def __anext__(self) -> Delta | Finish:
        self._num += 1
        while self._num == 2 and not self._gate.exists():
            await asyncio.sleep(0.02)
        return await super().__anext__()


class GatedEngine(FakeEngineClient):
    def __init__(self, gate: Path) -> None:
        super().__init__()
        self._gate = gate

    def submit(self, request: GenerationRequest) -> FakeStream:
        return GatedStream(request, self._gate)


def main(folder: Path) -> None:
    surface = make_surface(folder, registry=cast("Registry", FakeRegistry()), port=0)
    surface.state.engine = GatedEngine(folder / "go")
    with _listening(surface.state.settings) as listener:
        url = _url("127.0.0.1", listener.getsockname()[1])
        _serve(surface.state, listener, lambda: _say(url))
    _say("left")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
