"""One adapter's flood delays another by its share at most, and background sequences delay nobody."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace

import pytest

from adapters.ref import AdapterRef, WeightedRef
from engine import scheduler
from engine.fairness import in_turn
from engine.sequence import Sequence, Status
from tests.engine.test_scheduler import Desk, names
from tests.support.requests import make_sequence, ref

STEP_S = 0.05


class Town:
    """A scheduler under load: sequences of given lengths, a step each 50 ms of a fake clock."""

    def __init__(self, **config: int | float) -> None:
        self.desk = Desk(num_blocks=4096, max_batch_tokens=512, **config)  # type: ignore[arg-type]
        self.now = 0.0
        self.lengths: dict[str, int] = {}
        self.started: dict[str, float] = {}

    def add(self, name: str, adapter: AdapterRef, num_tokens: int) -> Sequence:
        self.lengths[name] = num_tokens
        return self.desk.add(name, 3, adapter, arrival_s=self.now)

    def step(self) -> None:
        self.now += STEP_S
        self.desk.bring(*self.desk.scheduler.wanted(self.now))
        for chunk in self.desk.step(self.now).chunks:
            self.started.setdefault(chunk.sequence.request_id, self.now)
        for sequence in list(self.desk.scheduler.running):
            if len(sequence.output_ids) >= self.lengths[sequence.request_id]:
                self.desk.scheduler.end(sequence)

    def wait_of(self, sequence: Sequence, flood: Callable[[], None]) -> float:
        begin = self.now
        while sequence.request_id not in self.started and self.now < begin + 120:
            flood()
            self.step()
        return self.started.get(sequence.request_id, begin + 120) - begin


def longest_wait(rare: list[AdapterRef], seed: int, tokens: tuple[int, int], **config: int | float) -> float:
    """Of one request for each of the rare adapters, in a queue that a flood keeps at 100."""
    town, draw = Town(**config), random.Random(seed)
    flooding = ref("flood")

    def flood() -> None:
        while len(town.desk.scheduler.waiting) < 100:
            town.add(f"f{len(town.lengths)}", flooding, draw.randint(*tokens))

    for _ in range(draw.randint(40, 80)):
        flood()
        town.step()
    asked = [town.add(f"rare{i}", adapter, draw.randint(*tokens)) for i, adapter in enumerate(rare)]
    return max(town.wait_of(sequence, flood) for sequence in asked)


def bound(num_adapters: int, tokens: tuple[int, int], num_places: int) -> float:
    """The promise: at most 2 s, or twice the time until everybody has had a turn of the longest kind."""
    return max(2.0, 2 * num_adapters * tokens[1] * STEP_S / num_places)


@pytest.mark.parametrize("seed", range(4))
def test_a_flood_does_not_keep_another_adapter_waiting(seed: int) -> None:
    assert longest_wait([ref("rare")], seed, (10, 40), num_slots=2, max_running=8) <= bound(2, (10, 40), 8)


@pytest.mark.parametrize("seed", range(4))
def test_a_flood_on_one_version_does_not_keep_another_version_waiting(seed: int) -> None:
    wait = longest_wait([ref("flood", 2)], seed, (10, 40), num_slots=2, max_running=8)
    assert wait <= bound(2, (10, 40), 8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_rare", [1, 3])
def test_adapters_that_share_one_slot_with_a_flood_each_get_their_turn(num_rare: int, seed: int) -> None:
    rare = [ref(f"rare{i}") for i in range(num_rare)]
    wait = longest_wait(rare, seed, (4, 16), num_slots=1, max_running=8)
    assert wait <= bound(num_rare + 1, (4, 16), 1)


def in_order_of_arrival(waiting: Collection[Sequence], running: Collection[Sequence]) -> Iterator[Sequence]:
    return iter([*[s for s in running if not s.is_decoding], *waiting])


def test_first_come_first_served_the_same_flood_does_keep_it_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control."""
    monkeypatch.setattr(scheduler, "in_turn", in_order_of_arrival)
    wait = longest_wait([ref("rare")], 0, (10, 40), num_slots=2, max_running=8)
    assert wait > bound(2, (10, 40), 8)


