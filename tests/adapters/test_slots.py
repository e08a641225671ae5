"""The bank holds what was written, frees what leaves, and a failed write leaves nothing."""

from __future__ import annotations

import gc
import resource

import pytest
import torch
from torch import Tensor

from adapters.errors import AdapterRejected, RejectReason
from adapters.sites import Site
from adapters.slots import UNTOUCHED, Form, PageKey, Pages, SlotBank, page_rank
from adapters.weights import AdapterWeights, SiteWeights
from tests.support.lora import CPU, Bench, make_weights

SITES = {name: Site(name, 64, 100, "language") for name in ("p", "q", "r")}


def make_bank(num_slots: int = 4, max_rank: int = 64) -> SlotBank:
    bank = SlotBank(SITES, num_slots, max_rank, torch.float32, CPU)
    bank.connect(lambda name: torch.ones(100, 64))
    return bank


@pytest.mark.parametrize(
    "rank, padded", [(1, 8), (4, 8), (8, 8), (9, 16), (16, 16), (24, 32), (64, 64), (65, 128)]
)
def test_ranks_are_padded_to_powers_of_two_from_8(rank: int, padded: int) -> None:
    assert page_rank(rank) == padded


def test_a_slot_holds_what_was_written_and_zeros_beyond() -> None:
    bank = make_bank()
    bank.write(1, make_weights(9, {"p": 16}, SITES))  # the pages' memory is not clean
    bank.clear(1)
    weights = make_weights(1, {"p": 12, "q": 3}, SITES)
    bank.write(0, make_weights(2, {"p": 16}, SITES))
    bank.write(1, weights)
    pages = bank.shelf("p").pages[PageKey(16, torch.float32)]
    assert torch.equal(pages.a[1, :12], weights.sites["p"].a)
    assert torch.equal(pages.b[1, :100, :12], weights.sites["p"].b)
    assert not pages.a[1, 12:].any()
    assert not pages.b[1, :, 12:].any()
    assert not pages.b[1, 100:].any()
    assert bank.shelf("q").pages.keys() == {PageKey(8, torch.float32)}
    assert bank.shelf("r").pages == {}


def test_layouts_say_what_each_slot_holds_and_are_shared_by_sites_that_agree() -> None:
    bank = make_bank()
    bank.write(0, make_weights(0, {"p": 4, "q": 4}, SITES))
    bank.write(2, make_weights(1, {"p": 12, "q": 12, "r": 3}, SITES, is_dora=True))
    assert bank.shelf("p").layout.forms == (Form(8, False), None, Form(16, True), None)
    assert bank.shelf("r").layout.forms == (UNTOUCHED, None, Form(8, True), None)
    assert bank.shelf("p").layout is bank.shelf("q").layout
    assert [bank.is_loaded(slot) for slot in range(4)] == [True, False, True, False]


def test_bytes_are_counted_by_page_and_freed_with_the_last_slot() -> None:
    bank = make_bank()
    assert bank.num_bytes == 0
    bank.write(0, make_weights(0, {"p": 4}, SITES))
    one_slot = 8 * (64 + 112) * 4  # rank 8; 100 outputs padded to 112; float32
    assert bank.slot_bytes(0) == one_slot
    assert bank.num_bytes == 4 * one_slot
    bank.write(1, make_weights(1, {"p": 4}, SITES, is_dora=True))
    assert bank.slot_bytes(1) == one_slot + 100 * 4
    assert bank.num_bytes == 4 * (one_slot + 100 * 4)
    bank.clear(0)
    assert bank.slot_bytes(0) == 0
    assert bank.num_bytes == 4 * (one_slot + 100 * 4)
    bank.clear(1)
    bank.clear(1)
    assert bank.num_bytes == 0


def test_a_write_replaces_what_was_in_the_slot() -> None:
    bank = make_bank()
    bank.write(0, make_weights(0, {"p": 4, "q": 40}, SITES, is_dora=True))
    bank.write(0, make_weights(1, {"p": 16}, SITES))
    assert bank.shelf("p").layout.forms[0] == Form(16, False)
    assert bank.shelf("q").layout.forms[0] == UNTOUCHED
    assert (bank.shelf("q").pages, bank.shelf("p").scale) == ({}, None)


