"""The store's limit: what passes it is refused and named, what nothing means goes first, what a name means never."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import InsufficientStorage
from adapters.registry import Registry
from adapters.store import PackageStore
from adapters.store_size import StoreSize, package_bytes
from adapters.validation import Limits
from tests.support.packages import make_package, tiny_sites

SITES = tiny_sites()


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    """Three of other content and the same size."""
    return [make_package(tmp_path / f"source-{i}", seed=i) for i in range(3)]


@pytest.fixture
def room(packages: list[Path]) -> int:
    """For two of them."""
    return sum(package_bytes(folder) for folder in packages[:2])


@pytest.fixture
def deleted() -> list[None]:
    return []


@pytest.fixture
def registry(tmp_path: Path, room: int, deleted: list[None]) -> Iterator[Registry]:
    registry = open_registry(tmp_path / "state", room, deleted)
    yield registry
    registry.close()


def open_registry(root: Path, max_bytes: int | None, deleted: list[None] | None = None) -> Registry:
    noted = [] if deleted is None else deleted
    return Registry(
        root,
        SITES,
        Limits(),
        ["pocket", "Qwen/Qwen2.5-VL-3B-Instruct"],
        max_store_bytes=max_bytes,
        on_deleted=lambda: noted.append(None),
    )


def test_registering_beyond_the_limit_is_refused_and_changes_nothing(
    registry: Registry, packages: list[Path], room: int
) -> None:
    registry.register("a", packages[0])
    registry.register("b", packages[1])
    with pytest.raises(InsufficientStorage, match=rf"adapter_store_size allows {room}:"):
        registry.register("c", packages[2])
    assert [entry.ref.name for entry in registry.entries()] == ["a", "b"]
    assert registry.store_bytes == room
    assert all(registry.load(registry.resolve(name)).sites for name in "ab"), "nothing that is meant has gone"


def test_content_that_is_there_already_takes_no_room(registry: Registry, packages: list[Path]) -> None:
    registry.register("a", packages[0])
    registry.register("b", packages[1])
    registry.register("again", packages[1])
    assert registry.resolve("again").digest == registry.resolve("b").digest


def test_removing_makes_room_and_is_counted(
    registry: Registry, packages: list[Path], deleted: list[None]
) -> None:
    for name, package in zip("ab", packages, strict=False):
        registry.register(name, package)
    registry.remove("a")
    assert len(deleted) == 1
    registry.register("c", packages[2])
    assert {entry.ref.name for entry in registry.entries()} == {"b", "c"}


def test_what_nothing_means_goes_before_anything_is_refused(
    registry: Registry, packages: list[Path], deleted: list[None], tmp_path: Path
) -> None:
    """As a server leaves it that was killed between keeping a package and naming it."""
    registry.register("a", packages[0])
    orphan = PackageStore(tmp_path / "state" / "packages").add(packages[1])
    registry.register("c", packages[2])
    assert len(deleted) == 1
    assert not (tmp_path / "state" / "packages" / orphan).exists()


def test_a_leased_package_of_a_removed_name_keeps_its_room(registry: Registry, packages: list[Path]) -> None:
    registry.register("a", packages[0])
    registry.register("b", packages[1])
    with registry.lease(registry.resolve("a")):
        registry.remove("a")
        with pytest.raises(InsufficientStorage):
            registry.register("c", packages[2])
    registry.register("c", packages[2])


def test_what_another_server_holds_keeps_its_room(
    registry: Registry, packages: list[Path], room: int, tmp_path: Path
) -> None:
    other = open_registry(tmp_path / "state", room)
    registry.register("a", packages[0])
    registry.register("b", packages[1])
    lease = other.lease(other.resolve("a"))
    registry.remove("a")
    with pytest.raises(InsufficientStorage):
        registry.register("c", packages[2])
    lease.release()
    other.close()
    registry.register("c", packages[2])


def test_two_servers_together_do_not_pass_the_limit(tmp_path: Path, room: int) -> None:
    """Eight threads over two registries, each with content of its own: two come in, whoever they are."""
    registries = [open_registry(tmp_path / "state", room) for _ in range(2)]
    folders = [make_package(tmp_path / f"many-{i}", seed=i) for i in range(8)]
    refused: list[int] = []

    def register(number: int) -> None:
        try:
            registries[number % 2].register(f"a{number}", folders[number])
        except InsufficientStorage:
            refused.append(number)

    threads = [threading.Thread(target=register, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 6
    registries[0].refresh()
    assert registries[0].store_bytes <= room
    for registry in registries:
        registry.close()


def test_without_a_limit_nothing_is_refused_and_all_is_counted(tmp_path: Path, packages: list[Path]) -> None:
    registry = open_registry(tmp_path / "open", None)
    for name, package in zip("abc", packages, strict=True):
        registry.register(name, package)
    registry.refresh()
    assert registry.store_bytes == sum(package_bytes(folder) for folder in packages)
    registry.close()


def test_a_store_that_is_over_its_limit_at_the_start_serves_what_it_has(
    tmp_path: Path, packages: list[Path], room: int
) -> None:
    before = open_registry(tmp_path / "state", None)
    for name, package in zip("abc", packages, strict=True):
        before.register(name, package)
    before.close()
    registry = open_registry(tmp_path / "state", room)
    assert len(registry.entries()) == 3
    registry.refresh()
    assert registry.store_bytes > room
    with pytest.raises(InsufficientStorage):
        registry.register("d", make_package(tmp_path / "another", seed=9))
    registry.close()


def test_what_others_add_and_delete_is_measured(tmp_path: Path, packages: list[Path]) -> None:
    store = PackageStore(tmp_path / "packages")
    size = StoreSize(tmp_path / "packages", None)
    assert size.measure() == 0
    digests = [store.add(folder) for folder in packages]
    assert size.measure() == sum(package_bytes(folder) for folder in packages)
    with store.alone():
        store.remove(digests[0])
    assert size.measure() == size.num_bytes == sum(package_bytes(folder) for folder in packages[1:])


def test_a_folder_that_did_not_change_is_not_read_again(
    tmp_path: Path, packages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PackageStore(tmp_path / "packages")
    store.add(packages[0])
    an_hour_ago = os.stat(tmp_path / "packages").st_mtime - 3600
    os.utime(tmp_path / "packages", (an_hour_ago, an_hour_ago))
    size = StoreSize(tmp_path / "packages", None)
    first = size.measure()
    monkeypatch.setattr(os, "scandir", lambda path: pytest.fail("it was read again"))
    assert size.measure() == first