@pytest.mark.parametrize("num_words", [3, 90])
def test_a_rare_adapter_computes_its_prompt_before_what_a_flood_has_queued(num_words: int) -> None:
    """However many of the flood run, prefill and wait: a step for each piece of its prompt, and none for others."""
    budgets = {"prefill_chunk": 64, "prefill_beside_decodes": 32}
    desk = Desk(num_blocks=4096, max_running=16, tile=32, prefix_cache=False, **budgets)
    desk.bring(ref("flood"), ref("rare"))
    for i in range(60):
        desk.add(f"f{i}", 90, ref("flood"))
    for _ in range(3):
        desk.step()
    assert {s.is_decoding for s in desk.scheduler.running} == {True, False}
    desk.add("rare", num_words, ref("rare"))
    plans = [names(desk.step()) for _ in range(-(-num_words // 32))]
    assert sum(dict(plan).get("rare", 0) for plan in plans) == num_words


def full_of_flood(**config: int | float) -> Desk:
    desk = Desk(num_blocks=256, max_running=4, tile=4, **config)  # type: ignore[arg-type]
    desk.bring(ref("flood"), ref("rare"))
    for i in range(6):
        desk.add(f"f{i}", 9, ref("flood"))
    for _ in range(3):
        desk.step()
    assert [s.request_id for s in desk.scheduler.running] == ["f0", "f1", "f2", "f3"]
    return desk


def test_when_a_flood_has_all_places_another_adapter_gets_one_at_once() -> None:
    desk = full_of_flood()
    rare = desk.add("rare", 3, ref("rare"))
    assert ("rare", 3) in names(desk.step())
    assert [s.request_id for s in desk.scheduler.running] == ["f0", "f1", "f2", "rare"]
    for _ in range(3):
        desk.step()
    desk.scheduler.end(rare)
    assert ("f3", 4) in names(desk.step()), "all but its last, half full block was still there"


def test_places_are_given_up_until_they_are_shared_and_no_further() -> None:
    desk = full_of_flood()
    for i in range(4):
        desk.add(f"r{i}", 3, ref("rare"))
    for _ in range(6):
        desk.step()
    shares = Counter(s.adapter.name for s in desk.scheduler.running)
    assert shares == {"flood": 2, "rare": 2}
    before = [s.request_id for s in desk.scheduler.running]
    desk.step()
    assert [s.request_id for s in desk.scheduler.running] == before


def test_nobody_gives_up_a_place_for_one_whose_adapter_is_away() -> None:
    desk = full_of_flood()
    desk.add("away", 3, ref("elsewhere"))
    desk.step()
    assert [s.request_id for s in desk.scheduler.running] == ["f0", "f1", "f2", "f3"]


def sequences(*adapters: AdapterRef, arrival_s: float = 0.0) -> list[Sequence]:
    return [make_sequence(f"{i}", 3, adapter, arrival_s=arrival_s) for i, adapter in enumerate(adapters)]


def ids(order: Iterable[Sequence]) -> str:
    return "".join(sequence.request_id for sequence in order)


def decoding(*adapters: AdapterRef) -> list[Sequence]:
    made = sequences(*adapters)
    for sequence in made:
        sequence.num_computed, sequence.output_ids = sequence.num_tokens, [1]
    return made


def test_adapters_take_turns_and_whoever_has_fewest_decoding_is_first() -> None:
    a, b = ref("a"), ref("b")
    waiting = sequences(a, a, a, b)
    assert ids(in_turn(waiting, [])) == "0312"
    assert ids(in_turn(waiting, decoding(b, b))) == "0123"
    assert ids(in_turn(waiting, decoding(a))) == "3012"
    assert ids(in_turn(sequences(a, a, a), [])) == "012"


def test_within_an_adapter_prompts_that_were_begun_go_on_before_others_begin() -> None:
    begun = make_sequence("begun", 9, ref("a"))
    begun.num_computed = 4
    assert [s.request_id for s in in_turn(sequences(ref("a"), ref("b")), [begun])] == ["begun", "1", "0"]


def test_compositions_are_one_share_whatever_their_weights() -> None:
    parts = [AdapterRef("(composed)", 1, f"d{i}", parts=(WeightedRef(ref("a"), i + 1.0),)) for i in range(3)]
    waiting = sequences(*parts, ref("b"))
    assert ids(in_turn(waiting, [])) == "0312"


# ---- background


def background(desk: Desk, name: str, adapter: AdapterRef) -> Sequence:
    made = make_sequence(name, 3, adapter)
    sequence = Sequence(replace(made.request, is_background=True), made.sampler)
    desk.scheduler.add(sequence)
    return sequence


def test_background_runs_only_while_nobody_else_is_there_and_goes_on_afterwards() -> None:
    desk = Desk()
    desk.bring(ref("x"))
    shadow = background(desk, "shadow", ref("x"))
    assert names(desk.step()) == [("shadow", 3)]
    other = desk.add("other", 3)
    assert names(desk.step()) == [("other", 3)]
    assert shadow.status is Status.WAITING and desk.residency.num_holds(ref("x")) == 0
    assert names(desk.step()) == [("other", 1)]
    desk.scheduler.end(other)
    assert names(desk.step()) == [("shadow", 4)]


def test_background_waits_also_for_those_who_wait() -> None:
    desk = Desk()
    background(desk, "shadow", ref("x"))
    desk.bring(ref("x"))
    desk.add("away", 3, ref("y"))
    assert names(desk.step()) == []


def test_background_brings_no_adapter_and_pushes_none_out() -> None:
    desk = Desk(num_slots=1, starvation_s=1.0)
    desk.bring(ref("x"))
    background(desk, "shadow", ref("y"))
    for now in (0.0, 5.0, 50.0):
        assert names(desk.step(now)) == []
        assert desk.scheduler.wanted(now) == []
    desk.add("x", 3, ref("x"))
    assert names(desk.step(60.0)) == [("x", 3)]
