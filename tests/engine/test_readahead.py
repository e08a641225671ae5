"""The tiers together: read before a slot is free, nobody leaves for what cannot come, bytes as reported."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from adapters.errors import AdapterRejected, InsufficientMemory, RejectReason
from adapters.host_tier import HostTier
from adapters.mover import Mover
from adapters.ref import AdapterRef
from adapters.residency import Residency
from adapters.room import Room
from adapters.sites import Site
from adapters.slots import SlotBank
from adapters.weights import AdapterWeights
from engine.messages import LoadAdapter, UnloadAdapter, UnloadReport
from engine.observer import AdapterEvicted, AdapterMoved, AdapterMoveFailed
from engine.swaps import AdapterSwaps
from tests.support.lora import CPU, make_ref, make_weights
from tests.support.serving import Recorder

SITES = {"p": Site("p", 64, 96, "language")}
ONE = 8 * (64 + 96) * 4  # bytes of a rank-8 adapter
TIMEOUT_S = 20.0
A, B, C, D, E = (make_ref(name) for name in "abcde")


class NoProbe:
    def passes(self, *_: object) -> Iterator[None]:
        return iter(())


class Desk:
    """Swaps over a small bank, stepped by the test; reads can be held up and made to fail."""

    def __init__(
        self, num_slots: int = 2, host_bytes: int = 10 * ONE, device_bytes: int | None = None
    ) -> None:
        self.bank = SlotBank(SITES, num_slots, 64, torch.float32, CPU)
        self.residency = Residency(num_slots, Room(device_bytes))
        self.reads: list[str] = []
        self.ranks: dict[str, int] = {}
        self.failures: dict[str, BaseException] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.woken = threading.Semaphore(0)
        self.mover = Mover(self.bank, self.read, host_bytes, self.woken.release)
        self.recorder = Recorder()
        self.swaps = AdapterSwaps(self.residency, self.mover, self.bank, cast(Any, NoProbe()), self.recorder)

    def read(self, ref: AdapterRef) -> AdapterWeights:
        self.reads.append(ref.name)
        assert self.gate.wait(TIMEOUT_S)
        if ref.name in self.failures:
            raise self.failures[ref.name]
        return make_weights(len(ref.name), {"p": self.ranks.get(ref.name, 8)}, SITES)

    def step(self, *wanted: AdapterRef) -> list[tuple[AdapterRef, Exception]]:
        failures = self.swaps.settle(has_running=False)
        self.swaps.start(wanted)
        return list(failures)

    def until(self, *wanted: AdapterRef, resident: AdapterRef) -> None:
        """Steps until it is on the device."""
        while self.residency.slot_of(resident) is None:
            assert self.step(*wanted) == []
            if self.residency.slot_of(resident) is None:
                assert self.woken.acquire(timeout=TIMEOUT_S)

    def bring(self, *refs: AdapterRef) -> None:
        for ref in refs:
            self.until(ref, resident=ref)

    def residents(self) -> set[AdapterRef]:
        return {resident.ref for resident in self.residency.residents()}

    def unload(self, ref: AdapterRef) -> UnloadReport:
        replies: list[UnloadReport | Exception] = []
        self.swaps.request_unload(UnloadAdapter(ref, TIMEOUT_S, replies.append), time.monotonic())
        self.step()
        self.swaps.send_answers()
        (report,) = replies
        assert isinstance(report, UnloadReport)
        return report


@pytest.fixture
def desks() -> Iterator[list[Desk]]:
    desks: list[Desk] = []
    yield desks
    for desk in desks:
        desk.gate.set()
        desk.mover.close()


def desk_of(desks: list[Desk], **options: int) -> Desk:
    desks.append(Desk(**options))
    return desks[-1]


# ---- read ahead ------------------------------------------------------------------------------------------------


def test_a_waiting_adapter_is_read_and_checked_while_every_slot_is_in_use(desks: list[Desk]) -> None:
    desk = desk_of(desks)
    desk.bring(A, B)
    for ref in (A, B):
        desk.residency.hold(ref)
    while desk.woken.acquire(blocking=False):
        pass
    desk.step(C)
    assert desk.woken.acquire(timeout=TIMEOUT_S)
    assert desk.mover.is_on_host(C)
    assert desk.residents() == {A, B}
    desk.residency.release(B)
    desk.until(C, resident=C)
    assert desk.residents() == {A, C}
    assert desk.reads == ["a", "b", "c"], "it was read once"


def test_nobody_leaves_before_the_successor_has_been_read(desks: list[Desk]) -> None:
    desk = desk_of(desks)
    desk.bring(A, B)
    desk.gate.clear()
    desk.step(C)
    desk.step(C)
    assert desk.residents() == {A, B}, "idle, and yet still of use while c is read"
    desk.gate.set()
    desk.until(C, resident=C)
    assert desk.residents() == {B, C}


@pytest.mark.parametrize(
    "error",
    [AdapterRejected(RejectReason.NON_FINITE, "NaN in it"), MemoryError()],
    ids=["broken", "too large"],
)
def test_a_load_that_cannot_come_evicts_nothing(desks: list[Desk], error: BaseException) -> None:
    desk = desk_of(desks)
    desk.bring(A, B)
    desk.failures["c"] = error
    replies: list[object] = []
    desk.swaps.request_load(LoadAdapter(C, False, replies.append), time.monotonic())
    failures: list[tuple[AdapterRef, Exception]] = []
    while not failures:
        failures = desk.step(*([] if replies else [C]))
        assert failures or desk.woken.acquire(timeout=TIMEOUT_S)
    desk.swaps.send_answers()
    ((ref, found),) = failures
    assert ref == C and replies == [found]
    assert isinstance(found, AdapterRejected | InsufficientMemory)
    assert desk.residents() == {A, B}
    assert not [event for event in desk.recorder.events if isinstance(event, AdapterEvicted)]
    assert len([event for event in desk.recorder.events if isinstance(event, AdapterMoveFailed)]) == 1
    desk.failures.clear()
    desk.until(C, resident=C)


def test_what_the_host_tier_cannot_keep_is_loaded_all_the_same(desks: list[Desk]) -> None:
    desk = desk_of(desks, host_bytes=0)
    desk.bring(A, B)
    desk.until(C, resident=C)
    assert desk.reads.count("c") == 2, "once to know that it can come, once to bring it"


def test_each_is_read_ahead_once_while_it_waits_however_small_the_host_tier(desks: list[Desk]) -> None:
    desk = desk_of(desks, num_slots=1, host_bytes=ONE)
    desk.bring(A)
    desk.residency.hold(A)
    for _ in range(20):
        desk.step(B, C, D, E)
        desk.woken.acquire(timeout=0.02)
    assert sorted(desk.reads) == ["a", "b", "c", "d", "e"]


def test_a_free_slot_is_taken_at_once(desks: list[Desk]) -> None:
    desk = desk_of(desks)
    desk.step(A)
    assert [load.ref for load in desk.residency.loading()] == [A]


# ---- bytes -----------------------------------------------------------------------------------------------------


def test_the_bytes_that_an_unload_reports_are_those_that_every_tier_gives_back(desks: list[Desk]) -> None:
    desk = desk_of(desks, num_slots=3)
    desk.ranks["c"] = 16
    desk.bring(A, B, C)
    full = desk.bank.num_bytes
    assert full > 0
    freed = []
    for ref in (A, B, C):
        device, host = desk.bank.num_bytes, desk.mover.host_num_bytes
        report = desk.unload(ref)
        assert report.freed_device_bytes == device - desk.bank.num_bytes
        assert report.freed_host_bytes == host - desk.mover.host_num_bytes > 0
        freed.append(report.freed_device_bytes)
    assert freed[0] == 0, "b still uses the pages of its rank"
    assert sum(freed) == full and desk.bank.num_bytes == desk.mover.host_num_bytes == 0


def test_an_unloaded_adapter_stays_unloaded_until_it_is_wanted(desks: list[Desk]) -> None:
    desk = desk_of(desks)
    desk.bring(A)
    desk.unload(A)
    for _ in range(5):
        desk.step()
    assert desk.residents() == set() and not desk.mover.is_on_host(A)
    desk.bring(A)
    assert [type(event) for event in desk.recorder.events].count(AdapterMoved) == 2


# ---- the host tier ---------------------------------------------------------------------------------------------


def test_a_scan_does_not_wash_out_what_is_in_steady_use(desks: list[Desk]) -> None:
    desk = desk_of(desks)
    staged = desk.bank.stage(make_weights(0, {"p": 8}, SITES))
    tier = HostTier(4 * ONE)
    steady = [make_ref("x"), make_ref("y")]
    for ref in steady:
        tier.put(ref, staged)
        tier.get(ref)
    for i in range(50):
        tier.put(make_ref(f"scan-{i}"), staged)
        assert tier.num_bytes <= 4 * ONE
    assert all(ref in tier for ref in steady)
    for i in range(4):  # a new steady set takes their place
        tier.put(make_ref(f"new-{i}"), staged)
        tier.get(make_ref(f"new-{i}"))
    assert not any(ref in tier for ref in steady)


# ---- the device's limit in bytes -------------------------------------------------------------------------------


PAGE = 4 * ONE
"""Bytes of rank 8's pages where there are four slots; rank 16's are twice as many."""


def test_the_bank_never_takes_more_than_its_limit_whoever_comes(desks: list[Desk]) -> None:
    desk = desk_of(desks, num_slots=4, device_bytes=2 * PAGE)
    desk.ranks.update(b=16, d=16)
    for ref in (A, B, C, D, E, A):
        desk.bring(ref)
        assert desk.bank.num_bytes <= 2 * PAGE
    assert desk.residents() == {A, E}, "rank 8 and rank 16 have no room together"
    assert desk.unload(A).freed_device_bytes == 0, "its pages are E's too"
    assert desk.unload(E).freed_device_bytes == PAGE
    assert desk.bank.num_bytes == 0


def test_one_of_large_rank_waits_for_those_in_use_and_then_takes_their_room(desks: list[Desk]) -> None:
    desk = desk_of(desks, num_slots=4, device_bytes=2 * PAGE)
    desk.ranks["b"] = 16
    desk.bring(A, C)
    desk.residency.hold(A)
    while desk.woken.acquire(blocking=False):
        pass
    desk.step(B)
    assert desk.woken.acquire(timeout=TIMEOUT_S)
    for _ in range(3):
        assert desk.step(B) == []
    assert desk.residents() == {A, C}, "it has been read; nobody has left for it"
    desk.residency.release(A)
    desk.until(B, resident=B)
    assert desk.residents() == {B}


@pytest.mark.parametrize("is_asked_by_an_admin", [True, False])
def test_one_that_never_fits_fails_with_the_limit_and_evicts_nothing(
    desks: list[Desk], is_asked_by_an_admin: bool
) -> None:
    desk = desk_of(desks, num_slots=4, device_bytes=2 * PAGE)
    desk.ranks["b"] = 32
    desk.bring(A, C)
    replies: list[object] = []
    wanted = () if is_asked_by_an_admin else (B,)
    if is_asked_by_an_admin:
        desk.swaps.request_load(LoadAdapter(B, False, replies.append), time.monotonic())
    failures: list[tuple[AdapterRef, Exception]] = []
    deadline_s = time.monotonic() + TIMEOUT_S
    while not failures and time.monotonic() < deadline_s:
        failures = desk.step(*wanted)
        desk.woken.acquire(timeout=0.01)
    ((ref, error),) = failures
    assert ref == B and isinstance(error, InsufficientMemory)
    assert f"{4 * PAGE} bytes" in str(error) and f"allows {2 * PAGE}" in str(error)
    desk.swaps.send_answers()
    assert replies == ([error] if is_asked_by_an_admin else [])
    assert desk.residents() == {A, C}


def test_beside_pinned_ones_that_leave_no_room_it_fails_until_one_is_unpinned(desks: list[Desk]) -> None:
    desk = desk_of(desks, num_slots=4, device_bytes=2 * PAGE)
    desk.ranks["b"] = 16
    desk.bring(A)
    desk.residency.pin(A)
    failures: list[tuple[AdapterRef, Exception]] = []
    deadline_s = time.monotonic() + TIMEOUT_S
    while not failures and time.monotonic() < deadline_s:
        failures = desk.step(B)
        desk.woken.acquire(timeout=0.01)
    assert "unpin" in str(failures[0][1])
    desk.residency.unpin(A)
    desk.step()  # what the last step has found is told
    desk.until(B, resident=B)
    assert desk.residents() == {B}


def test_what_the_host_cannot_keep_has_its_bytes_counted_all_the_same(desks: list[Desk]) -> None:
    desk = desk_of(desks, num_slots=4, host_bytes=ONE - 1, device_bytes=2 * PAGE)
    desk.ranks["b"] = 16
    desk.bring(A, B)
    assert desk.residents() == {B}
    assert desk.bank.num_bytes == 2 * PAGE
