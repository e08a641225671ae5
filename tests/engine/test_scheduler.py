"""The scheduler fills one budget fairly: decodes first, long prompts in chunks, nobody starved, nothing leaked."""

from __future__ import annotations

from dataclasses import replace

from adapters.moves import Load, Moved
from adapters.ref import AdapterRef
from adapters.residency import Residency
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.scheduler import Scheduler
from engine.sequence import Sequence, Status, WaitReason
from engine.step import StepPlan
from engine.tiling import Tiling
from engine.vision_cache import VisionCache
from tests.support.requests import make_image, make_sequence, ref


class Desk:
    """A scheduler with its collaborators, and what the engine would do after each plan."""

    def __init__(
        self, num_blocks: int = 64, num_slots: int = 2, tile: int = 1, **config: int | float | None
    ) -> None:
        self.config = EngineConfig(num_slots=num_slots, block_size=4, **config)  # type: ignore[arg-type]
        self.pool = BlockPool(num_blocks, 4)
        self.residency = Residency(num_slots)
        self.vision_cache = VisionCache(1 << 20)
        self.scheduler = Scheduler(self.config, self.pool, self.residency, self.vision_cache, Tiling(tile))

    def add(self, *args: object, **kwargs: object) -> Sequence:
        sequence = make_sequence(*args, **kwargs)  # type: ignore[arg-type]
        self.scheduler.add(sequence)
        return sequence

    def bring(self, *refs: AdapterRef) -> None:
        for move in self.residency.plan(refs):
            if isinstance(move, Load):
                self.residency.settle(Moved(move, 1, {}))

    def step(self, now: float = 0.0) -> StepPlan:
        plan = self.scheduler.plan(now)
        for chunk in plan.chunks:
            chunk_yields = chunk.yields_token
            chunk.sequence.started_s = now
            chunk.sequence.num_computed = chunk.end
            if chunk_yields:
                chunk.sequence.output_ids.append(1)
                self.scheduler.keep(chunk.sequence)
                self.scheduler.end_prefill(chunk.sequence)
        return plan


def names(plan: StepPlan) -> list[tuple[str, int]]:
    return [(chunk.sequence.request_id, chunk.num_tokens) for chunk in plan.chunks]


def test_decodes_go_first_and_a_long_prompt_comes_in_pieces() -> None:
    desk = Desk(max_batch_tokens=8, prefill_chunk=7)
    desk.add("a", 3)
    assert names(desk.step()) == [("a", 3)]
    desk.add("long", 20)
    assert names(desk.step()) == [("a", 1), ("long", 7)]
    assert names(desk.step()) == [("a", 1), ("long", 7)]
    assert names(desk.step()) == [("a", 1), ("long", 6)]
    assert names(desk.step()) == [("a", 1), ("long", 1)]


def test_where_a_prompt_is_cut_does_not_depend_on_its_neighbours() -> None:
    def cuts(num_neighbours: int) -> list[int]:
        desk = Desk(max_batch_tokens=16, prefill_chunk=8, tile=8)
        for i in range(num_neighbours):
            desk.add(f"n{i}", 5)
        desk.add("watched", 21)
        plans = [names(desk.step()) for _ in range(12)]
        return [n for plan in plans for name, n in plan if name == "watched" and n > 1]

    assert cuts(0) == cuts(1) == cuts(3) == cuts(7) == [8, 8, 5]


def test_a_piece_that_does_not_fit_waits_for_the_next_step() -> None:
    desk = Desk(max_batch_tokens=12, prefill_chunk=8, tile=8)
    desk.add("first", 7)
    desk.add("second", 8)
    assert names(desk.step()) == [("first", 7)]
    assert names(desk.step()) == [("first", 1), ("second", 8)]


def test_a_sequence_whose_adapter_is_away_waits_and_others_pass_it() -> None:
    desk = Desk()
    away = desk.add("away", 3, ref("x"))
    desk.add("base", 3)
    assert names(desk.step()) == [("base", 3)]
    assert away.wait_reason is WaitReason.ADAPTER
    assert desk.scheduler.wanted(0.0) == [ref("x")]
    desk.bring(ref("x"))
    assert ("away", 3) in names(desk.step())


def test_nobody_overtakes_for_memory() -> None:
    desk = Desk(num_blocks=4)
    desk.add("running", 8)
    desk.step()
    desk.add("large", 12)
    desk.add("small", 1)
    assert names(desk.step()) == [("running", 1)]


