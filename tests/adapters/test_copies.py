"""A copy into a slot comes in slices, between which others step: nobody sees half an adapter, whatever goes wrong."""

from __future__ import annotations

import pytest
import torch

from adapters.copies import Copies, Ready
from adapters.errors import AdapterError, InsufficientMemory
from adapters.lane import InPlace
from adapters.moves import Load, Moved, MoveFailed, Tier
from adapters.sites import Site
from adapters.slots import PageKey, SlotBank
from adapters.staging import StagedAdapter, StagedSite
from tests.support.lora import CPU, make_ref, make_weights

SITES = {name: Site(name, 32, 48, "language") for name in "pqr"}
SLICE = 8 * (32 + 48) * 4
"""Bytes of one of the three sites at rank 8."""


@pytest.fixture
def bank() -> SlotBank:
    return SlotBank(SITES, 2, 64, torch.float32, CPU)


def staged(bank: SlotBank, seed: int, names: str = "pqr") -> StagedAdapter:
    return bank.stage(make_weights(seed, dict.fromkeys(names, 8), SITES))


def ready(slot: int, outcome: StagedAdapter | AdapterError) -> Ready:
    return Ready(Load(make_ref(f"a{slot}"), slot), outcome, 0.5, Tier.DISK)


def numbers(bank: SlotBank, slot: int) -> list[torch.Tensor]:
    return [
        part[slot]
        for name in SITES
        for pages in [bank.shelf(name).pages[PageKey(8, torch.float32)]]
        for part in (pages.a, pages.b)
    ]


@pytest.mark.parametrize("max_bytes", [1, SLICE, SLICE + 1, 2 * SLICE, 3 * SLICE, None])
def test_slices_end_with_what_one_write_gives(bank: SlotBank, max_bytes: int | None) -> None:
    whole = SlotBank(SITES, 2, 64, torch.float32, CPU)
    whole.write(1, staged(whole, 7))
    copies = Copies(bank, InPlace())
    copies.add([ready(1, staged(bank, 7))])
    num_calls, results = 0, []
    while copies.is_busy:
        assert not bank.is_loaded(1) and bank.shelf("p").layout.forms[1] is None
        results = copies.advance(max_bytes)
        num_calls += 1
    (moved,) = results
    assert isinstance(moved, Moved) and moved.num_bytes == 3 * SLICE
    assert set(moved.seconds) == {"read", "copy"}
    assert bank.is_loaded(1) and bank.shelf("p").layout.forms[1] is not None
    assert all(torch.equal(a, b) for a, b in zip(numbers(bank, 1), numbers(whole, 1), strict=True))
    per_call = 3 if max_bytes is None else -(-max_bytes // SLICE)
    assert num_calls == {1: 4, 2: 2, 3: 2 if max_bytes else 1}[per_call], (
        "the last call finds nothing left to copy"
    )


def test_loads_are_copied_in_order_and_one_call_may_end_several(bank: SlotBank) -> None:
    copies = Copies(bank, InPlace())
    copies.add([ready(0, staged(bank, 1, "p")), ready(1, staged(bank, 2, "p"))])
    assert [result.move.slot for result in copies.advance(3 * SLICE)] == [0, 1]


def test_a_failed_read_is_told_in_its_turn_and_copies_nothing(bank: SlotBank) -> None:
    copies = Copies(bank, InPlace())
    error = AdapterError("broken")
    copies.add([ready(0, error)])
    assert copies.advance(1) == [MoveFailed(Load(make_ref("a0"), 0), error)]
    assert bank.num_bytes == 0


@pytest.mark.parametrize(("thrown", "told"), [(MemoryError, InsufficientMemory), (KeyError, AdapterError)])
def test_what_goes_wrong_between_slices_leaves_the_slot_empty(
    bank: SlotBank,
    monkeypatch: pytest.MonkeyPatch,
    thrown: type[Exception],
    told: type[AdapterError],
) -> None:
    write = bank._write_site

    def fail_at_q(shelf: object, slot: int, site: StagedSite) -> None:
        if shelf is bank.shelf("q"):
            raise thrown
        write(shelf, slot, site)  # type: ignore[arg-type]

    monkeypatch.setattr(bank, "_write_site", fail_at_q)
    copies = Copies(bank, InPlace())
    copies.add([ready(0, staged(bank, 1))])
    assert copies.advance(1) == []
    assert bank.num_bytes > 0
    (failed,) = copies.advance(1)
    assert isinstance(failed, MoveFailed) and isinstance(failed.error, told)
    assert (bank.is_loaded(0), bank.num_bytes, copies.is_busy) == (False, 0, False)


def test_a_neighbour_that_leaves_between_slices_takes_no_page_along(bank: SlotBank) -> None:
    bank.write(0, staged(bank, 1))
    copies = Copies(bank, InPlace())
    copies.add([ready(1, staged(bank, 2))])
    copies.advance(SLICE)
    bank.clear(0)
    copies.advance(None)
    whole = SlotBank(SITES, 2, 64, torch.float32, CPU)
    whole.write(1, staged(whole, 2))
    assert all(torch.equal(a, b) for a, b in zip(numbers(bank, 1), numbers(whole, 1), strict=True))


def test_a_slice_is_one_site(bank: SlotBank) -> None:
    assert list(bank.writing(0, staged(bank, 1))) == [SLICE] * 3
