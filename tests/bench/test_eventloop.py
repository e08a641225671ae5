"""The load's client runs on uvloop, and without it on asyncio's own loop."""

from __future__ import annotations

import asyncio
import sys

import pytest

from bench.eventloop import run_async


async def module_of_the_loop() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_the_loop_is_the_cheap_one() -> None:
    pytest.importorskip("uvloop")
    assert run_async(module_of_the_loop()) == "uvloop"


def test_without_it_the_loop_is_asyncios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run_async(module_of_the_loop()) == "asyncio"
