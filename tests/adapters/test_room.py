"""Room counts as the bank allocates, to the byte; and whoever has no room comes not, and costs nobody a slot."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.moves import Evict, Load, Moved
from adapters.ref import AdapterRef
from adapters.residency import Residency
from adapters.room import Footprint, Page, Room, joint_bytes
from adapters.sites import Site
from adapters.slots import SlotBank
from tests.support.lora import CPU, make_ref, make_weights

NUM_SLOTS = 3
SITES = {"p": Site("p", 24, 40, "language"), "q": Site("q", 40, 19, "language")}
ranks = st.fixed_dictionaries(
    {}, optional={"p": st.sampled_from([1, 8, 9, 33]), "q": st.sampled_from([2, 16])}
)
halves = st.sets(st.sampled_from(list(SITES)))
steps = st.lists(st.tuples(st.integers(0, NUM_SLOTS - 1), ranks, st.booleans(), halves), max_size=12)


@given(steps, st.booleans())
def test_the_room_counts_what_the_bank_allocates_through_every_write_and_clear(
    steps: list[tuple[int, dict[str, int], bool, set[str]]], keeps_halves: bool
) -> None:
    bank = SlotBank(SITES, NUM_SLOTS, 64, torch.float32, CPU, keeps_halves=keeps_halves)
    bank.connect(lambda name: torch.ones(SITES[name].out_features, SITES[name].in_features))
    room, taken = Room(), set[int]()
    for seed, (slot, site_ranks, is_dora, halves) in enumerate(steps):
        if slot in taken:
            room.leave(slot)
            bank.clear(slot)
            taken.remove(slot)
        if site_ranks:
            weights = make_weights(seed, site_ranks, SITES, is_dora=is_dora, halves=halves)
            staged = bank.stage(weights)
            before = room.num_bytes
            room.enter(slot, staged.footprint)
            bank.write(slot, staged)
            taken.add(slot)
            assert room.num_bytes - before <= joint_bytes([staged.footprint])
        assert room.num_bytes == bank.num_bytes


pages = st.sampled_from([Page("p", 8, 100), Page("p", 16, 200), Page("q", 8, 70), Page("q", 0, 9)])
footprint_lists = st.lists(st.frozensets(pages, min_size=1), min_size=1, max_size=5)


@given(footprint_lists, st.sets(st.integers(0, 3)), st.integers(1, 450))
def test_what_fits_is_what_it_would_come_to(
    footprints: list[Footprint], leaving: set[int], max_bytes: int
) -> None:
    """``fits`` against doing it, in a second room: the leavers leave and the newcomer enters."""
    newcomer, *here = footprints
    leaving &= set(range(len(here)))
    room, after = Room(max_bytes), Room()
    for slot, footprint in enumerate(here):
        room.enter(slot, footprint)
        if slot not in leaving:
            after.enter(slot, footprint)
    after.enter(9, newcomer)
    assert room.fits(newcomer, leaving) == (after.num_bytes <= max_bytes)


REFS = {make_ref(f"a{i}"): frozenset([Page(f"s{i}", 8, 10)]) for i in range(6)}
"""Adapters whose pages nobody shares."""
BIG = make_ref("big")
FOOTPRINTS: dict[AdapterRef, Footprint] = {**REFS, BIG: frozenset([Page("s0", 64, 35)])}
A = list(REFS)


def bring(residency: Residency, *refs: AdapterRef) -> tuple[Evict | Load, ...]:
    moves = residency.plan(refs, FOOTPRINTS)
    for move in moves:
        if isinstance(move, Load):
            residency.settle(Moved(move, 1, {}))
    return moves


def test_one_of_large_rank_takes_the_room_of_as_many_small_ones_as_it_needs() -> None:
    residency = Residency(6, Room(60))
    bring(residency, *A)
    moves = bring(residency, BIG)
    assert moves == (Evict(A[0], 0), Evict(A[1], 1), Evict(A[2], 2), Evict(A[3], 3), Load(BIG, 0))
    assert residency.slot_of(A[4]) is not None, "20 of 60 bytes are left for two"


def test_one_that_cannot_fit_beside_those_in_use_makes_nobody_leave() -> None:
    residency = Residency(6, Room(60))
    bring(residency, *A)
    for ref in A[:3]:
        residency.hold(ref)
    assert bring(residency, BIG) == ()
    assert all(residency.slot_of(ref) is not None for ref in A)
    residency.release(A[0])
    assert len(bring(residency, BIG)) == 5


def test_whoever_would_free_too_little_stays() -> None:
    """b shares its page with a held one, so that its leaving gives nothing back."""
    held, b, c, d = A[:4]
    shared = frozenset([Page("s", 8, 30)])
    footprints = {held: shared, b: shared, c: frozenset([Page("t", 8, 30)]), d: frozenset([Page("u", 8, 30)])}
    residency = Residency(4, Room(60))
    for move in residency.plan([held, b, c], footprints):
        assert isinstance(move, Load)
        residency.settle(Moved(move, 1, {}))
    residency.hold(held)
    assert residency.plan([d], footprints) == (Evict(c, 2), Load(d, 2))


def test_a_free_slot_is_no_room_and_an_unknown_size_waits() -> None:
    residency = Residency(6, Room(15))
    bring(residency, A[0])
    residency.hold(A[0])
    assert bring(residency, A[1]) == (), "five slots are free, and five bytes"
    assert residency.plan([A[2]], ready={}) == (), "its size is not known yet"
    assert Residency(6).plan([A[2]], ready={}) == (Load(A[2], 0),), "without a limit a free slot is enough"


def test_what_loads_counts_already_and_what_failed_or_left_does_not() -> None:
    residency = Residency(6, Room(20))
    first, second = residency.plan(A[:2], FOOTPRINTS)
    assert residency.plan([A[2]], FOOTPRINTS) == (), "both are on their way"
    assert isinstance(first, Load) and isinstance(second, Load)
    residency.settle(Moved(first, 1, {}))
    residency.settle(Moved(second, 1, {}))
    residency.drop(A[0])
    assert residency.plan([A[2]], FOOTPRINTS) == (Load(A[2], 0),)


def test_no_smaller_one_overtakes_the_first_that_does_not_fit() -> None:
    residency = Residency(6, Room(40))
    bring(residency, A[0])
    residency.hold(A[0])
    assert residency.plan([BIG, A[1]], FOOTPRINTS) == ()
    assert residency.plan([A[1]], FOOTPRINTS) == (Load(A[1], 1),)


def test_an_adapter_that_never_fits_is_told_so_with_the_limit() -> None:
    residency = Residency(6, Room(34))
    shortage = residency.shortage(BIG, FOOTPRINTS[BIG])
    assert shortage is not None
    assert "35 bytes" in str(shortage.error("big@1")) and "34" in str(shortage.error("big@1"))
    roomy = Residency(6, Room(40))
    assert roomy.shortage(BIG, FOOTPRINTS[BIG]) is None
    bring(roomy, A[0])
    roomy.pin(A[0])
    pinned = roomy.shortage(BIG, FOOTPRINTS[BIG])
    assert pinned is not None and "unpin" in str(pinned.error("big@1"))
    assert Residency(6).shortage(BIG, FOOTPRINTS[BIG]) is None


@given(st.integers(1, 80), st.lists(st.sampled_from([*A, BIG]), min_size=1, max_size=12), st.data())
def test_a_plan_takes_enough_and_no_more_whoever_is_held(
    max_bytes: int, order: list[AdapterRef], data: st.DataObject
) -> None:
    """Against all subsets of those who may leave: something fits exactly when some subset is enough."""
    residency = Residency(4, Room(max_bytes))
    held: set[AdapterRef] = set()
    for ref in order:
        here = {resident.ref for resident in residency.residents()}
        may_leave = sorted(here - held, key=str)
        moves = bring(residency, ref)
        left = {move.ref for move in moves if isinstance(move, Evict)}
        if ref in here:
            assert moves == ()
            continue
        is_possible = any(
            _fits(here - set(gone) | {ref}, max_bytes)
            for count in range(len(may_leave) + 1)
            for gone in itertools.combinations(may_leave, count)
        )
        assert bool(moves) == is_possible
        if moves:
            after = here - left | {ref}
            assert _fits(after, max_bytes) and left <= set(may_leave)
            assert not any(_fits(after | {spared}, max_bytes) for spared in left), "nobody left in vain"
            if data.draw(st.booleans()):
                residency.hold(ref)
                held.add(ref)


def _fits(refs: set[AdapterRef], max_bytes: int) -> bool:
    return len(refs) <= 4 and joint_bytes(FOOTPRINTS[ref] for ref in refs) <= max_bytes


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="None sets no limit"):
        Room(0)
