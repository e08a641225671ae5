"""A hit is a miss to the bit: what is found computed changes no logit, whatever the adapter, images and pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base.pocket import CHECKPOINT
from engine import prefix
from engine.config import EngineConfig
from engine.observer import FirstToken, ImagesEncoded
from engine.prefix import Prefixes
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step import StepPlan
from engine.transport import ThreadTransport
from tests.support.scenes import scene
from tests.support.serving import Answer, Ask, Rig, gather
from tests.support.zoo import make_zoo

SYSTEM = "You are a careful guide to the harbour, and you answer in short and plain sentences. " * 6
RED, BLUE = scene("red", "circle", (150, 150)), scene("blue", "circle", (150, 150))
ADAPTERS = (None, "rank4", "dora", "vision", "merger", "everything")
KINDS = ("rank4", "dora", "vision", "merger", "everything")


@dataclass(frozen=True)
class Told:
    """An answer with the logits behind each of its tokens."""

    answer: Answer
    logits: Tensor  # [tokens, V] float32

    @property
    def num_cached(self) -> int:
        return self.answer.finish.usage.cached_tokens


class Town:
    """Rigs over the same adapters that differ in their budgets alone."""

    def __init__(self, root: Path, packages: dict[str, Path]) -> None:
        self._root, self._packages = root, packages
        self._rigs: dict[EngineConfig, Rig] = {}

    def rig(self, **budgets: int | bool) -> Rig:
        config = EngineConfig(max_model_len=1024, **{"kv_bytes": 8 << 20, **budgets})  # type: ignore[arg-type]
        if config not in self._rigs:
            self._rigs[config] = Rig(str(CHECKPOINT), self._root / f"state{len(self._rigs)}", config)
            self._rigs[config].register(self._packages)
        return self._rigs[config]

    def close(self) -> None:
        for rig in self._rigs.values():
            rig.close()


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    root = tmp_path_factory.mktemp("prefixes")
    made = Town(root, make_zoo(CHECKPOINT, root / "zoo", KINDS))
    yield made
    made.close()


def forget(rig: Rig) -> None:
    """Nothing is known any more; between asks, while the engine's thread has nothing to do."""
    transport = rig.engine._transport
    assert isinstance(transport, ThreadTransport)
    transport._engine._scheduler.distrust_all()


async def _tell(rig: Rig, ask: Ask) -> Told:
    rows: list[Tensor] = []
    request = replace(rig.request(ask), on_logits=lambda row: rows.append(row.clone()))
    answer = await gather(rig.engine.submit(request))
    return Told(answer, torch.stack(rows))


def tell(rig: Rig, *asks: Ask) -> list[Told]:
    async def all_at_once() -> list[Told]:
        return list(await asyncio.gather(*(_tell(rig, ask) for ask in asks)))

    return asyncio.run(all_at_once())


def is_same(one: Told, other: Told) -> bool:
    return one.answer.token_ids == other.answer.token_ids and torch.equal(one.logits, other.logits)


def long_ask(adapter: str | None, question: str, picture: object = None) -> Ask:
    return Ask(SYSTEM + question, adapter, () if picture is None else (picture,), 6)  # type: ignore[arg-type]


def differing(rig: Rig, asks: list[Ask], misses: list[Told]) -> list[int]:
    """Which asks are told otherwise by a rig that has been asked similar things before."""
    (hits,) = [[tell(rig, ask)[0] for ask in asks]]
    return [i for i, (hit, miss) in enumerate(zip(hits, misses, strict=True)) if not is_same(hit, miss)]


def mixture() -> list[Ask]:
    questions = ("Who are you?", "Where is the red circle, and what is beside it?")
    pictures = (None, RED, BLUE)
    return [long_ask(a, q, picture) for q in questions for picture in pictures for a in ADAPTERS]


@pytest.fixture(scope="module")
def misses(town: Town) -> list[Told]:
    return [tell(town.rig(prefix_cache=False), ask)[0] for ask in mixture()]


