from __future__ import annotations

import json
import os
import random
import sqlite3
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adapters.errors import (
    AdapterError,
    AdapterNotFound,
    AdapterRejected,
    InsufficientStorage,
    InvalidAdapterName,
    RejectReason,
)
from adapters.ref import BASE, AdapterRef
from adapters.registry import Registry
from adapters.validation import Limits
from adapters.weights import load_weights
from tests.support.packages import make_package, tiny_sites

SITES = tiny_sites()
BASES = ("Qwen/Qwen2.5-VL-3B-Instruct", "pocket")


def open_registry(root: Path) -> Registry:
    return Registry(root, SITES, Limits(), BASES)


def stored(root: Path) -> set[str]:
    return {entry.name for entry in os.scandir(root / "packages") if entry.name != ".lock"}


def settle() -> None:
    for thread in threading.enumerate():
        if thread.name == "registry-reaper":
            thread.join()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def registry(root: Path) -> Iterator[Registry]:
    registry = open_registry(root)
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("packages")
    return [make_package(folder / str(seed), seed=seed) for seed in range(8)]


def test_a_registered_adapter_is_found_listed_and_loaded(registry: Registry, packages: list[Path]) -> None:
    entry, is_created = registry.register("acme/invoice", packages[0], source="invoice", pin=True)
    assert is_created
    assert str(entry.ref) == "acme/invoice@1"
    assert entry.ref.digest == entry.report.digest
    assert entry.ref.language_digest
    assert not entry.ref.vision_digest
    assert (entry.source, entry.is_pinned, entry.is_enabled, entry.num_leases) == ("invoice", True, True, 0)
    assert registry.resolve("acme/invoice") == entry.ref
    assert registry.entries() == [registry.entry("acme/invoice")]
    ours, theirs = registry.load(entry.ref), load_weights(packages[0], SITES)
    assert ours.digest == entry.ref.digest
    assert all(torch.equal(ours.sites[name].b, theirs.sites[name].b) for name in theirs.sites)


def test_the_same_content_again_changes_nothing(registry: Registry, packages: list[Path]) -> None:
    first, _ = registry.register("a", packages[0])
    second, is_created = registry.register("a", packages[0])
    assert not is_created
    assert second == first


def test_other_content_becomes_the_next_version_and_the_old_one_stays(
    registry: Registry, packages: list[Path]
) -> None:
    first, _ = registry.register("a", packages[0])
    second, is_created = registry.register("a", packages[1])
    assert is_created
    assert (first.ref.version, second.ref.version) == (1, 2)
    assert registry.resolve("a") == registry.resolve("a@2") == second.ref
    assert registry.resolve("a@1") == first.ref
    assert registry.resolve(f"a@sha256:{first.ref.digest[:8]}") == first.ref
    assert [entry.ref.version for entry in registry.versions("a")] == [1, 2]


def test_content_that_the_name_had_before_gets_its_number_back(
    registry: Registry, packages: list[Path]
) -> None:
    for package in (packages[0], packages[1], packages[0]):
        registry.register("a", package)
    assert registry.resolve("a").version == 1
    registry.remove("a")
    assert registry.register("a", packages[2])[0].ref.version == 3, (
        "a number never comes to mean other content"
    )
    assert registry.register("a", packages[1])[0].ref.version == 2
    with pytest.raises(AdapterNotFound):
        registry.resolve("a@1")


@pytest.mark.parametrize("name", ["base", "Base", *BASES, "qwen/qwen2.5-vl-3b-instruct"])
def test_the_base_counts_as_an_adapter_whose_name_nobody_may_take(
    name: str, registry: Registry, packages: list[Path]
) -> None:
    assert registry.resolve(name) == BASE
    with pytest.raises(InvalidAdapterName, match="base"):
        registry.register(name, packages[0])


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a/b/c", "a@1", "é", "x" * 97, "a/", "/a", ".", "..", "../a", "a/..", "a:b", "a\n", "a%2fb"],
)
def test_a_name_out_of_the_rules_is_refused(name: str, registry: Registry, packages: list[Path]) -> None:
    with pytest.raises(InvalidAdapterName):
        registry.register(name, packages[0])
    assert registry.entries() == []


