"""Adapters as living things: a real engine and registry against a dictionary, over everything that can be done to them.

Whatever was registered, loaded, promoted, split, pinned, deleted or restarted before, a request is answered by the
version that the model names, with that version's very tokens, or not at all; and nothing of it stays behind.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from adapters.errors import AdapterNotFound
from adapters.package import package_digest
from adapters.ref import AdapterRef
from adapters.registry import Registry
from base.pocket import CHECKPOINT
from engine.config import EngineConfig
from engine.stream import Delta
from tests.adapters.test_conduct_machine import ConductMachine, ConductModel
from tests.adapters.test_registry_machine import ALIASES, NAMES
from tests.support.pointer_model import apply_to
from tests.support.serving import Ask, Rig, gather

SAMPLES = Path(__file__).resolve().parents[2] / "adapters" / "samples"
PACKAGES = [str(SAMPLES / name) for name in ("french", "json", "patterns")]
DIGESTS = [package_digest(Path(folder)) for folder in PACKAGES]
ASK = Ask("Hello!", num_tokens=6)
CONFIG = EngineConfig(num_slots=2, max_model_len=256, kv_bytes=4 << 20)
USERS = st.sampled_from([f"user-{i}" for i in range(6)])

Tokens = dict[str, tuple[int, ...]]
"""What each content answers, by digest; the base's under the empty one."""


@pytest.fixture(scope="module", autouse=True)
def _references(tmp_path_factory: pytest.TempPathFactory) -> None:
    rig = Rig(str(CHECKPOINT), tmp_path_factory.mktemp("reference"), CONFIG)
    rig.register({str(i): Path(folder) for i, folder in enumerate(PACKAGES)})
    for name in ("base", "0", "1", "2"):
        ref = rig.registry.resolve(name)
        LivingMachine.tokens[ref.digest] = asyncio.run(rig.answer(_ask(ref))).token_ids
    rig.close()
    assert len(set(LivingMachine.tokens.values())) == 4


def _ask(ref: AdapterRef) -> Ask:
    return Ask(ASK.text, None if ref.is_base else str(ref), num_tokens=ASK.num_tokens)


