"""What names and aliases mean, moved forwards and back; and what each of two servers sees of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import AdapterExists, AdapterNotFound, InvalidAdapterName, NothingToRollBack
from adapters.ledger_pointers import MAX_HISTORY
from adapters.registry import Registry
from adapters.validation import Limits
from tests.support.packages import make_package, tiny_sites

SITES = tiny_sites()


def open_registry(root: Path) -> Registry:
    return Registry(root, SITES, Limits(), ["pocket"])


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
    return [make_package(folder / str(seed), seed=seed) for seed in range(4)]


def version_of(registry: Registry, name: str) -> int | None:
    try:
        return registry.resolve(name).version
    except AdapterNotFound:
        return None


def with_versions(registry: Registry, packages: list[Path], num: int, name: str = "a") -> Registry:
    for package in packages[:num]:
        registry.register(name, package)
    return registry


# ---- staging ---------------------------------------------------------------------------------------------------


def test_what_is_staged_is_a_version_and_not_what_the_name_means(
    registry: Registry, packages: list[Path]
) -> None:
    registry.register("a", packages[0])
    staged = registry.stage("a", packages[1])
    assert (staged.entry.ref.version, staged.is_new, staged.entry.is_current) == (2, True, False)
    assert registry.resolve("a").version == 1
    assert registry.resolve("a@2") == staged.entry.ref
    assert registry.load(staged.entry.ref).digest == staged.entry.ref.digest
    again = registry.stage("a", packages[1])
    assert (again.entry.ref, again.is_new) == (staged.entry.ref, False)


def test_a_name_of_which_nothing_was_promoted_means_nothing_and_names_its_latest(
    registry: Registry, packages: list[Path]
) -> None:
    registry.stage("a", packages[0])
    registry.stage("a", packages[1])
    with pytest.raises(AdapterNotFound) as miss:
        registry.resolve("a")
    assert miss.value.near == ("a@2",)
    with pytest.raises(AdapterNotFound) as miss:
        registry.resolve("a", is_visible=lambda name: False)
    assert miss.value.near == ()
    assert registry.entries() == []
    assert [str(entry.ref) for entry in registry.entries(has_candidates=True)] == ["a@2"]
    assert registry.remove("a").ref.version == 2
    assert registry.entries(has_candidates=True) == []


def test_unstaging_takes_what_nothing_means_and_spares_what_was_promoted_meanwhile(
    registry: Registry, root: Path, packages: list[Path]
) -> None:
    registry.register("a", packages[0])
    refs = [registry.stage("a", package).entry.ref for package in packages[1:4]]
    registry.pointers.promote(str(refs[0]))
    registry.pointers.point("prod", str(refs[1]))
    for ref in refs:
        registry.unstage(ref)
    assert [registry.has(ref) for ref in refs] == [True, True, False]
    assert [entry.ref.version for entry in registry.versions("a")] == [1, 2, 3]
    assert not (root / "packages" / refs[2].digest).exists()
    alone = registry.stage("alone", packages[3]).entry.ref
    registry.unstage(alone)
    assert registry.entries(has_candidates=True) == registry.entries()
    assert version_of(registry, "alone@1") is None


# ---- promoting and going back ----------------------------------------------------------------------------------


def test_promote_moves_the_pointer_and_says_whether_it_moved(
    registry: Registry, packages: list[Path]
) -> None:
    with_versions(registry, packages, 3)
    digest = registry.resolve("a@1").digest
    entry, has_moved = registry.pointers.promote(f"a@sha256:{digest[:12]}")
    assert (entry.ref.version, entry.is_current, has_moved) == (1, True, True)
    assert registry.resolve("a").version == 1
    assert registry.pointers.promote("a@1")[1] is False
    with pytest.raises(AdapterNotFound):
        registry.pointers.promote("a@4")


def test_rollback_goes_back_a_step_each_time_and_never_to_what_was_just_left(
    registry: Registry, packages: list[Path]
) -> None:
    with_versions(registry, packages, 3)
    assert registry.pointers.previous("a").ref.version == 2
    assert registry.pointers.roll_back("a").ref.version == 2
    assert registry.pointers.roll_back("a").ref.version == 1
    with pytest.raises(NothingToRollBack):
        registry.pointers.roll_back("a")
    assert registry.resolve("a").version == 1


def test_rollback_passes_over_versions_that_are_gone(registry: Registry, packages: list[Path]) -> None:
    with_versions(registry, packages, 3)
    registry.remove("a@2")
    assert registry.pointers.previous("a").ref.version == 1
    assert registry.pointers.roll_back("a").ref.version == 1


def test_removing_the_current_version_goes_back_and_never_forwards(
    registry: Registry, packages: list[Path]
) -> None:
    with_versions(registry, packages, 2)
    registry.stage("a", packages[2])
    registry.remove("a@2")
    assert registry.resolve("a").version == 1
    registry.remove("a@1")
    assert version_of(registry, "a") is None
    assert version_of(registry, "a@3") == 3
    assert registry.pointers.promote("a@3")[0].is_current
    registry.remove("a@3")
    assert registry.entries(has_candidates=True) == []


def test_the_history_is_bounded(registry: Registry, packages: list[Path]) -> None:
    with_versions(registry, packages, 2)
    for turn in range(MAX_HISTORY + 8):
        registry.pointers.promote(f"a@{1 + turn % 2}")
    for _ in range(MAX_HISTORY):
        registry.pointers.roll_back("a")
    with pytest.raises(NothingToRollBack):
        registry.pointers.roll_back("a")


def test_a_pin_comes_with_the_pointer(registry: Registry, packages: list[Path]) -> None:
    registry.register("a", packages[0])
    registry.stage("a", packages[1])
    assert registry.pointers.promote("a@2", pin=True)[0].is_pinned


def test_pointers_survive_a_restart(root: Path, packages: list[Path]) -> None:
    registry = with_versions(open_registry(root), packages, 3)
    registry.pointers.promote("a@1")
    registry.pointers.point("prod", "a@3")
    registry.pointers.point("prod", "a@2")
    registry.close()
    again = open_registry(root)
    assert (again.resolve("a").version, again.resolve("prod").version) == (1, 2)
    assert again.pointers.roll_back("a").ref.version == 3
    assert again.pointers.roll_back("prod").ref.version == 3
    again.close()


# ---- aliases ---------------------------------------------------------------------------------------------------


def test_an_alias_means_one_version_until_it_is_moved(registry: Registry, packages: list[Path]) -> None:
    with_versions(registry, packages, 2)
    for alias in ("prod", "ft:pocket-2:acme::8Kx", "team/canary"):
        entry, has_moved = registry.pointers.point(alias, "a@1")
        assert (entry.ref.version, has_moved) == (1, True)
        assert registry.resolve(alias) == registry.resolve("a@1")
    assert registry.pointers.point("prod", "a@1")[1] is False
    registry.pointers.point("prod", "a")  # what the name means now, not what it comes to mean
    registry.pointers.promote("a@1")
    assert registry.resolve("prod").version == 2
    assert [alias.alias for alias in registry.pointers.aliases()] == [
        "ft:pocket-2:acme::8Kx",
        "prod",
        "team/canary",
    ]
    registry.pointers.remove_alias("prod")
    assert version_of(registry, "prod") is None
    with pytest.raises(AdapterNotFound):
        registry.pointers.remove_alias("prod")


def test_an_alias_takes_no_selector_and_is_no_adapter(registry: Registry, packages: list[Path]) -> None:
    with_versions(registry, packages, 1)
    registry.pointers.point("prod", "a@1")
    assert version_of(registry, "prod@1") is None
    with pytest.raises(AdapterNotFound):
        registry.remove("prod")
    with pytest.raises(AdapterNotFound):
        registry.versions("prod")
    assert [entry.ref.name for entry in registry.entries()] == ["a"]


def test_a_name_is_an_alias_or_an_adapter_and_never_both(registry: Registry, packages: list[Path]) -> None:
    with_versions(registry, packages, 1)
    registry.register("b", packages[1])
    registry.pointers.point("prod", "a")
    with pytest.raises(AdapterExists, match="alias"):
        registry.register("prod", packages[1])
    with pytest.raises(AdapterExists, match="adapter"):
        registry.pointers.point("b", "a")
    assert registry.resolve("prod").name == "a"


@pytest.mark.parametrize("alias", ["", "base", "Base", "pocket", "pocket:x", "a b", "..", "a@1", "x" * 97])
def test_what_may_not_be_an_alias(registry: Registry, packages: list[Path], alias: str) -> None:
    with_versions(registry, packages, 1)
    with pytest.raises(InvalidAdapterName):
        registry.pointers.point(alias, "a")


def test_an_alias_whose_version_is_removed_goes_back_or_goes(
    registry: Registry, packages: list[Path]
) -> None:
    with_versions(registry, packages, 2)
    registry.register("b", packages[2])
    registry.pointers.point("prod", "b@1")
    registry.pointers.point("prod", "a@2")
    registry.pointers.point("only", "a@2")
    registry.remove("a@2")
    assert registry.resolve("prod").name == "b"
    assert version_of(registry, "only") is None
    registry.remove("b")
    assert registry.pointers.aliases() == []


def test_a_near_miss_of_an_alias_is_told_to_those_who_may_use_what_it_means(
    registry: Registry, packages: list[Path]
) -> None:
    with_versions(registry, packages, 1, "secret-a")
    registry.pointers.point("production", "secret-a")
    for is_visible, near in ((lambda name: True, ("production",)), (lambda name: name != "secret-a", ())):
        with pytest.raises(AdapterNotFound) as miss:
            registry.resolve("productoin", is_visible=is_visible)
        assert miss.value.near == near


# ---- two servers, and older files ------------------------------------------------------------------------------


def test_another_server_sees_every_move(
    root: Path, packages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.names._WATCH_INTERVAL_S", 0.0)
    ours, theirs = open_registry(root), open_registry(root)
    with_versions(ours, packages, 2)
    ours.pointers.point("prod", "a@1")
    assert (theirs.resolve("a").version, theirs.resolve("prod").version) == (2, 1)
    theirs.pointers.roll_back("a")
    theirs.pointers.point("prod", "a@2")
    assert (ours.resolve("a").version, ours.resolve("prod").version) == (1, 2)
    ours.remove("a@2")
    assert theirs.resolve("prod").version == 1
    theirs.pointers.remove_alias("prod")
    assert version_of(ours, "prod") is None
    ours.close()
    theirs.close()


def test_bytes_that_another_server_held_go_once_it_has_let_go(
    root: Path, packages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = open_registry(root), open_registry(root)
    ref = ours.register("a", packages[0])[0].ref
    lease = theirs.lease(theirs.resolve("a"))
    monkeypatch.setattr("adapters.names._WATCH_INTERVAL_S", 1000.0)  # so they do not see the removal in time
    theirs.resolve("a")
    ours.remove("a")
    folder = root / "packages" / ref.digest
    ours.refresh()
    assert folder.is_dir()
    lease.release()
    assert folder.is_dir()
    ours.refresh()
    assert not folder.exists()
    ours.close()
    theirs.close()


def test_a_ledger_of_the_first_schema_is_taken_over(root: Path, packages: list[Path]) -> None:
    with_versions(open_registry(root), packages, 3).close()
    connection = sqlite3.connect(root / "registry.sqlite")
    connection.executescript(
        "DROP TRIGGER version_removed; DROP TRIGGER name_removed; DROP TRIGGER alias_moved; DROP TRIGGER alias_removed;"
        "DROP TABLE profile; DROP TABLE traffic; ALTER TABLE version DROP COLUMN defaults;"
        "ALTER TABLE name DROP COLUMN history; DROP TABLE alias; PRAGMA user_version = 1;"
    )
    connection.close()
    registry = open_registry(root)
    assert registry.resolve("a").version == 3
    registry.pointers.point("prod", "a@1")
    assert [registry.pointers.roll_back("a").ref.version for _ in range(2)] == [2, 1]
    registry.close()
