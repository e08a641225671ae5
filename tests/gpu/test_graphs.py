"""On a CUDA device: recorded decodes equal eager ones, for one, two and the most adapters. Skipped where there is none.

Both sides run the same kernels wherever a step has as many rows as its bucket; padded rows may choose others, so there
logits are compared within rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from adapters.layer import detach
from base.config import BaseConfig
from base.loader import load_base
from base.pocket import CHECKPOINT
from base.triton_attention import TritonAttention, find_varlen
from engine.recorder import CudaRecorder
from tests.support.graph_stand import BLOCK, NUM_SLOTS, Stand, shorten

pytestmark = pytest.mark.gpu

TOLERANCE = 0.15
"""Of logits up to 32, through a layer's roundings to bfloat16."""


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    base = load_base(BaseConfig(source=str(CHECKPOINT), device="cuda"))
    shorten(base, TritonAttention(find_varlen()))
    stand = Stand(base, base.dtype)
    graphs = stand.record(CudaRecorder(base.device))
    assert len(graphs.recorded) == 2 * 4  # nothing fell back to the eager way
    for slot in range(NUM_SLOTS):
        stand.load(slot, slot + 1, rank=(4, 16, 1, 8, 32)[slot], is_dora=slot == 3)
    yield stand
    detach(base.module)


MIXES: dict[str, Sequence[int]] = {
    "the base alone": [-1],
    "the base alone, padded": [-1, -1, -1],
    "one adapter": [0],
    "two adapters": [1, 0],
    "two adapters and the base, padded": [1, -1, 0],
    "the most adapters, and the base": [4, 3, 2, 1, 0, -1, 0],
}


@pytest.mark.parametrize("slots", MIXES.values(), ids=MIXES.keys())
def test_a_replay_equals_the_eager_step(stand: Stand, slots: Sequence[int]) -> None:
    rows = [stand.start(slot, num_prompt=2 + i, first_id=20 * i + 5) for i, slot in enumerate(slots)]
    for _ in range(4):
        expected, found = stand.step(rows)
        assert found.way == "graph"
        torch.testing.assert_close(found.logits, expected, rtol=0, atol=TOLERANCE)


def test_replays_follow_swaps_blocks_and_longer_contexts(stand: Stand) -> None:
    rows = [stand.start(slot, num_prompt=3, first_id=9 * i + 2) for i, slot in enumerate([0, 1])]
    for turn in range(BLOCK * 2):
        if turn % 3 == 1:
            stand.load(turn % 2, 30 + turn, rank=(2, 16, 32)[turn % 3])
        if turn % 4 == 2:
            stand.move(rows[turn % 2])
        expected, found = stand.step(rows)
        assert found.way == "graph"
        torch.testing.assert_close(found.logits, expected, rtol=0, atol=TOLERANCE)


def test_a_dropped_adapter_would_be_seen(stand: Stand) -> None:
    """What the tolerance is worth: the same rows without their adapters are far away."""
    rows = [stand.start(slot, first_id=9 * i + 2) for i, slot in enumerate([0, 1])]
    with_adapters = stand.recorded.run(stand.plan(rows)).logits.clone()
    for row in rows:
        row.slot = -1
    without = stand.recorded.run(stand.plan(rows)).logits
    assert (with_adapters - without).abs().amax(1).min() > 3 * TOLERANCE
