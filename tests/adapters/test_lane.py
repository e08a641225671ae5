"""Copies beside the steps: who may read a slot when, whatever the two streams do. The device is a fake one; tests/gpu
has a real one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from adapters.copies import Copies, Ready
from adapters.errors import AdapterError
from adapters.lane import InPlace, Lane, SideLane, lane_of
from adapters.mover import Mover
from adapters.moves import Load, Moved, MoveFailed, Tier
from adapters.sites import Site
from adapters.slots import PageKey, SlotBank
from adapters.staging import StagedSite
from tests.support.fake_streams import FakeEvent, FakeStreams
from tests.support.lora import CPU, make_ref, make_weights

SITES = {name: Site(name, 32, 40, "language") for name in "pqr"}
SLICE = 8 * (32 + 40) * 4
"""Bytes of one of the three sites at rank 8."""


class Stand:
    """A bank with somebody in slot 0 throughout, so that its pages stay; and the copies of slot 1."""

    def __init__(self, lane: Lane | None = None) -> None:
        self.streams = FakeStreams()
        self.bank = SlotBank(SITES, 3, 64, torch.float32, CPU)
        self.bank.write(0, make_weights(99, dict.fromkeys("pqr", 8), SITES))
        self.copies = Copies(self.bank, lane or SideLane(self.streams))

    def add(self, seed: int, slot: int = 1, rank: int = 8, *, is_dora: bool = False) -> None:
        weights = make_weights(seed, dict.fromkeys("pqr", rank), SITES, is_dora=is_dora)
        load = Load(make_ref(f"a{seed}"), slot)
        self.copies.add([Ready(load, self.bank.stage(weights), 0.5, Tier.DISK)])

    def step(self, slot: int = 1) -> list[Tensor]:
        """Launch one: what it reads of the slot, once it has run."""
        seen: list[Tensor] = []
        shelf = self.bank.shelf("r")  # written last
        pages = shelf.pages[shelf.forms[slot].key]
        parts = [pages.a[slot], pages.b[slot]]
        self.streams.steps.launch(lambda: seen.extend(part.clone() for part in parts))
        return seen


def numbers(seed: int) -> list[Tensor]:
    """What a step reads of an adapter that is wholly there."""
    alone = SlotBank(SITES, 3, 64, torch.float32, CPU)
    alone.write(1, make_weights(seed, dict.fromkeys("pqr", 8), SITES))
    pages = alone.shelf("r").pages[PageKey(8, torch.float32)]
    return [pages.a[1].clone(), pages.b[1].clone()]


def is_same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("rank", [8, 5, 16])
def test_a_slot_is_seen_at_the_boundary_that_finds_its_last_slice_over(rank: int, is_dora: bool) -> None:
    stand = Stand()
    stand.bank.connect(lambda name: torch.ones(40, 32))
    stand.add(7, rank=rank, is_dora=is_dora)
    results: list[object] = []
    for _ in range(6):  # three slices, and then nothing moves
        results += stand.copies.advance(1)
        assert not results and not stand.bank.is_loaded(1)
        assert stand.bank.shelf("p").layout.forms[1] is None
        assert stand.copies.is_busy
    stand.streams.run()
    assert not stand.bank.is_loaded(1)  # over, and nobody has looked yet
    (moved,) = stand.copies.advance(1)
    assert isinstance(moved, Moved) and stand.bank.is_loaded(1) and not stand.copies.is_busy
    assert set(moved.seconds) == {"read", "copy"} and moved.seconds["copy"] >= 0
    whole = SlotBank(SITES, 3, 64, torch.float32, CPU)
    whole.connect(lambda name: torch.ones(40, 32))
    whole.write(1, make_weights(7, dict.fromkeys("pqr", rank), SITES, is_dora=is_dora))
    for name in SITES:
        ours, theirs = stand.bank.shelf(name), whole.shelf(name)
        kept = PageKey(max(rank, 8), torch.float32)
        assert torch.equal(ours.pages[kept].a[1], theirs.pages[kept].a[1])
        assert torch.equal(ours.pages[kept].b[1], theirs.pages[kept].b[1])
        if ours.scale is not None and theirs.scale is not None:
            assert torch.equal(ours.scale[1], theirs.scale[1])
        assert (ours.scale is None) == (theirs.scale is None) == (not is_dora)


def swap(stand: Stand) -> tuple[list[Tensor], list[Tensor]]:
    """Somebody leaves slot 1 while a step on it is still under way, and another one comes; what both steps read.
    The copies' stream runs whenever it can, the steps' as late as it may."""
    stand.add(1)
    stand.copies.advance(None)
    stand.streams.run()
    last_step = stand.step()
    stand.bank.clear(1)
    stand.add(2)
    for _ in range(5):
        stand.copies.advance(SLICE)
        stand.streams.copies.run()
    stand.streams.run()
    stand.copies.advance(SLICE)
    assert stand.bank.is_loaded(1)
    first_step = stand.step()
    stand.streams.run()
    return last_step, first_step


def test_a_step_under_way_reads_the_old_tenant_to_its_end() -> None:
    old, new = swap(Stand())
    assert is_same(old, numbers(1)) and is_same(new, numbers(2))


class Hasty(SideLane[FakeEvent]):
    """Does not wait for the steps."""

    @contextmanager
    def slice(self) -> Iterator[None]:
        with self._streams.use_copies():
            yield


def test_a_lane_that_does_not_wait_for_the_steps_would_be_seen() -> None:
    stand = Stand()
    stand.copies = Copies(stand.bank, Hasty(stand.streams))
    old, _ = swap(stand)
    assert not is_same(old, numbers(1))


def test_steps_do_not_wait_for_copies_while_sequences_run() -> None:
    stand = Stand()
    stand.add(3)
    for _ in range(5):
        stand.copies.advance(SLICE)
        stand.step(0)
        assert stand.streams.steps.run()  # to its end, though the copies' stream has not begun


def test_where_nobody_waits_the_slot_is_there_at_once_and_the_next_step_comes_after_the_copy() -> None:
    stand = Stand()
    stand.add(4)
    (moved,) = stand.copies.advance(None)
    assert isinstance(moved, Moved) and stand.bank.is_loaded(1)
    seen = stand.step()
    assert not stand.streams.steps.run() and not seen
    stand.streams.run()
    assert is_same(seen, numbers(4))


def test_a_copy_that_sequences_found_under_way_ends_when_they_have_left() -> None:
    stand = Stand()
    stand.add(4)
    for _ in range(4):
        assert stand.copies.advance(SLICE) == []
    assert len(stand.copies.advance(None)) == 1
    seen = stand.step()
    stand.streams.run()
    assert is_same(seen, numbers(4))


def test_the_next_load_is_launched_while_the_last_is_not_over_and_both_end_in_order() -> None:
    stand = Stand()
    stand.add(5, slot=1)
    stand.add(6, slot=2)
    for _ in range(3):
        assert stand.copies.advance(2 * SLICE) == []
    assert stand.bank.shelf("r").forms[2].rank == 8  # its last site is launched
    stand.streams.run()
    assert [result.move.slot for result in stand.copies.advance(1)] == [1, 2]


def test_a_failed_read_is_told_though_a_copy_before_it_is_not_over() -> None:
    stand = Stand()
    stand.add(5)
    for _ in range(4):
        stand.copies.advance(SLICE)
    error = AdapterError("broken")
    stand.copies.add([Ready(Load(make_ref("b"), 2), error, 0.0, Tier.DISK)])
    assert stand.copies.advance(SLICE) == [MoveFailed(Load(make_ref("b"), 2), error)]


def test_where_a_slice_fails_the_slot_is_empty_and_later_steps_come_after_what_was_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand = Stand()
    write = stand.bank._write_site

    def fail_at_q(shelf: object, slot: int, site: StagedSite) -> None:
        write(shelf, slot, site)  # type: ignore[arg-type]
        if shelf is stand.bank.shelf("q"):
            raise MemoryError

    monkeypatch.setattr(stand.bank, "_write_site", fail_at_q)
    stand.add(8)
    stand.copies.advance(1)
    (failed,) = stand.copies.advance(1)
    assert isinstance(failed, MoveFailed)
    assert not stand.bank.is_loaded(1) and stand.bank.slot_bytes(1) == 0 and not stand.copies.is_busy
    seen = stand.step(0)
    assert not stand.streams.steps.run() and not seen
    stand.streams.run()
    assert seen


def test_a_device_that_answers_with_an_error_leaves_the_slot_empty() -> None:
    stand = Stand()
    stand.add(8)
    for _ in range(4):
        stand.copies.advance(SLICE)
    for event in stand.streams.copies.events:
        event.error = RuntimeError("an illegal memory access was encountered")
    (failed,) = stand.copies.advance(SLICE)
    assert isinstance(failed, MoveFailed)
    assert not stand.bank.is_loaded(1) and stand.bank.slot_bytes(1) == 0 and not stand.copies.is_busy


def test_a_mover_goes_on_copying_until_the_slot_is_there() -> None:
    """What keeps an engine without messages from going to sleep on a copy that is not over."""
    streams = FakeStreams()
    bank = SlotBank(SITES, 1, 64, torch.float32, CPU)
    weights = make_weights(1, dict.fromkeys("pqr", 8), SITES)
    mover = Mover(bank, lambda ref: weights, 1 << 20, lambda: None, lane=SideLane(streams))
    load = Load(make_ref("a"), 0)
    mover.start([load])
    mover.close()  # its read is over
    for _ in range(5):
        assert mover.finished(SLICE) == [] and mover.is_copying
    with pytest.raises(ValueError, match="is loading"):
        mover.start([load])
    streams.run()
    assert [result.move for result in mover.finished(SLICE)] == [load]
    assert not mover.is_copying and bank.is_loaded(0)


def test_a_cpu_copies_in_place() -> None:
    assert isinstance(lane_of(CPU), InPlace)
