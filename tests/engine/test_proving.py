"""What running sequences wait for at one step's boundary: a pass of the probe or a slice of a copy, never more."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Any, cast

import pytest
import torch

from adapters.errors import AdapterRejected, RejectReason
from adapters.mover import Mover
from adapters.ref import AdapterRef
from adapters.residency import Residency
from adapters.sites import Site
from adapters.slots import SlotBank
from engine import swaps as swaps_module
from engine.observer import AdapterMoved, DecodeStalled
from engine.swaps import AdapterSwaps
from tests.support.lora import CPU, make_ref, make_weights
from tests.support.serving import Recorder

SITES = {name: Site(name, 32, 48, "language") for name in "pqr"}
SLICE = 8 * (32 + 48) * 4
A, B = make_ref("a"), make_ref("b")


class SlowProbe:
    """Three passes for each adapter; may refuse in one of them."""

    def __init__(self) -> None:
        self.passes_done: list[str] = []
        self.refuses: tuple[str, int] | None = None
        self.error: Exception = AdapterRejected(RejectReason.PROBE_MISMATCH, "it answers otherwise")

    def passes(self, ref: AdapterRef, slot: int, proof: object) -> Generator[None, None, None]:
        for number in range(3):
            self.passes_done.append(ref.name)
            if self.refuses == (ref.name, number):
                raise self.error
            if number < 2:
                yield


class Desk:
    def __init__(self) -> None:
        self.bank = SlotBank(SITES, 2, 64, torch.float32, CPU)
        self.residency = Residency(2)
        self.probe = SlowProbe()
        self.recorder = Recorder()
        self.woken = threading.Semaphore(0)
        weights = make_weights(1, dict.fromkeys(SITES, 8), SITES)
        self.mover = Mover(self.bank, lambda ref: weights, 1 << 20, self.woken.release)
        self.swaps = AdapterSwaps(self.residency, self.mover, self.bank, cast(Any, self.probe), self.recorder)

    def read(self, *refs: AdapterRef) -> None:
        """To the point where all that is left is to be done at boundaries."""
        self.swaps.start(refs)
        for _ in refs:
            assert self.woken.acquire(timeout=20)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setitem(swaps_module.SLICE_BYTES, "cpu", SLICE)
    desk = Desk()
    yield desk
    desk.mover.close()


def test_beside_running_sequences_each_boundary_has_one_slice_or_one_pass(desk: Desk) -> None:
    desk.read(A, B)
    boundaries = 0
    while desk.residency.slot_of(A) is None or desk.residency.slot_of(B) is None:
        slices, passes = _sites(desk), len(desk.probe.passes_done)
        assert desk.swaps.settle(has_running=True) == []
        done = _sites(desk) - slices, len(desk.probe.passes_done) - passes
        assert sorted(done) in ([0, 0], [0, 1]), "never both, and never two"
        boundaries += 1
        assert boundaries < 20
    stalls = [event.cause for event in desk.recorder.events if isinstance(event, DecodeStalled)]
    assert stalls.count("adapter_probe") == 6
    assert stalls.count("adapter_copy") >= 6
    assert not desk.swaps.has_work


def _sites(desk: Desk) -> int:
    """Sites written so far, of both slots."""
    return sum(form.rank > 0 for name in SITES for form in desk.bank.shelf(name).forms)


def test_with_nobody_running_all_is_done_at_once(desk: Desk) -> None:
    desk.read(A, B)
    assert desk.swaps.settle(has_running=False) == []
    assert {resident.ref for resident in desk.residency.residents()} == {A, B}
    assert not desk.swaps.has_work
    moved = [event for event in desk.recorder.events if isinstance(event, AdapterMoved)]
    assert [set(event.seconds) for event in moved] == [{"read", "copy", "probe"}] * 2


def test_sequences_that_end_meanwhile_leave_the_rest_to_one_boundary(desk: Desk) -> None:
    desk.read(A)
    desk.swaps.settle(has_running=True)
    assert desk.residency.slot_of(A) is None and desk.swaps.has_work
    desk.swaps.settle(has_running=False)
    assert desk.residency.slot_of(A) is not None


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("error", [None, ZeroDivisionError()])
def test_a_refusal_in_any_pass_empties_the_slot_and_lets_the_next_one_come(
    desk: Desk, number: int, error: Exception | None
) -> None:
    """Also where the probe itself breaks: what was not proved to the end is never served."""
    desk.probe.refuses = ("a", number)
    desk.probe.error = error or desk.probe.error
    desk.read(A, B)
    failures = []
    for _ in range(20):
        failures += desk.swaps.settle(has_running=True)
    ((ref, refusal),) = failures
    assert ref == A and isinstance(refusal, AdapterRejected)
    assert [resident.ref for resident in desk.residency.residents()] == [B]
    assert not desk.bank.is_loaded(0)


def test_a_content_is_proved_once(desk: Desk) -> None:
    desk.read(A)
    desk.swaps.settle(has_running=False)
    count = len(desk.probe.passes_done)
    evict = desk.residency.drop(A)
    assert evict is not None
    desk.mover.start([evict])
    desk.swaps.start([A])  # from the host
    desk.swaps.settle(has_running=False)
    assert desk.residency.slot_of(A) is not None
    assert len(desk.probe.passes_done) == count
