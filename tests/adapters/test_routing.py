"""A plan names every touched row once, keeps slots apart, and pads by the rules that keep bits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.routing import ROW_TILE, SHORT_RUN, RoutePlan, Routing, RoutingSet
from adapters.slots import UNTOUCHED, Form, Layout
from tests.support.lora import CPU, row_slots

NUM_SLOTS = 6
segment_lists = st.lists(st.tuples(st.integers(0, 40), st.integers(-1, NUM_SLOTS - 1)), max_size=12)
forms = st.sampled_from([UNTOUCHED, Form(8, False), Form(16, False), Form(16, True)])
layouts = st.builds(Layout, st.tuples(*[forms] * NUM_SLOTS))


def filled(segments: list[tuple[int, int]]) -> Routing:
    routing = Routing(CPU)
    routing.fill(segments)
    return routing


def indices(plan: RoutePlan) -> tuple[list[int], list[int], list[int]]:
    """gather, valid and rows with their shorthands written out."""
    rows = list(range(plan.num_rows)) if plan.rows is None else plan.rows.tolist()
    gather = rows if plan.gather is None else plan.gather.tolist()
    valid = list(range(len(rows))) if plan.valid is None else plan.valid.tolist()
    return gather, valid, rows


@given(segments=segment_lists, layout=layouts)
def test_a_plan_covers_the_touched_rows_and_no_others(
    segments: list[tuple[int, int]], layout: Layout
) -> None:
    slots = row_slots(segments)
    touched = [row for row, slot in enumerate(slots) if slot >= 0 and layout.forms[slot] != UNTOUCHED]
    plan = filled(segments).plan(layout)
    if plan is None:
        assert touched == []
        return
    gather, valid, rows = indices(plan)
    assert plan.num_rows == len(slots)
    assert sorted(rows) == touched
    assert [gather[i] for i in valid] == rows, "a padded row and the row it came from agree"
    is_dora = [layout.forms[slots[row]] == Form(16, True) for row in rows]
    assert is_dora == sorted(is_dora), "plain rows first"
    assert is_dora.count(False) == plan.num_plain
    assert plan.dora_slots.tolist() == [slots[row] for row in rows[plan.num_plain :]]


@given(segments=segment_lists, layout=layouts)
def test_groups_tile_the_padded_rows_and_keep_slots_apart(
    segments: list[tuple[int, int]], layout: Layout
) -> None:
    slots = row_slots(segments)
    plan = filled(segments).plan(layout)
    if plan is None:
        return
    gather, _, _ = indices(plan)
    end = 0
    for group in plan.groups:
        assert group.start == end
        end = group.stop
        for i in range(group.num_slots):
            slot = group.first_slot + i
            assert layout.forms[slot] == group.form
            start = group.start + i * group.rows_per_slot
            own = gather[start : start + group.rows_per_slot]
            assert {slots[row] for row in own} == {slot}, "padding comes from the slot's own rows"
        if group.num_slots > 1:
            assert group.rows_per_slot <= -(-SHORT_RUN // ROW_TILE) * ROW_TILE
        assert group.rows_per_slot % ROW_TILE == 0
    assert end == len(gather)


def test_neighbouring_decodes_are_one_group_and_a_prefill_is_its_own() -> None:
    layout = Layout((Form(16, False),) * NUM_SLOTS)
    decodes = filled([(1, slot) for slot in (3, 1, 2, 0)]).plan(layout)
    assert decodes is not None
    assert [(g.first_slot, g.num_slots) for g in decodes.groups] == [(0, 4)]
    mixed = filled([(1, 0), (300, 1), (1, 2), (1, 3)]).plan(layout)
    assert mixed is not None
    assert [(g.first_slot, g.num_slots) for g in mixed.groups] == [(0, 1), (1, 1), (2, 2)]


def test_a_single_long_run_needs_no_indices() -> None:
    plan = filled([(8 * ROW_TILE, 2)]).plan(Layout((Form(16, False),) * NUM_SLOTS))
    assert plan is not None
    assert plan.gather is plan.valid is plan.rows is None


def test_plans_are_made_once_a_step_and_layout() -> None:
    layout, other = Layout((Form(8, False),) * NUM_SLOTS), Layout((Form(16, False),) * NUM_SLOTS)
    routing = filled([(3, 0)])
    plan = routing.plan(layout)
    assert routing.plan(layout) is plan
    assert routing.plan(other) is not plan
    routing.fill([(3, 0)])
    assert routing.plan(layout) is plan, "the same rows again: nothing to do"
    routing.fill([(4, 0)])
    assert routing.plan(layout) is not plan


def test_base_only_until_filled_and_after_clear() -> None:
    routing = RoutingSet.on(CPU)
    assert routing.language.is_base_only
    routing.language.fill([(3, -1)])
    assert routing.language.is_base_only
    routing.language.fill([(3, -1), (1, 4), (0, 5), (2, 1)])
    assert [routing.of(part).is_base_only for part in ("language", "vision")] == [False, True]
    routing.clear()
    assert routing.language.is_base_only


@pytest.mark.parametrize("segment", [(-1, 0), (2, -2)])
def test_impossible_segments_are_refused(segment: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a segment is"):
        Routing(CPU).fill([segment])


def test_an_empty_slot_is_not_served_as_the_base() -> None:
    routing = filled([(1, 1), (1, 0)])
    for forms in ((Form(8, False), None), (Form(8, False),)):
        with pytest.raises(ValueError, match="slot 1, which holds no adapter"):
            routing.plan(Layout(forms))
