"""Profiles and splits: kept, layered, taken away with what they are of, and a split that is fair and stays put."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import AdapterNotFound
from adapters.profile import Json
from adapters.registry import Registry
from adapters.traffic import Shadow, Traffic
from adapters.validation import Limits
from tests.support.packages import make_package, tiny_sites


def open_registry(folder: Path) -> Registry:
    return Registry(folder, tiny_sites(), Limits(), ["a-base"], read_defaults=_defaults)


def _defaults(profile: Json) -> str:
    return json.dumps({key: profile[key] for key in ("stop",) if key in profile})


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = open_registry(tmp_path / "state")
    for seed in range(3):
        folder = make_package(tmp_path / f"p{seed}", seed=seed)
        (folder / "lorikeet.json").write_text(json.dumps({"profile": {"stop": f"s{seed}", "rank": 4}}))
        registry.register("a", folder)
    yield registry
    registry.close()


def names_of(registry: Registry, alias: str, keys: range) -> list[str]:
    sides = (registry.conduct.side(alias, str(key)) for key in keys)
    return [str(side[0]) for side in sides if side is not None]


# ---- profiles


def test_a_version_s_profile_wins_over_the_name_s_and_that_over_the_package_s(registry: Registry) -> None:
    registry.conduct.change_profile("a", 0, {"temperature": 0.1, "top_p": 0.5})
    registry.conduct.change_profile("a", 2, {"temperature": 0.2})
    layers = registry.conduct.profile(registry.resolve("a@2"))
    assert layers.package == {"stop": "s1"}
    assert layers.adapter == {"temperature": 0.1, "top_p": 0.5}
    assert layers.version == {"temperature": 0.2}
    assert registry.conduct.profile(registry.resolve("a@3")).version == {}


def test_none_takes_a_field_out_and_clearing_all_of_them(registry: Registry) -> None:
    registry.conduct.change_profile("a", 0, {"temperature": 0.1, "top_p": 0.5})
    registry.conduct.change_profile("a", 0, {"temperature": None, "min_p": 0.3})
    ref = registry.resolve("a")
    assert registry.conduct.profile(ref).adapter == {"top_p": 0.5, "min_p": 0.3}
    registry.conduct.clear_profile("a", 0)
    assert registry.conduct.profile(ref).adapter == {}


def test_a_profile_goes_with_its_version_and_does_not_come_back_with_its_number(
    registry: Registry, tmp_path: Path
) -> None:
    registry.conduct.change_profile("a", 3, {"temperature": 0.2})
    registry.remove("a@3")
    entry, _ = registry.register("a", tmp_path / "p2")
    assert entry.ref.version == 3
    assert registry.conduct.profile(entry.ref).version == {}
    assert registry.conduct.profile(entry.ref).package == {"stop": "s2"}


def test_a_name_s_profile_goes_with_the_name(registry: Registry, tmp_path: Path) -> None:
    registry.conduct.change_profile("a", 0, {"temperature": 0.2})
    registry.remove("a")
    registry.register("a", tmp_path / "p0")
    assert registry.conduct.profile(registry.resolve("a")).adapter == {}


def test_what_is_not_there_has_no_profile_to_change(registry: Registry) -> None:
    for name, version in (("a", 9), ("b", 0), ("b", 1)):
        with pytest.raises(AdapterNotFound):
            registry.conduct.change_profile(name, version, {"temperature": 0.2})


def test_profiles_and_splits_are_there_after_a_restart_and_on_other_servers(
    registry: Registry, tmp_path: Path
) -> None:
    other = open_registry(tmp_path / "state")
    try:
        registry.conduct.change_profile("a", 1, {"temperature": 0.2})
        registry.pointers.point("prod", "a@1")
        traffic = Traffic({1: 3.0, 2: 1.0}, "header:x-session", "salt", Shadow(3, 0.5, 100))
        registry.conduct.split("prod", traffic)
        for _ in range(2):
            other._names.watch(is_urgent=True)
            assert other.conduct.profile(other.resolve("a@1")).version == {"temperature": 0.2}
            record = other.pointers.alias("prod")
            assert record is not None and record.traffic == traffic
            other.close()
            other = open_registry(tmp_path / "state")
    finally:
        other.close()


def test_a_registry_of_the_schema_before_is_brought_over(registry: Registry, tmp_path: Path) -> None:
    registry.close()
    path = tmp_path / "state" / "registry.sqlite"
    connection = sqlite3.connect(path)
    for trigger in ("version_removed", "name_removed", "alias_moved", "alias_removed"):
        connection.execute(f"DROP TRIGGER {trigger}")
    for statement in ("DROP TABLE profile", "DROP TABLE traffic", "ALTER TABLE version DROP COLUMN defaults"):
        connection.execute(statement)
    connection.execute("PRAGMA user_version = 2")
    connection.commit()
    connection.close()
    opened = open_registry(tmp_path / "state")
    try:
        assert opened.conduct.profile(opened.resolve("a")).package == {}
        opened.conduct.change_profile("a", 0, {"temperature": 0.2})
        assert opened.conduct.profile(opened.resolve("a")).adapter == {"temperature": 0.2}
        assert opened.register("a", make_package(tmp_path / "p9", seed=9))[0].ref.version == 4
    finally:
        opened.close()


# ---- splits in the registry


def test_a_split_sends_keys_to_its_versions_and_an_alias_that_is_whole_to_none(registry: Registry) -> None:
    registry.pointers.point("prod", "a@1")
    assert registry.conduct.side("prod", "k") is None
    registry.conduct.split("prod", Traffic({1: 1.0, 2: 1.0}, shadow=Shadow(3, 0.5)))
    assert set(names_of(registry, "prod", range(50))) == {"a@1", "a@2"}
    side = registry.conduct.side("prod", "k")
    assert side is not None and str(side[1]) == "a@3"
    registry.conduct.end_split("prod")
    assert registry.conduct.side("prod", "k") is None


def test_a_version_that_is_not_there_or_an_alias_that_is_not_cannot_be_split(registry: Registry) -> None:
    registry.pointers.point("prod", "a@1")
    for alias, traffic in (
        ("prod", Traffic({1: 1.0, 9: 1.0})),
        ("prod", Traffic({1: 1.0}, shadow=Shadow(9, 1.0))),
        ("none", Traffic({1: 1.0})),
    ):
        with pytest.raises(AdapterNotFound):
            registry.conduct.split(alias, traffic)
    assert registry.conduct.side("prod", "k") is None


def test_moving_an_alias_ends_its_split_and_deleting_a_version_takes_it_out(
    registry: Registry, tmp_path: Path
) -> None:
    registry.pointers.point("prod", "a@1")
    registry.conduct.split("prod", Traffic({1: 1.0, 2: 1.0}, shadow=Shadow(3, 1.0)))
    registry.remove("a@3")
    record = registry.pointers.alias("prod")
    assert record is not None and record.traffic == Traffic({1: 1.0, 2: 1.0})
    registry.remove("a@2")
    assert set(names_of(registry, "prod", range(50))) == {"a@1"}
    registry.register("a", tmp_path / "p1")  # its old number again, and no share with it
    assert set(names_of(registry, "prod", range(50))) == {"a@1"}
    registry.conduct.split("prod", Traffic({1: 1.0, 2: 1.0}))
    registry.pointers.point("prod", "a@2")
    assert registry.conduct.side("prod", "k") is None
    registry.conduct.split("prod", Traffic({1: 1.0, 2: 1.0}))
    registry.pointers.roll_back("prod")
    assert registry.conduct.side("prod", "k") is None
    registry.conduct.split("prod", Traffic({1: 1.0, 2: 1.0}))
    registry.pointers.remove_alias("prod")
    registry.pointers.point("prod", "a@1")
    assert registry.conduct.side("prod", "k") is None


# ---- which side


def shares(traffic: Traffic, num_keys: int) -> Counter[int | None]:
    return Counter(traffic.side("prod", f"user-{i}", traffic.weights.keys()) for i in range(num_keys))


@pytest.mark.parametrize(
    "weights", [{1: 95.0, 2: 5.0}, {1: 1.0, 2: 1.0, 3: 1.0}, {4: 0.2, 7: 0.5, 9: 0.3}, {1: 1000.0, 2: 1.0}]
)
@pytest.mark.parametrize("salt", ["", "a", "b"])
def test_keys_are_shared_out_by_weight(weights: dict[int, float], salt: str) -> None:
    """Chi-square at 0.1 %, over fixed salts."""
    num_keys, total = 20_000, sum(weights.values())
    counts = shares(Traffic(weights, salt=salt), num_keys)
    expected = {number: num_keys * weight / total for number, weight in weights.items()}
    chi2 = sum((counts[number] - mean) ** 2 / mean for number, mean in expected.items())
    limits = {1: 10.83, 2: 13.82}
    assert chi2 < limits[len(weights) - 1]


def test_a_split_that_is_off_by_a_point_fails_the_same_test() -> None:
    """The positive control."""
    counts = shares(Traffic({1: 94.0, 2: 6.0}), 20_000)
    chi2 = sum((counts[n] - 20_000 * p) ** 2 / (20_000 * p) for n, p in ((1, 0.95), (2, 0.05)))
    assert chi2 > 10.83


def test_a_key_s_side_is_this_one_for_ever() -> None:
    """Fixed by SHA-256: a change of the arithmetic would move people about."""
    traffic = Traffic({1: 1.0, 2: 1.0}, salt="s")
    sides = [traffic.side("prod", f"user-{i}", (1, 2)) for i in range(16)]
    assert sides == [1, 2, 1, 2, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 2]


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=5),
    grown=st.integers(0, 4),
    factor=st.floats(1.01, 50),
)
@settings(max_examples=60, deadline=None)
def test_a_weight_that_grows_only_gains_keys(weights: list[float], grown: int, factor: float) -> None:
    before = Traffic(dict(enumerate(weights, 1)))
    number = grown % len(weights) + 1
    after = Traffic({**before.weights, number: before.weights[number] * factor})
    for i in range(100):
        was, now = (traffic.side("prod", str(i), before.weights.keys()) for traffic in (before, after))
        assert now in (was, number)


@given(keys=st.lists(st.text(max_size=20), min_size=1, max_size=20), salt=st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_key_comes_to_a_side_with_weight_that_is_there(keys: list[str], salt: str) -> None:
    traffic = Traffic({1: 1.0, 2: 2.0, 3: 0.0, 4: 5.0}, salt=salt)
    for key in keys:
        side = traffic.side("prod", key, (1, 2, 3))
        assert side in (1, 2) and side == traffic.side("prod", key, (1, 2, 3))
        assert traffic.side("prod", key, (3,)) is None


def test_no_draw_is_infinite() -> None:
    assert all(math.isfinite(Traffic({1: 1e6})._draw("a", 1, str(i))) for i in range(1000))