@pytest.mark.parametrize(
    "name", ["", "nobody", "invoice@2", "invoice@", "invoice@x", "invoice@sha256:ab", "x" * 10**6]
)
def test_an_unknown_name_is_not_found(name: str, registry: Registry, packages: list[Path]) -> None:
    registry.register("invoice", packages[0])
    with pytest.raises(AdapterNotFound):
        registry.resolve(name)


def test_a_near_miss_names_what_may_have_been_meant_if_it_may_be_seen(
    registry: Registry, packages: list[Path]
) -> None:
    for name in ("invoices", "Receipts", "acme/poems"):
        registry.register(name, packages[0])
    for typed, meant in (("invoise", "invoices"), ("receipt", "Receipts"), ("acme/poem", "acme/poems")):
        with pytest.raises(AdapterNotFound) as miss:
            registry.resolve(typed)
        assert miss.value.near == (meant,)
        with pytest.raises(AdapterNotFound) as miss:
            registry.resolve(typed, is_visible=lambda name: False)
        assert miss.value.near == ()


def test_a_refused_package_changes_nothing(
    registry: Registry, root: Path, packages: list[Path], tmp_path: Path
) -> None:
    registry.register("a", packages[0])
    before = stored(root)
    with pytest.raises(AdapterRejected):
        registry.register("a", make_package(tmp_path / "bad", rank=100))
    with pytest.raises(AdapterRejected) as refusal:
        registry.register("a", packages[1], expected_sha256="0" * 64)
    assert refusal.value.reason is RejectReason.DIGEST_MISMATCH
    assert registry.resolve("a").version == 1
    assert stored(root) == before


