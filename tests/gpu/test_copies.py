"""On a CUDA device: copies into slots run beside the steps, and each step reads whom it was routed to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapters.copies import Copies, Ready
from adapters.lane import CudaStreams, SideLane
from adapters.moves import Load, Moved, MoveFailed, Tier
from adapters.sites import Site
from adapters.slots import PageKey, SlotBank
from adapters.weights import AdapterWeights
from tests.support.lora import make_ref, make_weights

pytestmark = pytest.mark.gpu

SITES = {f"s{i}": Site(f"s{i}", 2048, 2050, "language") for i in range(24)}
SLICE = 1 << 20
LONG = 1_000_000_000
"""Cycles: about half a second, in which the host launches all that a test launches."""


class Stand:
    """Somebody is in slot 0 throughout, so that its pages stay; slot 1 is copied to."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.bank = SlotBank(SITES, 2, 16, torch.bfloat16, self.device)
        self.bank.connect(lambda name: torch.ones(2050, 2048, device=self.device))
        self.streams = CudaStreams(self.device)
        self.copies = Copies(self.bank, SideLane(self.streams))
        self.add(99, slot=0)
        assert len(self.copies.advance(None)) == 1
        torch.cuda.synchronize()

    def weights(self, seed: int, *, is_dora: bool = False) -> AdapterWeights:
        return make_weights(seed, dict.fromkeys(SITES, 12), SITES, is_dora=is_dora)

    def add(self, seed: int, slot: int = 1, *, is_dora: bool = False) -> None:
        staged = self.bank.stage(self.weights(seed, is_dora=is_dora))
        self.copies.add([Ready(Load(make_ref(f"a{seed}"), slot), staged, 0.0, Tier.DISK)])

    def read(self, slot: int = 1) -> list[Tensor]:
        """What a step launched now sees of a slot."""
        pages = [self.bank.shelf(name).pages[PageKey(16, torch.bfloat16)] for name in SITES]
        return [part[slot].clone() for each in pages for part in (each.a, each.b)]

    def expected(self, seed: int) -> list[Tensor]:
        alone = SlotBank(SITES, 2, 16, torch.bfloat16, self.device)
        alone.write(1, self.weights(seed))
        pages = [alone.shelf(name).pages[PageKey(16, torch.bfloat16)] for name in SITES]
        return [part[1].clone() for each in pages for part in (each.a, each.b)]

    def finish(self) -> Moved | MoveFailed:
        results: list[Moved | MoveFailed] = []
        while not results:
            results += self.copies.advance(SLICE)
        (result,) = results
        return result


def is_same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("is_dora", [False, True])
def test_what_is_seen_is_what_was_staged(is_dora: bool) -> None:
    stand = Stand()
    stand.add(1, is_dora=is_dora)
    assert isinstance(stand.finish(), Moved)
    assert is_same(stand.read(), stand.expected(1))
    if is_dora:
        staged = stand.bank.stage(stand.weights(1, is_dora=True))
        for name, site in staged.sites.items():
            scale = stand.bank.shelf(name).scale
            assert scale is not None and site.scale is not None and site.scale.is_pinned()
            assert torch.equal(scale[1].cpu(), site.scale)


def test_a_step_under_way_reads_the_old_tenant_to_its_end() -> None:
    stand = Stand()
    stand.add(1)
    stand.finish()
    expected_old, expected_new = stand.expected(1), stand.expected(2)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)  # the step is late: all of the copy is launched before it reads
    old = stand.read()
    stand.bank.clear(1)
    stand.add(2)
    stand.finish()
    new = stand.read()
    assert is_same(old, expected_old) and is_same(new, expected_new)


def test_neither_the_host_nor_a_step_waits_for_a_copy() -> None:
    stand = Stand()
    stand.add(3, is_dora=True)
    with stand.streams.use_copies():
        torch.cuda._sleep(LONG)
        copies_go_on = torch.cuda.Event()
        copies_go_on.record()
    for _ in range(100):
        assert stand.copies.advance(SLICE) == []
        assert not stand.bank.is_loaded(1)
    step_is_over = torch.cuda.Event()
    stand.read(0)
    step_is_over.record()
    step_is_over.synchronize()
    assert not copies_go_on.query()
    assert isinstance(stand.finish(), Moved)


def test_where_nobody_waits_the_next_step_comes_after_the_copy() -> None:
    stand = Stand()
    expected = stand.expected(4)
    stand.add(4)
    torch.cuda.synchronize()
    with stand.streams.use_copies():
        torch.cuda._sleep(LONG)
    (moved,) = stand.copies.advance(None)
    assert isinstance(moved, Moved) and stand.bank.is_loaded(1)
    assert is_same(stand.read(), expected)


def test_pages_that_leave_under_a_step_are_not_written_before_it_has_read_them() -> None:
    """The last one at a rank leaves and its pages are freed; the next load's may take their memory."""
    device = torch.device("cuda")
    bank = SlotBank(SITES, 1, 16, torch.bfloat16, device)
    copies = Copies(bank, SideLane(CudaStreams(device)))
    weights = {seed: make_weights(seed, dict.fromkeys(SITES, 12), SITES) for seed in (1, 2)}
    for seed in (1, 2):
        staged = bank.stage(weights[seed])
        copies.add([Ready(Load(make_ref(f"a{seed}"), 0), staged, 0.0, Tier.DISK)])
        while not bank.is_loaded(0):
            copies.advance(SLICE)
        torch.cuda.synchronize()
        if seed == 1:
            pages = [bank.shelf(name).pages[PageKey(16, torch.bfloat16)] for name in SITES]
            expected = [pages_.a[0].clone() for pages_ in pages]
            torch.cuda.synchronize()
            torch.cuda._sleep(LONG)
            seen = [pages_.a[0].clone() for pages_ in pages]
            del pages
            bank.clear(0)
    assert is_same(seen, expected)
