"""Fetches: one for all who ask at once, with a deadline even for drivers that hang, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.errors import FetchFailed, SourceOff, SourceRejected
from adapters.sources import remote
from adapters.sources.arrival import Deadline
from adapters.sources.landing import Landing
from adapters.sources.object_store import ObjectAddress, ObjectStoreSource
from adapters.sources.remote import RemoteSources

TIMEOUT_S = 20.0


class Stores(ObjectStoreSource):
    """Gives one small file once its gate is open, and counts."""

    def __init__(self) -> None:
        super().__init__([ObjectAddress.parse("s3://bucket")], 1, lambda scheme: pytest.fail("not asked"))
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Semaphore(0)
        self.num_fetches = 0
        self.failure: Exception | None = None

    def fetch(self, address: ObjectAddress, folder: Path, deadline: Deadline) -> str:
        self.num_fetches += 1
        (folder / "adapter_config.json").write_text("{}")
        self.began.release()
        assert self.gate.wait(TIMEOUT_S)
        if self.failure is not None:
            raise self.failure
        return str(address)


@pytest.fixture
def stores() -> Iterator[Stores]:
    stores = Stores()
    yield stores
    stores.gate.set()


@pytest.fixture
def sources(stores: Stores, tmp_path: Path) -> RemoteSources:
    return RemoteSources(Landing(tmp_path / "fetches"), TIMEOUT_S, stores=stores)


def left(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "fetches").iterdir())


def wait_for_nothing(tmp_path: Path) -> None:
    for _ in range(2000):
        if not left(tmp_path):
            return
        threading.Event().wait(0.005)
    raise AssertionError(left(tmp_path))


def test_a_fetched_package_is_there_inside_and_gone_after(sources: RemoteSources, tmp_path: Path) -> None:
    with sources.fetched("s3://bucket/a/") as fetched:
        assert fetched.source == "s3://bucket/a"
        assert (fetched.folder / "adapter_config.json").is_file()
        assert fetched.folder.stat().st_mode & 0o077 == 0
    wait_for_nothing(tmp_path)


def test_those_who_ask_at_once_share_one_fetch(
    sources: RemoteSources, stores: Stores, tmp_path: Path
) -> None:
    stores.gate.clear()
    together = threading.Barrier(4)

    def use() -> str:
        with sources.fetched("s3://bucket/a") as fetched:
            together.wait(TIMEOUT_S)  # all hold it at the same time
            return fetched.folder.name

    with ThreadPoolExecutor(4) as pool:
        uses = [pool.submit(use) for _ in range(4)]
        assert stores.began.acquire(timeout=TIMEOUT_S)
        while next(iter(sources._flights.values())).num_users < 5:
            threading.Event().wait(0.001)
        stores.gate.set()
        assert len({use.result() for use in uses}) == 1
    assert stores.num_fetches == 1
    wait_for_nothing(tmp_path)
    with sources.fetched("s3://bucket/a"):
        assert stores.num_fetches == 2, "what is over is not handed to late comers"


def test_a_failure_reaches_all_who_wait_and_leaves_nothing(
    sources: RemoteSources, stores: Stores, tmp_path: Path
) -> None:
    for failure in (FetchFailed("cut off"), KeyError("a bug of the driver")):
        stores.failure = failure
        with pytest.raises(type(failure)), sources.fetched("s3://bucket/a"):
            pytest.fail("nothing was fetched")
        wait_for_nothing(tmp_path)
    stores.failure = None
    with sources.fetched("s3://bucket/a"):
        pass


def test_a_driver_that_hangs_costs_its_caller_the_deadline_and_is_cleared_later(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "GRACE_S", 0.0)
    sources = RemoteSources(Landing(tmp_path / "fetches"), 0.05, stores=stores)
    stores.gate.clear()
    with pytest.raises(FetchFailed, match=r"0\.05 s"), sources.fetched("s3://bucket/a"):
        pytest.fail("nothing was fetched")
    assert len(left(tmp_path)) == 1, "the driver still writes there"
    stores.gate.set()
    wait_for_nothing(tmp_path)


@pytest.mark.parametrize("source", ["hf://org/x", "gs://bucket/x", "ftp://x/y", "https://x/y", "x://"])
def test_schemes_that_are_off_are_refused_before_anything_is_made(
    sources: RemoteSources, source: str, tmp_path: Path
) -> None:
    assert sources.takes(source)
    with pytest.raises(SourceOff):
        sources.check(source)
    with pytest.raises(SourceOff), RemoteSources.off().fetched(source):
        pytest.fail("nothing was fetched")
    with pytest.raises(SourceRejected):
        sources.check("s3://other/x")
    assert not (tmp_path / "fetches").exists()


@pytest.mark.parametrize("source", ["folder", "/a/b", "file:///a", "upload:up-1", "C:\\x"])
def test_local_folders_and_uploads_are_not_ours(source: str) -> None:
    assert not RemoteSources.takes(source)


def test_what_a_killed_server_left_is_cleared_and_what_is_under_way_is_spared(tmp_path: Path) -> None:
    landing = Landing(tmp_path / "fetches")
    alive, dead = landing.open(), landing.open()
    (dead.folder / "adapter_model.safetensors").write_bytes(b"half of it")
    import os

    os.close(dead.lock)
    assert Landing(tmp_path / "fetches").clear_orphans() == 1
    assert left(tmp_path) == [alive.folder]
    alive.clear()
    assert left(tmp_path) == []
