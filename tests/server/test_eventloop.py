"""The server runs on uvloop, and without it on asyncio's own loop."""

from __future__ import annotations

import asyncio
import sys

import pytest

from server.eventloop import new_event_loop


def module_of_the_loop() -> str:
    async def find() -> str:
        return type(asyncio.get_running_loop()).__module__.partition(".")[0]

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(find())


def test_the_loop_is_the_cheap_one() -> None:
    pytest.importorskip("uvloop")
    assert module_of_the_loop() == "uvloop"


def test_without_it_the_loop_is_asyncios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert module_of_the_loop() == "asyncio"
