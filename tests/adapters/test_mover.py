"""The mover reads once, writes at step boundaries, keeps the host tier inside its bytes, and answers every load."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from adapters.errors import AdapterError, AdapterRejected, InsufficientMemory, RejectReason
from adapters.host_tier import HostTier
from adapters.mover import Mover
from adapters.moves import Evict, Load, Moved, MoveFailed, Tier
from adapters.ref import AdapterRef
from adapters.residency import Residency
from adapters.sites import Site
from adapters.slots import PageKey, SlotBank
from adapters.weights import AdapterWeights
from tests.support.lora import CPU, make_ref, make_weights

SITES = {"p": Site("p", 64, 96, "language")}
ONE = 8 * (64 + 96) * 4  # bytes of a rank-8 adapter
TIMEOUT_S = 20.0


class Desk:
    """A mover over a small bank, with reads that can be held up and counted."""

    def __init__(self, host_bytes: int = 10 * ONE, num_slots: int = 3) -> None:
        self.bank = SlotBank(SITES, num_slots, 64, torch.float32, CPU)
        self.reads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failures: dict[str, BaseException] = {}
        self.began = threading.Semaphore(0)
        self._ready = threading.Semaphore(0)
        self.mover = Mover(self.bank, self.read, host_bytes, self._ready.release)

    def read(self, ref: AdapterRef) -> AdapterWeights:
        self.reads.append(ref.name)
        self.began.release()
        assert self.gate.wait(TIMEOUT_S)
        if ref.name in self.failures:
            raise self.failures[ref.name]
        return make_weights(len(ref.name), {"p": 8}, SITES)

    def wait(self, count: int) -> list[Moved | MoveFailed]:
        """Results of as many loads, as an engine collects them."""
        found: list[Moved | MoveFailed] = []
        while len(found) < count:
            assert self._ready.acquire(timeout=TIMEOUT_S), "on_ready was not called"
            found += self.mover.finished()
        return found

    def load(self, ref: AdapterRef, slot: int) -> Moved | MoveFailed:
        self.mover.start([Load(ref, slot)])
        (result,) = self.wait(1)
        return result


@pytest.fixture
def make_desk() -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(host_bytes: int = 10 * ONE, num_slots: int = 3) -> Desk:
        desks.append(Desk(host_bytes, num_slots))
        return desks[-1]

    yield make
    for desk in desks:
        desk.gate.set()
        desk.mover.close()


MakeDesk = Callable[..., Desk]


def test_a_load_is_written_only_at_a_step_boundary(make_desk: MakeDesk) -> None:
    desk = make_desk()
    desk.mover.start([Load(make_ref("a"), 1)])
    assert desk._ready.acquire(timeout=TIMEOUT_S)
    assert not desk.bank.is_loaded(1)
    (result,) = desk.mover.finished()
    assert isinstance(result, Moved)
    assert desk.bank.is_loaded(1)
    assert (result.num_bytes, result.origin, set(result.seconds)) == (ONE, Tier.DISK, {"read", "copy"})
    assert desk.mover.finished() == []


def test_an_evict_empties_its_slot_at_once(make_desk: MakeDesk) -> None:
    desk = make_desk()
    desk.load(make_ref("a"), 0)
    desk.mover.start([Evict(make_ref("a"), 0), Load(make_ref("b"), 0)])
    assert not desk.bank.is_loaded(0)
    assert isinstance(desk.wait(1)[0], Moved)


def test_the_second_load_comes_from_the_host(make_desk: MakeDesk) -> None:
    desk = make_desk()
    a = make_ref("a")
    desk.load(a, 0)
    result = desk.load(a, 1)
    assert isinstance(result, Moved)
    assert (result.origin, result.seconds["read"], desk.reads) == (Tier.HOST, 0.0, ["a"])
    assert torch.equal(
        desk.bank.shelf("p").pages[PageKey(8, torch.float32)].a[0],
        desk.bank.shelf("p").pages[PageKey(8, torch.float32)].a[1],
    )


def test_all_who_want_the_same_content_share_one_read(make_desk: MakeDesk) -> None:
    desk = make_desk(host_bytes=0)
    a = make_ref("a")
    alias = AdapterRef("alias", 1, digest=a.digest)
    desk.gate.clear()
    desk.mover.prefetch(a)
    desk.mover.start([Load(a, 0), Load(alias, 1)])
    desk.mover.prefetch(alias)
    desk.gate.set()
    results = desk.wait(2)
    assert [result.move.ref for result in results] == [a, alias]
    assert desk.reads == ["a"]


def test_a_prefetched_adapter_loads_from_the_host(make_desk: MakeDesk) -> None:
    desk = make_desk()
    a = make_ref("a")
    desk.mover.prefetch(a)
    assert desk._ready.acquire(timeout=TIMEOUT_S)
    assert desk.mover.finished() == []
    assert desk.mover.is_on_host(a)
    assert desk.mover.host_refs() == frozenset({a})
    result = desk.load(a, 0)
    assert isinstance(result, Moved)
    assert result.origin is Tier.HOST


def test_the_host_tier_stays_inside_its_bytes_and_drops_the_least_recently_used(make_desk: MakeDesk) -> None:
    desk = make_desk(host_bytes=2 * ONE, num_slots=8)
    a, b, c = (make_ref(name) for name in "abc")
    desk.load(a, 0)
    desk.load(b, 1)
    desk.load(a, 2)
    desk.load(c, 3)
    assert desk.mover.host_refs() == frozenset({a, c})
    assert desk.mover.host_num_bytes == 2 * ONE


def test_an_adapter_larger_than_the_host_tier_passes_through(make_desk: MakeDesk) -> None:
    desk = make_desk(host_bytes=ONE - 1)
    assert isinstance(desk.load(make_ref("a"), 0), Moved)
    assert desk.mover.host_num_bytes == 0
    tier = HostTier(ONE)
    tier.put(make_ref("small"), desk.bank.stage(make_weights(0, {"p": 8}, SITES)))
    tier.put(make_ref("large"), desk.bank.stage(make_weights(0, {"p": 9}, SITES)))
    assert tier.refs() == frozenset({make_ref("small")}), "what does not fit evicts nothing"


def test_forget_frees_the_hosts_copy_and_a_read_under_way_is_not_kept(make_desk: MakeDesk) -> None:
    desk = make_desk()
    a, b = make_ref("a"), make_ref("b")
    desk.load(a, 0)
    assert desk.mover.forget(a) == ONE
    assert desk.mover.forget(a) == 0
    assert desk.mover.host_num_bytes == 0
    desk.gate.clear()
    desk.mover.prefetch(b)
    assert desk.mover.forget(b) == 0
    desk.gate.set()
    assert desk._ready.acquire(timeout=TIMEOUT_S)
    assert not desk.mover.is_on_host(b)


def test_a_refusal_reaches_the_load_as_it_is_and_the_slot_stays_empty(make_desk: MakeDesk) -> None:
    desk = make_desk()
    refusal = AdapterRejected(RejectReason.NON_FINITE, "NaN in it")
    desk.failures["a"] = refusal
    result = desk.load(make_ref("a"), 0)
    assert result == MoveFailed(Load(make_ref("a"), 0), refusal)
    assert not desk.bank.is_loaded(0)
    del desk.failures["a"]
    assert isinstance(desk.load(make_ref("a"), 0), Moved), "nothing of the failure remains"


@pytest.mark.parametrize(
    "error, kind",
    [
        (FileNotFoundError(2, "No such file or directory", "/secret/place"), AdapterError),
        (RuntimeError("broken /secret/place"), AdapterError),
        (KeyError("/secret/place"), AdapterError),
        (MemoryError(), InsufficientMemory),
        (torch.OutOfMemoryError("CUDA out of memory"), InsufficientMemory),
    ],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_foreign_errors_become_ours_without_paths(
    make_desk: MakeDesk, error: BaseException, kind: type[AdapterError], caplog: pytest.LogCaptureFixture
) -> None:
    desk = make_desk()
    desk.failures["a"] = error
    result = desk.load(make_ref("a"), 0)
    assert isinstance(result, MoveFailed)
    assert type(result.error) is kind
    assert "a@1" in str(result.error)
    assert "secret" not in str(result.error) + caplog.text


def test_a_failed_copy_fails_the_load_alone(make_desk: MakeDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = make_desk()
    desk.load(make_ref("a"), 0)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(desk.bank, "_write_site", fail)
    result = desk.load(make_ref("b"), 1)
    assert isinstance(result, MoveFailed)
    assert isinstance(result.error, InsufficientMemory)
    assert [desk.bank.is_loaded(slot) for slot in range(3)] == [True, False, False]


def test_moves_that_contradict_a_load_under_way_or_a_slots_content_are_refused(make_desk: MakeDesk) -> None:
    desk = make_desk()
    desk.load(make_ref("a"), 0)
    desk.gate.clear()
    desk.mover.start([Load(make_ref("b"), 1)])
    with pytest.raises(ValueError, match="slot 1 is loading b@1"):
        desk.mover.start([Evict(make_ref("b"), 1)])
    with pytest.raises(ValueError, match="slot 1 is loading b@1"):
        desk.mover.start([Load(make_ref("c"), 1)])
    with pytest.raises(ValueError, match="slot 0 is not empty"):
        desk.mover.start([Load(make_ref("c"), 0)])


def test_at_most_two_reads_run_at_once_and_close_drops_the_rest(make_desk: MakeDesk) -> None:
    threads_before = set(threading.enumerate())
    desk = make_desk(num_slots=8)
    desk.gate.clear()
    desk.mover.start([Load(make_ref(name), slot) for slot, name in enumerate("abcdef")])
    for _ in range(2):
        assert desk.began.acquire(timeout=TIMEOUT_S)
    assert not desk.began.acquire(timeout=0.05)
    closer = threading.Thread(target=desk.mover.close)
    closer.start()
    desk.gate.set()
    closer.join(TIMEOUT_S)
    assert not closer.is_alive()
    assert len(desk.reads) == 2
    assert set(threading.enumerate()) <= threads_before


def test_residency_and_mover_serve_more_adapters_than_slots(make_desk: MakeDesk) -> None:
    desk = make_desk(host_bytes=4 * ONE, num_slots=2)
    residency = Residency(2)
    refs = [make_ref(f"adapter-{i}") for i in range(7)]
    for round_number in range(60):
        wanted = [refs[(round_number * k) % 7] for k in (1, 2, 3)]
        moves = residency.plan(wanted)
        desk.mover.start(moves)
        for result in desk.wait(sum(isinstance(move, Load) for move in moves)):
            residency.settle(result)
        assert {r.slot for r in residency.residents()} == {s for s in range(2) if desk.bank.is_loaded(s)}
        assert any(residency.slot_of(ref) is not None for ref in wanted)
    assert desk.mover.host_num_bytes <= 4 * ONE


def test_the_time_of_a_read_ahead_is_the_loads_that_follows_and_told_once(make_desk: MakeDesk) -> None:
    desk = make_desk()
    a = make_ref("a")
    desk.mover.prefetch(a)
    assert desk._ready.acquire(timeout=TIMEOUT_S)
    first, second = desk.load(a, 0), desk.load(a, 1)
    assert isinstance(first, Moved) and isinstance(second, Moved)
    assert first.seconds["read"] > 0 and second.seconds["read"] == 0
