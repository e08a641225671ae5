"""Adapters composed answer as PEFT's ``add_weighted_adapter(combination_type="cat")`` does, in a mixed batch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from adapters.composition import compose
from base.pocket import CHECKPOINT
from engine.errors import AdapterUnavailable
from engine.messages import UnloadReport
from engine.observer import AdapterMoved, ImagesEncoded
from engine.stream import Delta
from tests.parity.test_parity import Pair, differing
from tests.support.oracle import Oracle, Reference
from tests.support.scenes import scene
from tests.support.serving import Answer, Ask, Rig
from tests.support.zoo import make_zoo

RED = scene("red", "circle")
BLUE = scene("blue", "square", (150, 110))

COMPOSITIONS: Mapping[str, Mapping[str, float]] = {
    "ranks": {"rank4": 0.7, "rank64": -0.4},
    "words_and_sight": {"rank4": 1.0, "vision": 0.5},
    "one_eye": {"rank4": -0.8, "vision": 1.0},
    "four": {"everything": 0.6, "rank4": 0.8, "merger": -1.0, "rslora": 0.5},
    "louder": {"vision": 2.0, "merger": 1.5},
}
ADAPTERS = {name for weights in COMPOSITIONS.values() for name in weights}

ASKS = (
    Ask("Who are you?", "ranks"),
    Ask("What is this?", "ranks", (BLUE,)),
    Ask("Describe the picture.", "words_and_sight", (RED,)),
    Ask("Hello!", "words_and_sight"),
    Ask("Describe the picture.", "one_eye", (RED,)),
    Ask("Is there a triangle?", "four", (BLUE,)),
    Ask("Tell me of the sea, the sky and the birds in it. " * 40, "four"),
    Ask("Describe the picture.", "louder", (BLUE,)),
    Ask("Describe the picture.", "vision", (RED,)),
    Ask("Who are you?", "rank4"),
    Ask("Who are you?", None),
    Ask("Describe the picture.", None, (RED,)),
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_zoo(CHECKPOINT, tmp_path_factory.mktemp("zoo"), {*ADAPTERS, "dora"})


@pytest.fixture(scope="module")
def pair(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    rig = Rig(str(CHECKPOINT), tmp_path_factory.mktemp("state"), cpu_linear="dequantised")
    rig.register(packages)
    oracle = Oracle(CHECKPOINT, adapters={name: packages[name] for name in sorted(ADAPTERS)})
    for name, weights in COMPOSITIONS.items():
        rig.compose(name, weights)
        oracle.compose(name, weights)
    yield Pair(rig, oracle)
    rig.close()


@pytest.fixture(scope="module")
def references(pair: Pair) -> list[Reference]:
    return pair.references(ASKS)


@pytest.fixture(scope="module")
def answers(pair: Pair) -> list[Answer]:
    return asyncio.run(pair.rig.answers(ASKS))


def test_a_mixed_batch_of_compositions_equals_pefts_run_alone(
    answers: list[Answer], references: list[Reference]
) -> None:
    assert differing(answers, references) == []
    num_certain = sum(reference.num_certain() for reference in references)
    assert num_certain >= len(ASKS) * 4, f"only {num_certain} tokens were certain enough to compare"


def test_other_weights_are_told_apart_so_that_the_comparison_can_fail(
    pair: Pair, references: list[Reference]
) -> None:
    composed = [ask for ask in ASKS if ask.adapter in COMPOSITIONS]
    for name, weights in COMPOSITIONS.items():
        pair.rig.compose(f"not_{name}", {part: -weight for part, weight in weights.items()})
    negated = [Ask(ask.text, f"not_{ask.adapter}", ask.images) for ask in composed]
    answers = asyncio.run(pair.rig.answers(negated))
    assert len(differing(answers, references[: len(composed)])) >= len(composed) - 2


def test_a_composition_answers_alone_as_in_a_batch(pair: Pair, answers: list[Answer]) -> None:
    alone = asyncio.run(pair.rig.alone(ASKS[:6]))
    assert [a.token_ids for a in alone] == [a.token_ids for a in answers[:6]]


# ---- what comes to one adapter, or to none


def scored(pair: Pair, adapter: str | None) -> list[tuple[int, float]]:
    """Tokens with their log-probabilities, to the bit."""
    ask = Ask("Describe the picture.", adapter, (RED,))

    async def run() -> list[tuple[int, float]]:
        stream = pair.rig.submit(ask, logprobs=0)
        deltas = [item async for item in stream if isinstance(item, Delta)]
        return [(each.token_id, each.logprob) for delta in deltas for each in delta.logprobs]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "weights", [{"everything": 0.0, "rank4": 0.0}, {"everything": 0.5, "everything@1": -0.5}]
)
def test_weights_that_come_to_nothing_are_the_base_to_the_bit(pair: Pair, weights: dict[str, float]) -> None:
    pair.rig.compose("nothing", weights)
    assert scored(pair, "nothing") == scored(pair, None)
    assert scored(pair, "everything") != scored(pair, None)


@pytest.mark.parametrize(
    "weights", [{"everything": 1.0, "rank4": 0.0}, {"everything": 0.25, "everything@1": 0.75}]
)
def test_one_part_at_weight_1_is_the_adapter_to_the_bit(pair: Pair, weights: dict[str, float]) -> None:
    pair.rig.compose("itself", weights)
    assert scored(pair, "itself") == scored(pair, "everything")


def test_a_weight_too_small_to_act_is_served_and_not_refused(pair: Pair) -> None:
    pair.rig.compose("whisper", {"rank4": 1e-30})
    assert scored(pair, "whisper") == scored(pair, None)


def test_a_part_at_weight_1_alone_at_its_sites_shares_its_caches(pair: Pair) -> None:
    ref = {name: pair.rig.compositions[name] for name in ("one_eye", "words_and_sight")}
    vision = pair.rig.registry.resolve("vision")
    assert ref["one_eye"].vision_digest == vision.vision_digest
    assert ref["words_and_sight"].vision_digest not in ("", vision.vision_digest)
    assert ref["words_and_sight"].language_digest == pair.rig.registry.resolve("rank4").language_digest
    pair.rig.compose("sight", {"rank4": 0.1, "vision": 1.0})
    blue = scene("blue", "circle", (150, 110))
    asyncio.run(pair.rig.answer(Ask("What is this?", "vision", (blue,), num_tokens=1)))
    num_encodes = encodes(pair)
    asyncio.run(pair.rig.answer(Ask("What is this?", "sight", (blue,), num_tokens=1)))
    assert encodes(pair) == num_encodes


def encodes(pair: Pair) -> int:
    return sum(each.num_images for each in pair.rig.recorder.events if isinstance(each, ImagesEncoded))


# ---- a composition's life


def test_every_weight_has_caches_of_its_own(pair: Pair) -> None:
    parts = [pair.rig.registry.resolve(name) for name in ("rank4", "everything")]
    seen = {
        (ref.digest, ref.vision_digest, ref.language_digest)
        for first in (1.0, 0.5, -0.5)
        for second in (1.0, 0.5)
        for ref in [compose(zip(parts, (first, second), strict=True))]
    }
    assert [len({digests[i] for digests in seen}) for i in range(3)] == [6, 2, 6]


def test_a_composition_takes_one_slot_and_goes_as_any_adapter(pair: Pair) -> None:
    rig = pair.rig
    rig.compose("passing", {"rank4": 0.3, "rslora": 0.3})
    ref = rig.compositions["passing"]
    asyncio.run(rig.answer(Ask("Hello!", "passing", num_tokens=1)))
    moved = [each for each in rig.recorder.events if isinstance(each, AdapterMoved) and each.ref == ref]
    assert len(moved) == 1
    assert [slot.ref for slot in rig.engine.status().slots].count(ref) == 1
    report: UnloadReport = asyncio.run(rig.engine.unload_adapter(ref))
    assert report.freed_host_bytes > 0
    assert ref not in {slot.ref for slot in rig.engine.status().slots} | rig.engine.status().host_refs


def test_parts_that_are_promoted_over_or_removed_serve_the_composition_to_its_end(
    pair: Pair, packages: dict[str, Path]
) -> None:
    """As the server has it: the versions are resolved, their leases taken, and only then the weights are read."""
    rig = pair.rig
    rig.registry.register("mortal", packages["rank4"])
    rig.compose("mortal_parts", {"mortal": 0.7, "rank64": -0.4})
    ask = Ask(ASKS[0].text, "mortal_parts")
    leases = [rig.registry.lease(version) for version in rig.ref(ask).versions]
    rig.registry.register("mortal", packages["rslora"])
    rig.registry.remove("mortal")
    try:
        answer = asyncio.run(rig.answer(ask))
    finally:
        for lease in leases:
            lease.release()
    assert answer.token_ids == asyncio.run(rig.answer(ASKS[0])).token_ids


def test_a_composition_of_dora_is_refused_at_the_last_resort_too(pair: Pair) -> None:
    """The wire refuses it first."""
    pair.rig.compose("impossible", {"dora": 0.5, "rank4": 1.0})
    with pytest.raises(AdapterUnavailable, match="DoRA"):
        asyncio.run(pair.rig.answer(Ask("Hello!", "impossible")))