def test_a_failed_write_leaves_the_slot_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank()
    bank.write(0, make_weights(0, {"p": 4, "q": 4, "r": 4}, SITES))
    before = bank.num_bytes
    write = Pages.write

    def fail_at_the_third(pages: Pages, slot: int, a: Tensor, b: Tensor) -> None:
        if pages is bank.shelf("r").pages.get(PageKey(16, torch.float32)):
            raise torch.OutOfMemoryError("no")
        write(pages, slot, a, b)

    monkeypatch.setattr(Pages, "write", fail_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        bank.write(1, make_weights(1, {"p": 16, "q": 16, "r": 16}, SITES))
    assert not bank.is_loaded(1)
    assert bank.slot_bytes(1) == 0
    assert bank.num_bytes == before
    assert all(bank.shelf(name).layout.forms[1] is None for name in SITES)


def reject(weights: AdapterWeights, max_rank: int = 64) -> RejectReason:
    with pytest.raises(AdapterRejected) as caught:
        make_bank(max_rank=max_rank).stage(weights)
    return caught.value.reason


def test_what_does_not_fit_is_refused_before_any_slot_is_touched() -> None:
    elsewhere = {"x": Site("x", 64, 100, "language")}
    wider = {"p": Site("p", 65, 100, "language")}
    assert reject(make_weights(0, {"x": 4}, elsewhere)) is RejectReason.UNKNOWN_KEYS
    assert reject(make_weights(0, {"p": 4}, wider)) is RejectReason.BAD_SHAPE
    assert reject(make_weights(0, {"p": 17}, SITES), max_rank=16) is RejectReason.RANK_TOO_LARGE
    site = make_weights(0, {"p": 4}, SITES).sites["p"]
    short = AdapterWeights({"p": SiteWeights(site.a, site.b, torch.ones(99))}, 0, 4, "")
    assert reject(short) is RejectReason.BAD_SHAPE


def test_doras_scale_is_magnitude_over_the_norms_of_base_plus_delta() -> None:
    bank = make_bank()
    weights = make_weights(0, {"p": 4}, SITES, is_dora=True)
    bank.write(3, weights)
    site, scale = weights.sites["p"], bank.shelf("p").scale
    assert scale is not None
    assert site.magnitude is not None
    norms = torch.stack(
        [row.norm() for row in torch.ones(100, 64).double() + site.b.double() @ site.a.double()]
    )
    torch.testing.assert_close(scale[3].double(), site.magnitude / norms, rtol=1e-5, atol=0)


def test_dora_without_access_to_the_base_is_an_error() -> None:
    bank = SlotBank(SITES, 1, 64, torch.float32, CPU)
    with pytest.raises(RuntimeError, match="attach the bank"):
        bank.stage(make_weights(0, {"p": 4}, SITES, is_dora=True))


def test_a_16_bit_bank_stores_16_bits() -> None:
    bank = SlotBank(SITES, 1, 64, torch.bfloat16, CPU)
    bank.write(0, make_weights(0, {"p": 8}, SITES))
    assert bank.shelf("p").pages[PageKey(8, torch.bfloat16)].a.dtype == torch.bfloat16


def test_a_thousand_loads_and_unloads_end_where_they_began() -> None:
    bench = Bench({"l": (256, 384), "m": (384, 256)}, num_slots=8)
    kinds = [
        make_weights(i, {"l": rank, "m": max(1, rank // 2)}, bench.sites, is_dora=i % 5 == 0)
        for i, rank in enumerate((4, 16, 64, 8, 33, 1))
    ]
    x = torch.randn(16, 256).to(torch.bfloat16)

    def cycle(i: int) -> None:
        slot = (i * 5) % 8
        bench.bank.write(slot, kinds[i % 6])
        bench.run("l", x, [(3, slot), (13, -1)])
        if i % 3:
            bench.bank.clear(slot)

    def state() -> tuple[int, int, int]:
        for slot in range(8):
            bench.bank.clear(slot)
        gc.collect()
        num_tensors = sum(type(each) is Tensor for each in gc.get_objects())
        return bench.bank.num_bytes, num_tensors, resident_bytes()

    for i in range(100):
        cycle(i)
    start = state()
    for i in range(1000):
        cycle(i)
    end = state()
    assert end[0] == start[0] == 0
    assert end[1] <= start[1] + 4  # the last step's plan
    assert end[2] <= start[2] * 1.01


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
