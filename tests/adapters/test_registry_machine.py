"""The registry against a model of it: a dictionary, in which nothing can go wrong."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from adapters import ledger_pointers
from adapters.errors import AdapterNotFound
from adapters.leases import Lease
from adapters.package import package_digest
from adapters.registry import Registry
from adapters.store import PackageStore
from adapters.validation import Limits
from tests.support import pointer_model
from tests.support.packages import make_package, tiny_sites
from tests.support.pointer_model import ALIAS_OF, Act, Model, apply_to, picture_of

SITES = tiny_sites()
NAMES, ALIASES = st.sampled_from(pointer_model.NAMES), st.sampled_from(sorted(ALIAS_OF))
SOURCE = Path(tempfile.mkdtemp(prefix="lorikeet-packages-"))
PACKAGES = [make_package(SOURCE / str(seed), seed=seed) for seed in range(3)]
DIGESTS = [package_digest(folder) for folder in PACKAGES]
atexit.register(shutil.rmtree, SOURCE, ignore_errors=True)  # not with this file: others walk on its packages


class RegistryMachine(RuleBasedStateMachine):
    leases: Bundle[Lease] = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="lorikeet-registry-"))
        self.registry = self.open()
        self.model = Model(DIGESTS)
        self.leased: list[Lease] = []

    def open(self) -> Registry:
        return Registry(self.root, SITES, Limits(), [])

    def act(self, *act: Any) -> None:
        self.model.apply(act)
        apply_to(self.registry, [str(package) for package in PACKAGES], act)

    @initialize(packages=st.permutations(range(3)))
    def begin_with_three_versions(self, packages: list[int]) -> None:
        """So that a short walk has somewhere to go back to."""
        for package in packages:
            self.act("register", "a", package)

    @rule(name=NAMES, package=st.sampled_from(range(3)), what=st.sampled_from(["register", "stage"]))
    def take_in(self, what: str, name: str, package: int) -> None:
        self.act(what, name, package)

    @rule(name=NAMES, number=st.integers(1, 3))
    def promote(self, name: str, number: int) -> None:
        self.act("promote", name, number)

    @rule(name=st.one_of(NAMES, ALIASES))
    def roll_back(self, name: str) -> None:
        self.act("roll_back", name, 0)

    @rule(alias=ALIASES, number=st.integers(1, 3))
    def point(self, alias: str, number: int) -> None:
        self.act("point", alias, number)

    @rule(alias=ALIASES)
    def remove_alias(self, alias: str) -> None:
        self.act("remove_alias", alias, 0)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.act("remove", name, 0)

    @rule(name=NAMES, number=st.integers(1, 3))
    def remove_version(self, name: str, number: int) -> None:
        self.act("remove_version", name, number)

    @rule(target=leases, name=NAMES)
    def take(self, name: str) -> Lease | MultipleResults[Lease]:
        try:
            lease = self.registry.lease(self.registry.resolve(name))
        except AdapterNotFound:
            return multiple()
        self.leased.append(lease)
        return lease

    @rule(lease=consumes(leases))
    def give_back(self, lease: Lease) -> None:
        lease.release()
        if lease in self.leased:
            self.leased.remove(lease)

    @rule()
    def reopen(self) -> None:
        """A restart: nobody's lease survives it."""
        self.registry.close()
        self.leased.clear()
        self.registry = self.open()

    @invariant()
    def names_mean_what_they_should(self) -> None:
        assert picture_of(self.registry) == self.model.picture()

    @invariant()
    def the_store_holds_what_is_meant_or_leased_and_no_more(self) -> None:
        for thread in threading.enumerate():
            if thread.name == "registry-reaper":
                thread.join()
        entries = self.registry.entries(has_candidates=True)
        meant = {v.ref.digest for e in entries for v in self.registry.versions(e.ref.name)}
        stored = {entry.name for entry in os.scandir(self.root / "packages") if entry.name != ".lock"}
        assert stored == meant | {lease.ref.digest for lease in self.leased}

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.root)


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_machine_notices_a_store_that_forgets_to_delete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackageStore, "remove", lambda store, digest: True)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            RegistryMachine,
            settings=settings(TestRegistry.settings, phases=[Phase.generate], max_examples=50),
        )


def test_the_model_notices_a_rollback_that_goes_forwards_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_back = ledger_pointers._step_back

    def forwards(connection: Any, name: str, current: int, history: list[int]) -> int:
        number = step_back(connection, name, current, list(history))
        if number:
            ledger_pointers._write_name(connection, name, number, [*history, current])
        return number

    registry, model = Registry(tmp_path, SITES, Limits(), []), Model(DIGESTS)
    acts: list[Act] = [("register", "a", package) for package in range(3)] + [("roll_back", "a", 0)] * 2
    monkeypatch.setattr(ledger_pointers, "_step_back", forwards)
    agreed = []
    for act in acts:
        model.apply(act)
        apply_to(registry, [str(package) for package in PACKAGES], act)
        agreed.append(picture_of(registry) == model.picture())
    registry.close()
    assert agreed == [True, True, True, True, False]