def test_when_blocks_run_out_the_youngest_gives_way_and_is_computed_again() -> None:
    desk = Desk(num_blocks=5, prefix_cache=False)
    old = desk.add("old", 7)
    young = desk.add("young", 7)
    desk.step()
    for _ in range(8):
        desk.step()
    assert young.status is Status.WAITING and young.num_preemptions == 1 and young.output_ids
    kept = list(young.output_ids)
    desk.scheduler.end(old)
    plan = desk.step()
    assert names(plan) == [("young", 7 + len(kept))]
    assert young.output_ids[: len(kept)] == kept


def test_ending_frees_everything() -> None:
    desk = Desk()
    image = make_image("i", offset=1, num_tokens=2)
    desk.bring(ref("x"))
    sequence = desk.add("s", 6, ref("x"), (image,))
    desk.scheduler.plan(0.0)
    assert desk.pool.num_used and desk.residency.num_holds(ref("x")) == 1
    desk.scheduler.end(sequence)
    assert desk.pool.num_used == 0 and desk.residency.num_holds(ref("x")) == 0
    assert not sequence.pinned_images and sequence.status is Status.ENDED


def test_a_piece_whose_images_exceed_the_vision_budget_waits_for_the_next_step() -> None:
    desk = Desk(max_image_patches_per_step=10)
    desk.add("first", 6, images=(make_image("one", offset=2, num_tokens=2),))
    desk.add("second", 6, images=(make_image("two", offset=2, num_tokens=2),))
    plan = desk.step()
    assert names(plan) == [("first", 6)]
    assert [job.image.digest for job in plan.image_jobs] == ["one"]
    plan = desk.step()
    assert names(plan) == [("first", 1), ("second", 6)]
    assert [job.image.digest for job in plan.image_jobs] == ["two"]


def test_an_image_asked_about_twice_is_encoded_once() -> None:
    desk = Desk()
    for name in ("first", "second"):
        desk.add(name, 6, images=(make_image("same", offset=2, num_tokens=2),))
    assert len(desk.step().image_jobs) == 1


def test_one_image_larger_than_the_whole_vision_budget_goes_alone() -> None:
    desk = Desk(max_image_patches_per_step=10)
    desk.add("s", 30, images=(make_image("huge", offset=1, num_tokens=20),))
    assert names(desk.step()) == [("s", 30)]


def test_a_starved_adapter_gets_a_slot_although_others_keep_coming() -> None:
    desk = Desk(num_slots=1, starvation_s=1.0)
    desk.bring(ref("popular"))
    first = desk.add("p0", 3, ref("popular"))
    desk.step(0.0)
    desk.add("starved", 3, ref("rare"))
    desk.step(0.1)
    desk.add("p1", 3, ref("popular"))
    assert ("p1", 3) in names(desk.step(0.5))
    desk.add("p2", 3, ref("popular"))
    assert "p2" not in dict(names(desk.step(1.2)))
    desk.scheduler.end(first)
    desk.scheduler.end(next(s for s in desk.scheduler.running if s.request_id == "p1"))
    assert desk.scheduler.wanted(1.3) == [ref("rare")]
    desk.bring(*desk.scheduler.wanted(1.3))
    assert dict(names(desk.step(1.4)))["starved"] == 3


def test_an_adapter_being_unloaded_gets_no_new_sequences() -> None:
    desk = Desk()
    desk.bring(ref("x"))
    desk.scheduler.draining = {ref("x")}
    desk.add("s", 3, ref("x"))
    assert names(desk.step()) == []
    assert desk.scheduler.wanted(0.0) == []


def test_starved_adapters_never_chase_each_other_out_of_slots_without_running() -> None:
    """With everybody starved, each adapter that is brought runs at least once before it may be sent away."""
    desk = Desk(num_slots=2, starvation_s=1.0, num_blocks=256)
    for i in range(12):
        desk.add(f"s{i}", 3, ref(f"a{i % 6}"))
    served: set[str] = set()
    for turn in range(40):
        now = 10.0 + turn
        desk.bring(*desk.scheduler.wanted(now))
        served |= {chunk.sequence.request_id for chunk in desk.step(now).chunks}
        for sequence in [s for s in desk.scheduler.running if len(s.output_ids) >= 2]:
            desk.scheduler.end(sequence)
    assert served == {f"s{i}" for i in range(12)}


