"""The engine's greedy tokens are transformers' and PEFT's, for every kind of adapter, in one mixed batch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters.routing import Routing
from base.pocket import CHECKPOINT
from tests.support.checkpoints import make_checkpoint
from tests.support.oracle import Oracle, Reference, same_where_certain
from tests.support.scenes import scene
from tests.support.serving import Answer, Ask, Rig
from tests.support.zoo import make_zoo

RED = scene("red", "circle")
BLUE = scene("blue", "square", (150, 110))
GREEN = scene("green", "triangle", (100, 140))

ASKS = (
    Ask("Describe the picture.", None, (RED,)),
    Ask("What is this?", "rank4", (BLUE,)),
    Ask("Who are you?", "rank4"),
    Ask("Where is the circle?", "rank16", (RED,)),
    Ask("Tell me of the sea and of the sky.", "rank16"),
    Ask("What color is the square?", "rank64", (BLUE,)),
    Ask("Hello!", "rslora"),
    Ask("How many objects are there?", "rslora", (GREEN,)),
    Ask("Describe the picture.", "patterns", (RED, GREEN)),
    Ask("Count to ten.", "dora"),
    Ask("What color is the circle?", "dora", (RED,)),
    Ask("Describe the picture.", "vision", (BLUE,)),
    Ask("Describe the picture.", "merger", (BLUE,)),
    Ask("Is there a triangle?", "everything", (GREEN,)),
    Ask("Is there a triangle?", "dora_vision", (GREEN,)),
    Ask("Good night.", None),
    Ask("Tell me of the sea, the sky and the birds in it. " * 40, "rank4"),
)


MARGIN = 0.1
"""Ours sums in another order than the oracle, so a lead of one last bit of a bfloat16 logit (0.0625) is not certain."""


@dataclass(frozen=True)
class Pair:
    """Ours and the oracle, over the same checkpoint and adapters."""

    rig: Rig
    oracle: Oracle

    def references(self, asks: Sequence[Ask]) -> list[Reference]:
        return [self.oracle.generate(self.rig.prompt(ask), ask.num_tokens, ask.adapter) for ask in asks]


def differing(answers: Sequence[Answer], references: Sequence[Reference]) -> list[int]:
    """Indices of the answers that are not the reference's where that is certain."""
    pairs = enumerate(zip(answers, references, strict=True))
    return [
        i for i, (answer, reference) in pairs if not same_where_certain(answer.token_ids, reference, MARGIN)
    ]


def _checkpoint(kind: str, root: Path) -> Path:
    if kind == "pocket":
        return CHECKPOINT
    make_checkpoint(
        root / kind, tied=False, hidden=448, heads=7, kv_heads=1, layers=2, mlp=1184, layout="old", seed=5
    )
    return root / kind


class Oracles:
    """One a checkpoint, with its packages and its answers to ASKS: how ours computes its linears changes neither."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, tuple[Path, dict[str, Path], Oracle]] = {}
        self._references: dict[Oracle, list[Reference]] = {}

    def of(self, kind: str) -> tuple[Path, dict[str, Path], Oracle]:
        if kind not in self._made:
            checkpoint = _checkpoint(kind, self._root)
            packages = make_zoo(checkpoint, self._root / f"zoo-{kind}")
            self._made[kind] = checkpoint, packages, Oracle(checkpoint, adapters=packages)
        return self._made[kind]

    def references(self, pair: Pair) -> list[Reference]:
        if pair.oracle not in self._references:
            self._references[pair.oracle] = pair.references(ASKS)
        return self._references[pair.oracle]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    return Oracles(tmp_path_factory.mktemp("oracles"))


@pytest.fixture(
    scope="module",
    params=[
        ("pocket", "dequantised"),
        ("pocket", "float32"),
        ("pocket", "auto"),
        ("odd", "dequantised"),
        ("odd", "auto"),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def pair(
    request: pytest.FixtureRequest, oracles: Oracles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """The pocket base, and a random one with 7B's ratios, an untied head and the older key layout; ``auto`` is the
    compiled linear where it is to be had."""
    kind, way = request.param
    checkpoint, packages, oracle = oracles.of(kind)
    rig = Rig(str(checkpoint), tmp_path_factory.mktemp("parity"), cpu_linear=way)
    rig.register(packages)
    yield Pair(rig, oracle)
    rig.close()


@pytest.fixture(scope="module")
def references(pair: Pair, oracles: Oracles) -> list[Reference]:
    return oracles.references(pair)


def test_a_mixed_batch_of_every_kind_equals_transformers_and_peft_run_alone(
    pair: Pair, references: list[Reference]
) -> None:
    answers = asyncio.run(pair.rig.answers(ASKS))
    assert differing(answers, references) == []
    num_certain = sum(reference.num_certain(MARGIN) for reference in references)
    assert num_certain >= len(ASKS) * 4, f"only {num_certain} tokens were certain enough to compare"


def test_nearly_all_adapters_answer_unlike_the_base_so_that_the_comparison_can_fail(pair: Pair) -> None:
    adapted = [ask for ask in ASKS if ask.adapter is not None]
    plain = [Ask(ask.text, None, ask.images) for ask in adapted]
    answers = asyncio.run(pair.rig.answers([*adapted, *plain]))
    pairs = zip(answers[: len(adapted)], answers[len(adapted) :], strict=True)
    assert sum(ours.token_ids != base.token_ids for ours, base in pairs) >= len(adapted) - 2


def test_a_planted_row_swap_makes_the_check_fail(
    pair: Pair, references: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = Routing.fill

    def swapped(self: Routing, segments: Sequence[tuple[int, int]]) -> None:
        rows, slots = [n for n, _ in segments], [slot for _, slot in segments]
        fill(self, list(zip(rows, slots[1:] + slots[:1], strict=True)))

    monkeypatch.setattr(Routing, "fill", swapped)
    answers = asyncio.run(pair.rig.answers(ASKS))
    assert len(differing(answers, references)) >= 3


def test_an_answer_is_the_same_alone_and_in_a_batch(pair: Pair) -> None:
    together = asyncio.run(pair.rig.answers(ASKS))
    alone = asyncio.run(pair.rig.alone(ASKS))
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
