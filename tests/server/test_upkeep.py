"""Upkeep: what another server does to the shared registry reaches this server's device without any request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import AdapterRejected, RejectReason
from adapters.registry import Registry
from adapters.validation import Limits
from engine.status import EngineStatus, SlotStatus
from server.upkeep import INTERVAL_S, Upkeep
from tests.fakes import BASE_NAME, FakeEngineClient
from tests.support.packages import tiny_sites
from tests.support.surface import Surface, make_surface


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Surface:
    """This server; its engine says what is in its slots, and its names look at the ledger each time."""
    monkeypatch.setattr("adapters.names._WATCH_INTERVAL_S", 0.0)
    surface = make_surface(tmp_path, num_slots=4)
    status = surface.engine.status
    monkeypatch.setattr(surface.engine, "status", lambda: with_slots(status(), surface.engine))
    for seed in range(3):
        surface.package(f"p{seed}", seed=seed)
    return surface


@pytest.fixture
def theirs(ours: Surface) -> Iterator[Registry]:
    """Another server's registry over the same state folder."""
    registry = Registry(ours.root.parent / "state", tiny_sites(), Limits(), [BASE_NAME])
    yield registry
    registry.close()


def with_slots(status: EngineStatus, engine: FakeEngineClient) -> EngineStatus:
    slots = (SlotStatus(i, ref, "resident", pin, 0, 1) for i, (ref, pin) in enumerate(engine.loaded.items()))
    return replace(status, slots=tuple(slots))


def look(surface: Surface, times: int = 1) -> dict[str, bool]:
    """What is on the device afterwards, and whether it is pinned."""

    async def run() -> None:
        upkeep = Upkeep(surface.state)
        for _ in range(times):
            await upkeep.look()
            await surface.state.background.finish()

    asyncio.run(run())
    return {str(ref): pin for ref, pin in surface.engine.loaded.items()}


def bring(surface: Surface, *names: str, pin: bool = False) -> None:
    for name in names:
        asyncio.run(surface.engine.load_adapter(surface.registry.resolve(name), pin=pin))


def test_what_another_server_removed_leaves_the_device(ours: Surface, theirs: Registry) -> None:
    for seed, name in enumerate("ab"):
        ours.registry.register(name, ours.root / f"p{seed}")
    bring(ours, "a", "b")
    theirs.remove("a")
    assert look(ours) == {"b@1": False}


def test_a_removed_version_leaves_and_the_name_s_series_stay(
    ours: Surface, theirs: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(ours.state.metrics, "forget", lambda ref: forgotten.append(str(ref)))
    for seed in range(2):
        ours.registry.register("a", ours.root / f"p{seed}")
    bring(ours, "a@1", "a@2")
    theirs.remove("a@1")
    assert look(ours) == {"a@2": False}
    assert forgotten == []
    theirs.remove("a")
    assert look(ours) == {}
    assert forgotten == ["a@2"]


def test_a_pin_follows_what_another_server_promotes(ours: Surface, theirs: Registry) -> None:
    ours.registry.register("a", ours.root / "p0", pin=True)
    assert look(ours) == {"a@1": True}
    theirs.register("a", ours.root / "p1")
    assert look(ours) == {"a@1": False, "a@2": True}
    theirs.pointers.roll_back("a")
    assert look(ours) == {"a@1": True, "a@2": False}
    theirs.set_pinned("a", False)
    assert look(ours) == {"a@1": False, "a@2": False}


def test_what_does_not_load_is_tried_once_and_again_when_it_is_wanted_anew(
    ours: Surface, theirs: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []
    load = ours.engine.load_adapter

    async def refused(ref: object, *, pin: bool = False) -> object:
        tries.append(str(ref))
        raise AdapterRejected(RejectReason.NO_EFFECT, "no")

    monkeypatch.setattr(ours.engine, "load_adapter", refused)
    theirs.register("a", ours.root / "p0", pin=True)
    assert look(ours, times=3) == {}
    assert tries == ["a@1"]
    monkeypatch.setattr(ours.engine, "load_adapter", load)
    assert look(ours) == {"a@1": True}


def test_what_is_as_it_should_be_is_left_alone(
    ours: Surface, theirs: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours.registry.register("a", ours.root / "p0", pin=True)
    ours.registry.register("b", ours.root / "p1")
    bring(ours, "a", pin=True)
    bring(ours, "b")
    monkeypatch.setattr(ours.engine, "load_adapter", None)
    monkeypatch.setattr(ours.engine, "unload_adapter", None)
    assert look(ours) == {"a@1": True, "b@1": False}


def test_a_dead_engine_and_a_registry_that_does_not_answer_end_nothing(
    ours: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours.registry.register("a", ours.root / "p0", pin=True)
    ours.engine.is_alive = False
    assert look(ours) == {}
    ours.engine.is_alive = True

    def refuse() -> None:
        raise AdapterRejected(RejectReason.MISSING_FILE, "gone")

    monkeypatch.setattr(ours.registry, "refresh", refuse)
    assert look(ours) == {}


def test_packages_that_could_not_be_deleted_at_once_go_later(ours: Surface, theirs: Registry) -> None:
    ref = ours.registry.register("a", ours.root / "p0")[0].ref
    folder = ours.root.parent / "state" / "packages" / ref.digest
    with theirs._store.staged(ours.root / "p1"):  # while others add, nothing is deleted
        ours.registry.remove("a")
    assert folder.is_dir()
    look(ours)
    assert not folder.exists()


def test_it_looks_often_enough_for_the_promise() -> None:
    assert INTERVAL_S + 0.5 < 5