class LivingMachine(ConductMachine):
    tokens: Tokens = {}

    def __init__(self) -> None:
        super().__init__()
        self.model = ConductModel(DIGESTS)

    def open(self) -> Registry:
        self.rig = Rig(str(CHECKPOINT), self.root, CONFIG)
        return self.rig.registry

    def act(self, *act: Any) -> None:
        """As the server does it: what is gone leaves the device too."""
        before = self._refs()
        self.model.apply(act)
        apply_to(self.registry, PACKAGES, act)
        for ref in before - self._refs():
            asyncio.run(self.rig.engine.unload_adapter(ref))

    def _refs(self) -> set[AdapterRef]:
        entries = self.registry.entries(has_candidates=True)
        return {v.ref for e in entries for v in self.registry.versions(e.ref.name)}

    @initialize(packages=st.permutations(range(3)))
    def begin_with_three_versions(self, packages: list[int]) -> None:
        for package in packages:
            self.act("register", "a", package)
        self.act("point", "prod", 1)
        self.split("prod", {1: 1.0, 2: 1.0}, None)

    @rule()
    def reopen(self) -> None:
        """A restart: nobody's lease survives it, and nothing is on the device."""
        self.rig.close()
        self.leased.clear()
        self.registry = self.open()

    # ---- the device --------------------------------------------------------------------------------------------

    @rule(name=NAMES, number=st.integers(1, 3), should_pin=st.booleans())
    def load(self, name: str, number: int, should_pin: bool) -> None:
        ref = self._find(f"{name}@{number}")
        if ref is not None and not self._pinned() - {ref}:
            asyncio.run(self.rig.engine.load_adapter(ref, pin=should_pin))
            assert ref in self._resident()

    @rule(name=NAMES, number=st.integers(1, 3))
    def unload(self, name: str, number: int) -> None:
        ref = self._find(f"{name}@{number}")
        if ref is not None:
            was_there = ref in self._resident()
            report = asyncio.run(self.rig.engine.unload_adapter(ref))
            assert (report.freed_device_bytes > 0) <= was_there
            assert ref not in self._resident()

    def _resident(self) -> set[AdapterRef]:
        return {slot.ref for slot in self.rig.engine.status().slots if slot.ref is not None}

    def _pinned(self) -> set[AdapterRef]:
        return {
            slot.ref for slot in self.rig.engine.status().slots if slot.ref is not None and slot.is_pinned
        }

    # ---- requests ----------------------------------------------------------------------------------------------

    @rule(name=st.one_of(NAMES, ALIASES, st.just("base")), user=USERS)
    def request(self, name: str, user: str) -> None:
        ref, expected = self._drawn(name, user), self._expected(name, user)
        assert (ref and ref.digest) == expected
        if ref is not None:
            with self.registry.lease(ref):
                answer = asyncio.run(self.rig.answer(_ask(ref)))
            assert answer.token_ids == self.tokens[ref.digest]

    def request_all(self, name: str) -> None:
        for i in range(6):
            self.request(name, f"user-{i}")

    @rule(name=st.one_of(NAMES, ALIASES), user=USERS)
    def cancel(self, name: str, user: str) -> None:
        ref = self._drawn(name, user)
        if ref is not None:
            with self.registry.lease(ref):
                asyncio.run(self._begin_and_leave(ref))

    async def _begin_and_leave(self, ref: AdapterRef) -> None:
        stream = self.rig.submit(Ask(ASK.text, str(ref), num_tokens=60))
        async for item in stream:
            if isinstance(item, Delta):
                break
        stream.abort()

    @rule(first=st.one_of(NAMES, ALIASES), number=st.integers(1, 3), user=USERS)
    def delete_under_a_request(self, first: str, number: int, user: str) -> None:
        """A request that has begun ends with its version's tokens, though the version is deleted meanwhile."""
        ref = self._drawn(first, user)
        if ref is None:
            return
        with self.registry.lease(ref):
            expected = self.tokens[ref.digest]
            assert asyncio.run(self._deleted_meanwhile(ref, number)) == expected
        asyncio.run(self.rig.engine.unload_adapter(ref))

    async def _deleted_meanwhile(self, ref: AdapterRef, number: int) -> tuple[int, ...]:
        stream = self.rig.submit(_ask(ref))
        task = asyncio.create_task(gather(stream))
        while not self.rig.engine.status().running and not task.done():
            await asyncio.sleep(0.001)
        self.model.apply(("remove_version", ref.name, number))
        apply_to(self.registry, PACKAGES, ("remove_version", ref.name, number))
        return (await task).token_ids

    def _find(self, name: str) -> AdapterRef | None:
        try:
            return self.registry.resolve(name)
        except AdapterNotFound:
            return None

    def _drawn(self, name: str, user: str) -> AdapterRef | None:
        """As the server's Draw does it."""
        side = self.registry.conduct.side(name, user)
        return self._find(name) if side is None else side[0]

    def _expected(self, name: str, user: str) -> str | None:
        """The digest of what should answer; None for nobody."""
        if name == "base":
            return ""
        model = self.model
        owner, number = model.aliases.get(name, (name, 0))
        if name in model.splits:
            split = model.splits[name]
            number = split.side(name, user, split.weights.keys()) or number
        known = model.names.get(owner)
        number = number or (known.current if known else 0)
        return model._digest(known, number) if known and number in known.live else None

    @invariant()
    def nothing_stays_behind(self) -> None:
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            status = self.rig.engine.status()
            if not (status.kv_blocks_used or status.running or status.waiting):
                break
            time.sleep(0.002)
        assert (status.kv_blocks_used, dict(status.running), dict(status.waiting)) == (0, {}, {})
        assert all(slot.num_requests == 0 for slot in status.slots)

    def teardown(self) -> None:
        self.rig.close()
        shutil.rmtree(self.root)


TestLiving = LivingMachine.TestCase
TestLiving.settings = settings(
    max_examples=3, stateful_step_count=14, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_machine_notices_an_engine_that_serves_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control: every third request is answered by whoever came first."""
    submit, seen = Rig.submit, list[AdapterRef]()

    def swapped(rig: Rig, ask: Ask, **params: object) -> Any:
        ref = rig.ref(ask)
        seen.append(ref)
        wrong = next((r for r in seen if r.digest != ref.digest and rig.registry.has(r)), None)
        return submit(
            rig, Ask(ask.text, str(wrong) if wrong and len(seen) % 3 == 0 else ask.adapter), **params
        )

    machine = LivingMachine()
    try:
        machine.begin_with_three_versions([0, 1, 2])
        machine.request("a", "user-0")
        monkeypatch.setattr(Rig, "submit", swapped)
        with pytest.raises(AssertionError):
            machine.request_all("prod")
    finally:
        machine.teardown()
