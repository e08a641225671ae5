"""Residency decides as a plain model does, over every sequence of plans, results, holds, pins and unloads."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters.errors import AdapterBusy, AdapterError
from adapters.moves import Evict, Load, Moved, MoveFailed
from adapters.ref import BASE, AdapterRef
from adapters.residency import Residency
from tests.support.lora import make_ref

REFS = [make_ref(name) for name in "abcdefgh"] + [make_ref("a", 2)]
ref_lists = st.lists(st.sampled_from(REFS), max_size=6)


def bring(residency: Residency, *refs: AdapterRef) -> list[Evict]:
    """Plan and settle at once; the evictions that it took."""
    moves = residency.plan(refs)
    for move in moves:
        if isinstance(move, Load):
            residency.settle(Moved(move, 1, {}))
    return [move for move in moves if isinstance(move, Evict)]


def use(residency: Residency, ref: AdapterRef) -> None:
    residency.hold(ref)
    residency.release(ref)


@dataclass
class Seat:
    """The model's view of a taken slot; ``uses`` since it came, ``last_used`` by the model's own clock."""

    slot: int
    is_resident: bool = False
    holds: int = 0
    uses: int = 0
    last_used: int = 0


@dataclass
class Model:
    num_slots: int = 1
    seats: dict[AdapterRef, Seat] = field(default_factory=dict)
    pins: set[AdapterRef] = field(default_factory=set)
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def may_leave(self, ref: AdapterRef, wanted: list[AdapterRef]) -> bool:
        seat = self.seats[ref]
        return seat.is_resident and not seat.holds and ref not in self.pins and ref not in wanted


class ResidencyMachine(RuleBasedStateMachine):
    @initialize(num_slots=st.integers(1, 4))
    def begin(self, num_slots: int) -> None:
        self.residency = Residency(num_slots)
        self.model = Model(num_slots)
        self.seen: dict[int, object] = {}

    def resident(self) -> list[AdapterRef]:
        return sorted((r for r, s in self.model.seats.items() if s.is_resident), key=str)

    def loading(self) -> list[AdapterRef]:
        return sorted((r for r, s in self.model.seats.items() if not s.is_resident), key=str)

    @rule(wanted=ref_lists)
    def plan(self, wanted: list[AdapterRef]) -> None:
        model = self.model
        new = [ref for ref in dict.fromkeys(wanted) if ref not in model.seats]
        room = model.num_slots - len(model.seats)
        leavers = [ref for ref in model.seats if model.may_leave(ref, wanted)]
        moves = self.residency.plan(wanted)
        loads = [move for move in moves if isinstance(move, Load)]
        evicts = [move for move in moves if isinstance(move, Evict)]
        assert [load.ref for load in loads] == new[: room + len(leavers)], "as many as can come, in order"
        assert len(evicts) == max(0, len(loads) - room), "no more leave than must"
        for evict in evicts:
            self.check_victim(evict.ref, wanted)
            assert model.seats.pop(evict.ref).slot == evict.slot
        taken = {seat.slot for seat in model.seats.values()}
        for load in loads:
            assert 0 <= load.slot < model.num_slots
            assert load.slot not in taken
            taken.add(load.slot)
            model.seats[load.ref] = Seat(load.slot)
        freed: set[int] = set()
        evicted_slots = {evict.slot for evict in evicts}
        for move in moves:
            if isinstance(move, Evict):
                freed.add(move.slot)
            else:
                assert move.slot not in evicted_slots or move.slot in freed, (
                    "an Evict precedes its slot's Load"
                )
        assert self.residency.plan(wanted) == (), "nothing is planned twice"

    def check_victim(self, victim: AdapterRef, wanted: list[AdapterRef]) -> None:
        model = self.model
        assert model.may_leave(victim, wanted)
        steady = sorted(
            (r for r, s in model.seats.items() if s.uses > 1), key=lambda r: -model.seats[r].last_used
        )
        sheltered = set(steady[: model.num_slots // 2])
        others = [r for r in model.seats if model.may_leave(r, wanted)]
        exposed = [r for r in others if r not in sheltered] or others
        assert victim == min(exposed, key=lambda r: model.seats[r].last_used), "least recently used"

    @precondition(lambda self: self.loading())
    @rule(data=st.data(), is_failure=st.booleans())
    def settle(self, data: st.DataObject, is_failure: bool) -> None:
        ref = data.draw(st.sampled_from(self.loading()))
        load = Load(ref, self.model.seats[ref].slot)
        if is_failure:
            self.residency.settle(MoveFailed(load, AdapterError("no")))
            del self.model.seats[ref]
        else:
            self.residency.settle(Moved(load, 1, {}))
            self.model.seats[ref].is_resident = True
            self.model.seats[ref].last_used = self.model.tick()

    @precondition(lambda self: self.resident())
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(self.resident()))
        seat = self.model.seats[ref]
        assert self.residency.hold(ref) == seat.slot
        seat.holds += 1
        seat.uses += 1
        seat.last_used = self.model.tick()

    @precondition(lambda self: any(s.holds for s in self.model.seats.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = sorted((r for r, s in self.model.seats.items() if s.holds), key=str)
        ref = data.draw(st.sampled_from(held))
        self.residency.release(ref)
        self.model.seats[ref].holds -= 1
        self.model.seats[ref].last_used = self.model.tick()

    @rule(ref=st.sampled_from(REFS), is_pin=st.booleans())
    def pin(self, ref: AdapterRef, is_pin: bool) -> None:
        if is_pin:
            self.residency.pin(ref)
            self.model.pins.add(ref)
        else:
            self.residency.unpin(ref)
            self.model.pins.discard(ref)

    @rule(ref=st.sampled_from(REFS))
    def drop(self, ref: AdapterRef) -> None:
        seat = self.model.seats.get(ref)
        if seat is not None and (seat.holds or not seat.is_resident):
            with pytest.raises(AdapterBusy):
                self.residency.drop(ref)
            return
        evict = self.residency.drop(ref)
        assert evict == (None if seat is None else Evict(ref, seat.slot))
        self.model.seats.pop(ref, None)
        self.model.pins.discard(ref)

    @invariant()
    def agrees(self) -> None:
        seats = self.model.seats
        slots = [seat.slot for seat in seats.values()]
        assert len(set(slots)) == len(slots)
        for ref in REFS:
            seat = seats.get(ref)
            is_visible = seat is not None and seat.is_resident
            assert self.residency.slot_of(ref) == (seat.slot if seat is not None and is_visible else None)
            assert self.residency.is_loading(ref) == (seat is not None and not seat.is_resident)
            assert self.residency.num_holds(ref) == (seat.holds if seat else 0)
            pinned_slots = sum(other in self.model.pins for other in seats)
            assert self.residency.can_ever_load(ref) == (ref in seats or pinned_slots < self.model.num_slots)
        found = [(r.ref, r.slot, r.is_pinned, r.num_holds) for r in self.residency.residents()]
        expected = [
            (ref, seat.slot, ref in self.model.pins, seat.holds)
            for ref, seat in sorted(seats.items(), key=lambda item: item[1].slot)
            if seat.is_resident
        ]
        assert found == expected
        assert {load.ref for load in self.residency.loading()} == set(self.loading())

    @invariant()
    def one_revision_is_one_picture(self) -> None:
        picture = [(r.slot, r.ref, r.is_pinned, r.num_holds, r.num_uses) for r in self.residency.residents()]
        now = (picture, self.residency.loading())
        assert self.seen.setdefault(self.residency.revision, now) == now


ResidencyMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestResidency = ResidencyMachine.TestCase


def test_the_least_recently_used_leaves_and_versions_are_different_adapters() -> None:
    residency = Residency(2)
    a, a2, b = make_ref("a"), make_ref("a", 2), make_ref("b")
    bring(residency, a, b)
    use(residency, a)
    assert bring(residency, a2) == [Evict(b, 1)]
    assert (residency.slot_of(a), residency.slot_of(a2), residency.slot_of(b)) == (0, 1, None)


def test_it_waits_while_all_slots_are_held_and_loads_once_one_is_released() -> None:
    residency = Residency(1)
    a, b = make_ref("a"), make_ref("b")
    bring(residency, a)
    residency.hold(a)
    assert residency.plan([b]) == ()
    assert residency.can_ever_load(b)
    residency.release(a)
    assert residency.plan([b]) == (Evict(a, 0), Load(b, 0))


def test_more_adapters_than_slots_load_as_many_as_fit_and_keep_those_that_are_wanted() -> None:
    residency = Residency(3)
    a, b, c, d, e = (make_ref(name) for name in "abcde")
    bring(residency, a, b)
    assert residency.plan([c, d, a, b, e]) == (Load(c, 2),)


def test_a_failed_load_frees_its_slot_and_is_forgotten() -> None:
    residency = Residency(1)
    a = make_ref("a")
    (load,) = residency.plan([a])
    assert isinstance(load, Load)
    residency.settle(MoveFailed(load, AdapterError("unreadable")))
    assert (residency.residents(), residency.loading()) == ((), ())
    assert residency.plan([a]) == (Load(a, 0),)


def test_results_that_nobody_planned_are_refused() -> None:
    residency = Residency(2)
    a = make_ref("a")
    with pytest.raises(ValueError, match="a@1 is not loading into slot 0"):
        residency.settle(Moved(Load(a, 0), 1, {}))
    bring(residency, a)
    with pytest.raises(ValueError, match="not loading"):
        residency.settle(Moved(Load(a, 0), 1, {}))
    with pytest.raises(ValueError, match="released more often than held"):
        residency.release(a)
    with pytest.raises(ValueError, match="not resident"):
        residency.hold(make_ref("b"))


def test_the_base_needs_no_slot() -> None:
    assert Residency(1).plan([BASE]) == ()


def test_all_slots_pinned_can_never_load_another() -> None:
    residency = Residency(1)
    a, b = make_ref("a"), make_ref("b")
    bring(residency, a)
    residency.pin(a)
    assert residency.plan([b]) == ()
    assert not residency.can_ever_load(b)
    assert residency.can_ever_load(a)


def test_a_scan_over_many_adapters_leaves_those_in_steady_use() -> None:
    residency = Residency(4)
    hot = [make_ref("hot-0"), make_ref("hot-1")]
    bring(residency, *hot)
    for ref in hot * 2:
        use(residency, ref)
    for i in range(50):
        cold = make_ref(f"cold-{i}")
        bring(residency, cold)
        use(residency, cold)
    assert all(residency.slot_of(ref) is not None for ref in hot)
    # and what was once hot does not stay for ever when others are in steady use
    for i in range(2):
        for ref in (make_ref(f"new-{i}"),) * 2:
            bring(residency, ref)
            use(residency, ref)
    bring(residency, make_ref("x"), make_ref("y"))
    assert [residency.slot_of(ref) for ref in hot] == [None, None]


def test_nobody_leaves_for_one_that_is_not_ready_but_free_slots_are_for_all() -> None:
    residency = Residency(2)
    a, b, c, d = REFS[:4]
    bring(residency, a)
    assert residency.plan([c], ready={}) == (Load(c, 1),), "a free slot"
    residency.settle(Moved(Load(c, 1), 1, {}))
    assert residency.plan([b, d], ready={}) == ()
    assert residency.plan([b, d], ready={d: frozenset()}) == (Evict(a, 0), Load(d, 0)), "others pass it"
    assert residency.has_seat(d) and not residency.has_seat(b)
