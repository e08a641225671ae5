"""What a sequence holds stays its own while a step on the device has a row of it, and is given back right after."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from adapters.ref import BASE
from engine.fairness import has_prompts, in_turn
from engine.sequence import BASE_SLOT, Sequence, Status
from engine.step import Chunk, StepPlan
from tests.engine.test_scheduler import Desk, names
from tests.support.requests import make_sequence, ref


def two_decoding(**config: int) -> tuple[Desk, Sequence, Sequence]:
    """One of the base, one of an adapter."""
    desk, a = Desk(**config), ref("a")
    desk.bring(a)
    first, second = desk.add("first", 3), desk.add("second", 3, a)
    while not (first.is_decoding and second.is_decoding):
        desk.step()
    return desk, first, second


def next_rows(plan: StepPlan) -> list[Chunk]:
    return [Chunk(chunk.sequence, chunk.end, 1) for chunk in plan.chunks]


def commit(plan: StepPlan) -> None:
    for chunk in plan.chunks:
        chunk.sequence.num_computed = chunk.end
        chunk.sequence.output_ids.append(1)


def test_the_next_plan_is_what_is_left_of_the_one_made_ahead() -> None:
    desk, _, second = two_decoding()
    plan = desk.scheduler.plan(0.0)
    ahead = desk.scheduler.plan_ahead(next_rows(plan))
    assert ahead is not None
    desk.add("newcomer", 2)
    commit(plan)
    desk.scheduler.land()
    desk.scheduler.end(second)
    left = desk.scheduler.plan(0.0)
    assert left.chunks == ahead.chunks[:1]
    commit(left)
    desk.scheduler.land()
    assert names(desk.scheduler.plan(0.0)) == [("first", 1), ("newcomer", 2)]


def test_blocks_and_slot_stay_until_the_last_step_with_its_row_is_over() -> None:
    desk, first, second = two_decoding()
    adapter, slot, blocks = second.adapter, second.slot, list(second.blocks)
    plan = desk.scheduler.plan(0.0)
    ahead = desk.scheduler.plan_ahead(next_rows(plan))
    assert ahead is not None
    desk.scheduler.land()  # ``plan`` is over, ``ahead`` is not
    desk.scheduler.end(second)
    assert second.status is Status.ENDED and second not in desk.scheduler.running
    assert (second.slot, second.blocks[: len(blocks)]) == (slot, blocks)
    assert desk.residency.num_holds(adapter) == 1
    commit(plan)
    rest = desk.scheduler.plan(0.0)
    assert desk.scheduler.plan_ahead(next_rows(rest)) is not None  # without it: it is in none but the last
    desk.scheduler.land()
    assert (second.slot, second.blocks) == (BASE_SLOT, [])
    assert desk.residency.num_holds(adapter) == 0
    desk.scheduler.end(first)
    assert desk.pool.num_used > 0
    desk.scheduler.forget_ahead()
    assert desk.pool.num_used == 0


def test_a_sequence_without_a_row_under_way_gives_back_at_once() -> None:
    desk, first, second = two_decoding()
    plan = desk.scheduler.plan(0.0)
    assert desk.scheduler.plan_ahead(next_rows(plan)[:1]) is not None
    desk.scheduler.end(second)
    assert second.blocks == []
    desk.scheduler.forget_ahead()
    desk.scheduler.end(first)
    assert desk.pool.num_used == 0


def test_nobody_is_sent_back_for_a_step_ahead() -> None:
    desk, first, second = two_decoding(num_blocks=4)
    plan = desk.scheduler.plan(0.0)
    while desk.scheduler.plan_ahead(next_rows(plan)) is not None:
        commit(plan)
        desk.scheduler.land()
        plan = desk.scheduler.plan(0.0)
    assert desk.pool.num_free == 0
    assert (first.num_preemptions, second.num_preemptions) == (0, 0)
    assert not desk.scheduler.is_ahead
    commit(plan)
    desk.scheduler.plan(0.0)
    assert second.num_preemptions == 1


kinds = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=4)


@given(waiting=kinds, running=kinds)
def test_somebody_has_a_prompt_where_somebody_is_in_turn(
    waiting: list[tuple[bool, bool]], running: list[tuple[bool, bool]]
) -> None:
    def made(kind: tuple[bool, bool]) -> Sequence:
        is_background, is_decoding = kind
        sequence = make_sequence("r", 5)
        sequence.request = replace(sequence.request, is_background=is_background)
        if is_decoding:
            sequence.output_ids, sequence.num_computed = [1], 5
        return sequence

    here, there = [made((kind[0], False)) for kind in waiting], [made(kind) for kind in running]
    assert has_prompts(here, there, max_running=9) == any(True for _ in in_turn(here, there))


@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 3), st.booleans()), min_size=1, max_size=14
    ),
    max_running=st.integers(1, 5),
)
def test_where_nobody_has_a_prompt_the_plan_is_who_ran_before(
    arrivals: list[tuple[int, int, bool]], max_running: int
) -> None:
    """Places taken, places yielded, and background among them."""
    adapters = [BASE, ref("a"), ref("b"), ref("c")]
    desk = Desk(num_blocks=512, num_slots=3, max_running=max_running)
    desk.bring(*adapters[1:])
    for step in range(24):
        for number, (when, adapter, is_background) in enumerate(arrivals):
            if when == step:
                sequence = desk.add(f"r{number}", 3, adapters[adapter])
                sequence.request = replace(sequence.request, is_background=is_background)
        has_none, running = not desk.scheduler.has_prompts, list(desk.scheduler.running)
        plan = desk.step()
        if has_none:
            assert [chunk.sequence for chunk in plan.chunks] == running
            assert all(chunk.is_decode for chunk in plan.chunks)
        for sequence in [s for s in desk.scheduler.running if len(s.output_ids) >= 6]:
            desk.scheduler.end(sequence)