def test_what_is_checked_is_the_copy_and_not_the_source(
    registry: Registry, packages: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_package(tmp_path / "shifty")
    good = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(json.dumps({**json.loads(good), "bias": "all"}))
    original = Registry.register.__globals__["check_package"]

    def swap_then_check(copy: Path, *args: object, **kwargs: object) -> object:
        (folder / "adapter_config.json").write_text(good)
        return original(copy, *args, **kwargs)

    monkeypatch.setattr("adapters.registry.check_package", swap_then_check)
    with pytest.raises(AdapterRejected, match="bias"):
        registry.register("a", folder)


def test_everything_is_there_after_reopening(registry: Registry, root: Path, packages: list[Path]) -> None:
    registry.register("a", packages[0], source="one")
    registry.register("a", packages[1], pin=True)
    registry.register("b", packages[2])
    registry.set_enabled("b", False)
    registry.remove("a@1")
    before = registry.entries()
    registry.close()
    again = open_registry(root)
    assert again.entries() == before
    assert [(entry.is_pinned, entry.is_enabled) for entry in before] == [(True, True), (False, False)]
    assert again.load(again.resolve("a")).digest == before[0].ref.digest
    again.close()


def test_removing_takes_the_name_at_once_and_the_bytes_with_it(
    registry: Registry, root: Path, packages: list[Path]
) -> None:
    entry, _ = registry.register("a", packages[0])
    assert registry.remove("a") == entry
    with pytest.raises(AdapterNotFound):
        registry.resolve("a")
    with pytest.raises(AdapterNotFound):
        registry.lease(entry.ref)
    with pytest.raises(AdapterNotFound):
        registry.load(entry.ref)
    assert stored(root) == set()


def test_bytes_stay_while_another_name_or_version_means_them(
    registry: Registry, root: Path, packages: list[Path]
) -> None:
    digest = registry.register("a", packages[0])[0].ref.digest
    registry.register("b", packages[0])
    registry.register("b", packages[1])
    registry.remove("a")
    assert digest in stored(root)
    registry.remove("b@1")
    assert digest not in stored(root)
    assert registry.resolve("b").version == 2


def test_removing_the_current_version_leaves_the_highest_of_the_others(
    registry: Registry, packages: list[Path]
) -> None:
    for package in packages[:3]:
        registry.register("a", package)
    assert registry.remove("a@3").ref.version == 3
    assert registry.resolve("a").version == 2
    registry.remove("a@1")
    registry.remove("a@2")
    with pytest.raises(AdapterNotFound):
        registry.resolve("a")


def test_a_lease_keeps_the_bytes_of_a_removed_adapter_until_it_is_released(
    registry: Registry, root: Path, packages: list[Path]
) -> None:
    ref = registry.register("a", packages[0])[0].ref
    first, second = registry.lease(ref), registry.lease(ref)
    assert registry.entry("a").num_leases == 2
    assert registry.entry("a").last_used_s == pytest.approx(time.time(), abs=60)
    registry.remove("a")
    assert registry.load(ref).digest == ref.digest
    first.release()
    first.release()
    settle()
    assert stored(root) == {ref.digest}
    second.release()
    settle()
    assert stored(root) == set()
    with pytest.raises(AdapterNotFound):
        registry.lease(ref)


def test_a_lease_outlives_a_new_registration_of_the_same_content(
    registry: Registry, root: Path, packages: list[Path]
) -> None:
    ref = registry.register("a", packages[0])[0].ref
    lease = registry.lease(ref)
    registry.remove("a")
    assert registry.register("a", packages[0])[0].ref == ref
    lease.release()
    settle()
    assert stored(root) == {ref.digest}
    assert registry.load(ref).digest == ref.digest


def test_the_base_may_be_leased(registry: Registry) -> None:
    with registry.lease(BASE) as lease:
        assert lease.ref == BASE


def test_a_lease_holds_the_bytes_against_another_server_too(root: Path, packages: list[Path]) -> None:
    ours, theirs = open_registry(root), open_registry(root)
    ref = ours.register("a", packages[0])[0].ref
    lease = theirs.lease(theirs.resolve("a"))
    ours.remove("a")
    assert theirs.load(ref).digest == ref.digest
    lease.release()
    settle()
    for registry in (ours, theirs):
        registry.close()
    open_registry(root).close()
    assert stored(root) == set()


def test_two_servers_see_each_other_s_changes(
    root: Path, packages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.names._WATCH_INTERVAL_S", 0.0)
    ours, theirs = open_registry(root), open_registry(root)
    ours.register("a", packages[0])
    assert theirs.resolve("a") == ours.resolve("a")
    theirs.register("a", packages[1], pin=True)
    assert ours.resolve("a").version == 2
    assert ours.entry("a").is_pinned
    theirs.remove("a")
    with pytest.raises(AdapterNotFound):
        ours.resolve("a")
    ours.close()
    theirs.close()


def test_opening_beside_another_server_does_not_sweep_what_it_is_adding(
    root: Path, packages: list[Path]
) -> None:
    ours = open_registry(root)
    with ours._store.staged(packages[0]) as copy:
        theirs = open_registry(root)
        assert copy.is_dir()
        theirs.close()
    ours.close()


def test_leftovers_of_a_killed_server_are_swept_when_it_opens(root: Path, packages: list[Path]) -> None:
    registry = open_registry(root)
    digest = registry._store.add(packages[0])  # killed before the name was written
    (root / "packages" / ".incoming-x").mkdir()
    registry.close()
    open_registry(root).close()
    assert digest not in stored(root)
    assert stored(root) == set()


def test_bytes_that_changed_on_disk_are_refused_at_load(root: Path, packages: list[Path]) -> None:
    registry = open_registry(root)
    ref = registry.register("a", packages[0])[0].ref
    registry.close()
    path = root / "packages" / ref.digest / "adapter_model.safetensors"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    again = open_registry(root)
    with pytest.raises(AdapterRejected) as refusal:
        again.load(ref)
    assert refusal.value.reason is RejectReason.DIGEST_MISMATCH
    again.register("a", packages[0])
    assert again.load(ref).digest == ref.digest
    again.close()


def test_a_lost_package_fails_its_own_load_alone(root: Path, packages: list[Path]) -> None:
    registry = open_registry(root)
    lost, kept = (registry.register(name, packages[index])[0].ref for index, name in enumerate("ab"))
    registry.close()
    for path in (root / "packages" / lost.digest).iterdir():
        path.unlink()
    again = open_registry(root)
    with pytest.raises(AdapterError):
        again.load(lost)
    assert again.load(kept).digest == kept.digest
    again.close()


def test_a_full_disk_fails_that_call_alone(registry: Registry, packages: list[Path]) -> None:
    registry.register("a", packages[0])
    connection = registry._names._ledger._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(InsufficientStorage):
        registry.register("b", packages[1], source="y" * 50_000)
    assert registry.resolve("a").version == 1
    assert [entry.ref.name for entry in registry.entries()] == ["a"]
    registry.remove("a")


def test_a_newer_or_foreign_file_is_refused_and_not_touched(root: Path) -> None:
    open_registry(root).close()
    connection = sqlite3.connect(root / "registry.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(AdapterError, match="newer"):
        open_registry(root)
    (root / "registry.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(AdapterError, match="cannot be read"):
        open_registry(root)


def test_many_threads_register_resolve_and_remove_without_losing_anything(
    registry: Registry, root: Path, packages: list[Path]
) -> None:
    def work(index: int) -> None:
        chance = random.Random(index)
        for turn in range(4):
            name = f"t{index}-{turn}"
            ref = registry.register(name, chance.choice(packages))[0].ref
            with registry.lease(ref):
                assert registry.load(registry.resolve(name)).digest == ref.digest
                if turn % 2:
                    registry.remove(name)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    settle()
    entries = registry.entries()
    assert [entry.ref.name for entry in entries] == sorted(
        f"t{index}-{turn}" for index in range(6) for turn in (0, 2)
    )
    registry.close()
    open_registry(root).close()
    assert stored(root) == {entry.ref.digest for entry in entries}


def _fill(root: Path, num_names: int, example: AdapterRef) -> None:
    connection = sqlite3.connect(root / "registry.sqlite")
    digests = [f"{index:064x}" for index in range(num_names)]
    connection.executemany(
        "INSERT INTO version SELECT ?, 1, ?, '', ?, kind, num_bytes, rank, targets, parts, num_sites, source, "
        "created_s, 0, '{}' FROM version WHERE name = ?",
        [(f"adapter-{index:05}", digest, digest, example.name) for index, digest in enumerate(digests)],
    )
    connection.executemany(
        "INSERT INTO name VALUES (?, 1, 0, 1, '[]')", [(f"adapter-{index:05}",) for index in range(num_names)]
    )
    connection.commit()
    connection.close()


def test_ten_thousand_adapters_are_listed_found_and_missed_quickly(root: Path, packages: list[Path]) -> None:
    registry = open_registry(root)
    _fill(root, 10_000, registry.register("example", packages[0])[0].ref)
    registry.close()

    tracemalloc.start()
    registry = open_registry(root)
    num_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert num_bytes < 50 * 2**20
    assert len(registry.entries()) == 10_001
    assert _best_s(registry.entries) < 0.3
    assert _best_s(lambda: [registry.resolve(f"adapter-{index:05}") for index in range(1000)]) / 1000 < 50e-6
    assert _best_s(lambda: _miss(registry, "adaptor-04321")) < 0.05
    assert "adapter-04321" in _miss(registry, "adapter-04321x")
    assert "adapter-04321" in _miss(registry, "xadapter-04321")
    registry.close()


def _miss(registry: Registry, name: str) -> tuple[str, ...]:
    with pytest.raises(AdapterNotFound) as miss:
        registry.resolve(name)
    return miss.value.near


def _best_s(action: object) -> float:
    assert callable(action)
    times = []
    for _ in range(5):
        start_s = time.perf_counter()
        action()
        times.append(time.perf_counter() - start_s)
    return min(times)
