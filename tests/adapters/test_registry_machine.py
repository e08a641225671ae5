"""The registry against a model of it: a dictionary, in which nothing can go wrong."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from adapters.errors import AdapterNotFound
from adapters.leases import Lease
from adapters.package import package_digest
from adapters.registry import Registry
from adapters.store import PackageStore
from adapters.validation import Limits
from tests.support.packages import make_package, tiny_sites

SITES = tiny_sites()
NAMES = st.sampled_from(["a", "b", "org/a"])
SOURCE = Path(tempfile.mkdtemp(prefix="lorikeet-packages-"))
PACKAGES = [make_package(SOURCE / str(seed), seed=seed) for seed in range(3)]
DIGESTS = [package_digest(folder) for folder in PACKAGES]


@pytest.fixture(scope="module", autouse=True)
def _clean_up() -> object:
    yield
    shutil.rmtree(SOURCE)


class RegistryMachine(RuleBasedStateMachine):
    leases: Bundle[Lease] = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="lorikeet-registry-"))
        self.registry = self.open()
        self.numbers: dict[str, dict[str, int]] = {}  # name -> digest -> version, for ever
        self.live: dict[str, list[int]] = {}
        self.current: dict[str, int] = {}
        self.leased: list[Lease] = []

    def open(self) -> Registry:
        return Registry(self.root, SITES, Limits(), [])

    @rule(name=NAMES, package=st.sampled_from(range(3)))
    def register(self, name: str, package: int) -> None:
        numbers = self.numbers.setdefault(name, {})
        number = numbers.setdefault(DIGESTS[package], len(numbers) + 1)
        was_current = self.current.get(name) == number
        entry, is_created = self.registry.register(name, PACKAGES[package])
        assert (entry.ref.version, entry.ref.digest) == (number, DIGESTS[package])
        assert is_created is not was_current
        self.live[name] = sorted({*self.live.get(name, []), number})
        self.current[name] = number

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name not in self.live:
            with pytest.raises(AdapterNotFound):
                self.registry.remove(name)
            return
        assert self.registry.remove(name).ref.version == self.current.pop(name)
        del self.live[name]

    @rule(name=NAMES, number=st.integers(1, 3))
    def remove_version(self, name: str, number: int) -> None:
        if number not in self.live.get(name, []):
            with pytest.raises(AdapterNotFound):
                self.registry.remove(f"{name}@{number}")
            return
        self.registry.remove(f"{name}@{number}")
        self.live[name].remove(number)
        if not self.live[name]:
            del self.live[name], self.current[name]
        elif self.current[name] == number:
            self.current[name] = self.live[name][-1]

    @rule(target=leases, name=NAMES)
    def take(self, name: str) -> Lease | MultipleResults[Lease]:
        if name not in self.live:
            return multiple()
        lease = self.registry.lease(self.registry.resolve(name))
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
        assert {e.ref.name: e.ref.version for e in self.registry.entries()} == self.current
        for name, numbers in self.live.items():
            assert [entry.ref.version for entry in self.registry.versions(name)] == numbers

    @invariant()
    def the_store_holds_what_is_meant_or_leased_and_no_more(self) -> None:
        for thread in threading.enumerate():
            if thread.name == "registry-reaper":
                thread.join()
        meant = {e.ref.digest for name in self.live for e in self.registry.versions(name)}
        stored = {entry.name for entry in os.scandir(self.root / "packages") if entry.name != ".lock"}
        assert stored == meant | {lease.ref.digest for lease in self.leased}

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.root)


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(
    max_examples=8, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_machine_notices_a_store_that_forgets_to_delete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackageStore, "remove", lambda store, digest: True)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            RegistryMachine,
            settings=settings(TestRegistry.settings, phases=[Phase.generate], max_examples=50),
        )