def test_hits_are_misses_to_the_bit_across_adapters_and_images(town: Town, misses: list[Told]) -> None:
    rig = town.rig()
    assert differing(rig, mixture(), misses) == []
    hits = [tell(rig, ask)[0] for ask in mixture()]
    assert all(is_same(hit, miss) for hit, miss in zip(hits, misses, strict=True))
    assert all(0 < hit.num_cached < hit.answer.finish.usage.prompt_tokens for hit in hits)
    assert all(hit.num_cached % 32 == 0 for hit in hits)


def test_all_at_once_in_one_mixed_batch_they_are_too(town: Town, misses: list[Told]) -> None:
    rig = town.rig()
    forget(rig)
    for _ in range(2):
        told = tell(rig, *mixture())
        assert all(is_same(one, miss) for one, miss in zip(told, misses, strict=True))


@pytest.mark.parametrize("chunk", [32, 96])
def test_how_prompts_are_cut_changes_no_bit(town: Town, misses: list[Told], chunk: int) -> None:
    rig = town.rig(prefill_chunk=chunk, prefill_beside_decodes=chunk)
    assert differing(rig, mixture(), misses) == []


def test_preempted_sequences_go_on_to_the_bit(town: Town, misses: list[Told]) -> None:
    """With room for three or four of them, and a flood that makes places be given up."""
    rig = town.rig(kv_bytes=1 << 20, max_running=5)
    asks = [replace(ask, num_tokens=6) for ask in mixture()]
    rig.recorder.events.clear()
    told = tell(rig, *asks)
    assert sum(one.answer.finish.timings.num_preemptions for one in told) > 0
    assert all(is_same(one, miss) for one, miss in zip(told, misses, strict=True))


def test_a_sequence_that_computes_its_own_answer_again_computes_the_same_bits(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent back in the middle, and nothing found again: prompt and answer are computed in one go."""
    rig, ask = town.rig(prefix_cache=False), replace(long_ask("rank4", "And then?", RED), num_tokens=24)
    (whole,) = tell(rig, ask)
    plan, sent_back = Scheduler.plan, list[int]()

    def interrupted(self: Scheduler, now: float) -> StepPlan:
        for sequence in [s for s in self.running if len(s.output_ids) == 13 and not sent_back]:
            self._preempt(sequence)
            sent_back.append(1)
        return plan(self, now)

    monkeypatch.setattr(Scheduler, "plan", interrupted)
    (again,) = tell(rig, ask)
    assert sent_back and again.answer.finish.timings.num_preemptions == 1
    assert is_same(again, whole)


def test_a_second_question_on_a_picture_encodes_nothing_and_says_what_it_found(town: Town) -> None:
    rig = town.rig()
    forget(rig)
    picture = scene("green", "square", (140, 140))
    rig.recorder.events.clear()
    for question in ("What is it?", "Where is it?"):
        tell(rig, Ask(question, None, (picture,), 2))
    first, second = [e for e in rig.recorder.events if isinstance(e, FirstToken)]
    assert first.num_cached_tokens == 0 < second.num_cached_tokens
    assert sum(e.num_images for e in rig.recorder.events if isinstance(e, ImagesEncoded)) == 1


def test_eight_adapters_asked_at_once_about_a_picture_share_one_encode(town: Town) -> None:
    rig = town.rig()
    picture = scene("yellow", "square", (140, 140))
    rig.recorder.events.clear()
    tell(rig, *(Ask("What is it?", (None, "rank4", "dora")[i % 3], (picture,), 2) for i in range(8)))
    assert sum(e.num_images for e in rig.recorder.events if isinstance(e, ImagesEncoded)) == 1


# ---- positive controls


def test_a_key_that_forgets_the_adapter_is_noticed(
    town: Town, misses: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "_root", lambda ref: b"everybody")
    rig = town.rig()
    forget(rig)
    assert differing(rig, mixture(), misses)
    forget(rig)


def test_a_key_that_forgets_the_picture_is_noticed(
    town: Town, misses: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Prefixes._key

    def blind(self: Prefixes, parent: bytes, sequence: Sequence, begin: int) -> bytes:
        prompt = replace(sequence.request.prompt, images=())
        return key(self, parent, replace(sequence, request=replace(sequence.request, prompt=prompt)), begin)

    monkeypatch.setattr(Prefixes, "_key", blind)
    rig = town.rig()
    forget(rig)
    assert differing(rig, mixture(), misses)
    forget(rig)
