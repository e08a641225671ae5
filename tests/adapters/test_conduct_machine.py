"""Splits, shadows and profiles against a model, while versions, pointers and aliases come and go around them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from adapters import ledger_conduct
from adapters.errors import AdapterNotFound
from adapters.traffic import Shadow, Traffic
from tests.adapters.test_registry_machine import ALIASES, DIGESTS, NAMES, RegistryMachine
from tests.support.pointer_model import ALIAS_OF, Model

KEYS = [f"user-{i}" for i in range(12)]
Numbers = st.integers(1, 3)


@dataclass(slots=True)
class ConductModel(Model):
    """The pointers' model, and what is said of each version and alias. What goes takes what was said of it along."""

    splits: dict[str, Traffic] = field(default_factory=dict)
    profiles: dict[tuple[str, int], dict[str, object]] = field(default_factory=dict)
    pins: set[str] = field(default_factory=set)

    def apply(self, act: tuple[str, str, int]) -> None:
        aliases, live = dict(self.aliases), self.all_live()
        Model.apply(self, act)
        for alias, target in aliases.items():
            if self.aliases.get(alias) != target:
                self.splits.pop(alias, None)
        for name, number in live - self.all_live():
            self._forget(name, number)
        gone = {name for name, _ in live} - {name for name, _ in self.all_live()}
        self.pins -= gone
        for name in gone:
            self.profiles.pop((name, 0), None)

    def _forget(self, name: str, number: int) -> None:
        self.profiles.pop((name, number), None)
        for alias, split in list(self.splits.items()):
            if self.aliases[alias][0] == name:
                weights = {n: weight for n, weight in split.weights.items() if n != number}
                shadow = split.shadow if split.shadow and split.shadow.version != number else None
                self.splits[alias] = Traffic(weights, split.sticky, split.salt, shadow)

    def all_live(self) -> set[tuple[str, int]]:
        return {(name, number) for name, known in self.names.items() for number in known.live}

    def set_profile(self, name: str, number: int, changes: dict[str, object]) -> bool:
        live = self.all_live()
        if not ((name, number) in live if number else name in {n for n, _ in live}):
            return False
        fields = {**self.profiles.get((name, number), {}), **changes}
        self.profiles[name, number] = {key: value for key, value in fields.items() if value is not None}
        return True


class ConductMachine(RegistryMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model: ConductModel = ConductModel(DIGESTS)

    @initialize(packages=st.permutations(range(3)))
    def begin_with_three_versions(self, packages: list[int]) -> None:
        """And with a split, so that a short walk has something to take away."""
        for package in packages:
            self.act("register", "a", package)
        self.act("point", "prod", 1)
        self.split("prod", {1: 9.0, 2: 1.0}, 3)

    @rule(
        alias=ALIASES,
        weights=st.dictionaries(Numbers, st.sampled_from([0.0, 1.0, 9.0]), min_size=1),
        shadow=st.none() | Numbers,
    )
    def split_anew(self, alias: str, weights: dict[int, float], shadow: int | None) -> None:
        self.split(alias, weights, shadow)

    def split(self, alias: str, weights: dict[int, float], shadow: int | None) -> None:
        traffic = Traffic(weights, "user", "s", Shadow(shadow, 0.5) if shadow else None)
        live = self.model.all_live()
        named = {(ALIAS_OF[alias], number) for number in (*weights, *([shadow] if shadow else []))}
        try:
            self.registry.conduct.split(alias, traffic)
        except AdapterNotFound:
            assert alias not in self.model.aliases or not named <= live
        else:
            assert alias in self.model.aliases and named <= live
            self.model.splits[alias] = traffic

    @rule(alias=ALIASES)
    def end_split(self, alias: str) -> None:
        if alias in self.model.aliases:
            self.registry.conduct.end_split(alias)
            self.model.splits.pop(alias, None)

    @rule(
        name=NAMES,
        number=st.integers(0, 3),
        changes=st.dictionaries(st.sampled_from("xy"), st.none() | st.integers(0, 9), min_size=1),
    )
    def set_profile(self, name: str, number: int, changes: dict[str, object]) -> None:
        try:
            self.registry.conduct.change_profile(name, number, changes)
        except AdapterNotFound:
            assert not self.model.set_profile(name, number, changes)
        else:
            assert self.model.set_profile(name, number, changes)

    @rule(name=NAMES, is_pinned=st.booleans())
    def pin(self, name: str, is_pinned: bool) -> None:
        try:
            self.registry.set_pinned(name, is_pinned)
        except AdapterNotFound:
            return
        (self.model.pins.add if is_pinned else self.model.pins.discard)(name)

    @invariant()
    def aliases_are_split_as_they_should_be(self) -> None:
        found = {a.alias: a.traffic for a in self.registry.pointers.aliases() if a.traffic is not None}
        assert found == self.model.splits
        for alias, (name, version) in self.model.aliases.items():
            for key in KEYS if alias in found else KEYS[:1]:
                side = self.registry.conduct.side(alias, key)
                if alias not in found:
                    assert side is None
                    continue
                expected = found[alias].side(alias, key, found[alias].weights.keys())
                assert side is not None and str(side[0]) == f"{name}@{expected or version}"
                shadow = found[alias].shadow
                assert (side[1] and side[1].version) == (shadow and shadow.version)

    @invariant()
    def profiles_are_what_was_said(self) -> None:
        for name, number in self.model.all_live():
            layers = self.registry.conduct.profile(self.registry.entry(f"{name}@{number}").ref)
            assert layers.version == self.model.profiles.get((name, number), {})
            assert layers.adapter == self.model.profiles.get((name, 0), {})

    @invariant()
    def pins_are_kept(self) -> None:
        assert {
            e.ref.name for e in self.registry.entries(has_candidates=True) if e.is_pinned
        } == self.model.pins


TestConduct = ConductMachine.TestCase
TestConduct.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_machine_notices_a_split_that_outlives_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: tuple[Any, ...] = tuple(t for t in ledger_conduct.TRIGGERS if "version_removed" not in t)
    monkeypatch.setattr("adapters.ledger.TRIGGERS", kept)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            ConductMachine,
            settings=settings(
                TestConduct.settings, phases=[Phase.generate], max_examples=300, derandomize=True
            ),
        )