# ---- beside running sequences


def test_a_long_prompt_beside_decodes_takes_its_small_share_of_each_step_and_all_of_it_when_alone() -> None:
    desk = Desk(num_blocks=1024, tile=8, prefill_chunk=64, prefill_beside_decodes=16)
    streams = [desk.add(f"d{i}", 3) for i in range(8)]
    desk.step()
    desk.add("long", 500)
    for _ in range(4):
        plan = desk.step()
        assert [n for name, n in names(plan) if name != "long"] == [1] * 8
        assert dict(names(plan))["long"] == 16
    for sequence in streams:
        desk.scheduler.end(sequence)
    assert names(desk.step()) == [("long", 64)]


def test_many_prompts_together_take_no_more_than_their_share_beside_decodes() -> None:
    desk = Desk(num_blocks=1024, tile=8, prefill_beside_decodes=16)
    desk.add("d", 3)
    desk.step()
    for i in range(6):
        desk.add(f"p{i}", 40)
    for _ in range(14):
        plan = desk.step()
        assert sum(n for _, n in names(plan) if n > 1) <= 16


def test_a_piece_with_an_image_beside_decodes_is_as_small_as_any_other() -> None:
    desk = Desk(num_blocks=1024, tile=8, prefill_chunk=64, prefill_beside_decodes=16)
    desk.add("d", 3)
    desk.step()
    desk.add("seen", 90, images=(make_image("one", offset=2, num_tokens=70),))
    plan = desk.step()
    assert names(plan) == [("d", 1), ("seen", 16)] and len(plan.image_jobs) == 1


# ---- prefixes


def test_a_second_prompt_starts_behind_what_it_shares_with_the_first_and_computes_at_least_a_token() -> None:
    desk = Desk(num_blocks=64, tile=4)
    desk.add("first", 16)
    desk.step()
    second = desk.add("second", 16)
    assert dict(names(desk.step()))["second"] == 4
    assert second.num_cached_tokens == 12


def test_who_owes_log_probabilities_of_the_prompt_computes_every_row() -> None:
    desk = Desk(num_blocks=64, tile=4)
    desk.add("first", 16)
    desk.step()
    made = make_sequence("scored", 16)
    scored = Sequence(replace(made.request, prompt_logprobs=0), made.sampler)
    desk.scheduler.add(scored)
    assert dict(names(desk.step()))["scored"] == 16


def test_an_image_inside_the_shared_prefix_is_neither_encoded_nor_pinned() -> None:
    desk = Desk(num_blocks=64, tile=4)
    picture = make_image("one", offset=1, num_tokens=6)
    first = desk.add("first", 12, images=(picture,))
    desk.step()
    desk.scheduler.end(first)
    second = desk.add("second", 12, images=(picture,))
    plan = desk.step()
    assert names(plan) == [("second", 4)] and not plan.image_jobs and not second.pinned_images


def test_a_preempted_sequence_finds_its_own_blocks_again_with_those_of_its_answer() -> None:
    desk = Desk(num_blocks=8, tile=4)
    sequence = desk.add("s", 7)
    for _ in range(7):
        desk.step()
    desk.scheduler._preempt(sequence)
    assert names(desk.step()) == [("s", 2)] and sequence.num_cached_tokens == 0


def test_what_a_failed_sequence_computed_or_used_is_found_by_nobody() -> None:
    desk = Desk(num_blocks=64, tile=4)
    failed = desk.add("failed", 16)
    desk.step()
    desk.scheduler.distrust(failed)
    desk.scheduler.end(failed)
    desk.add("next", 16)
    assert names(desk.step()) == [("next", 16)]
    assert desk.pool.num_cached == 0


def test_who_was_computed_in_other_pieces_leaves_nothing_to_others_later_either() -> None:
    desk = Desk(num_blocks=64, tile=4)
    apart = desk.add("apart", 16)
    desk.scheduler.distrust(apart)
    for _ in range(9):
        desk.step()
    desk.scheduler.end(apart)
    assert desk.pool.num_cached == 0


def test_switched_off_nothing_is_kept() -> None:
    desk = Desk(num_blocks=64, tile=4, prefix_cache=False)
    for name in ("first", "second"):
        sequence = desk.add(name, 16)
        assert names(desk.step()) == [(name, 16)]
        desk.scheduler.end(sequence)
    assert desk.pool.num_cached == 0
