"""Batches against a loop over single tokens: ids, places in the cache, positions, and whose logits are wanted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch, build_batch
from engine.kv import KVCache
from engine.sequence import Sequence
from engine.step import Chunk, StepPlan
from engine.tiling import Tiling
from tests.support.fake_processor import fake_spec
from tests.support.requests import make_prompt, make_request, make_sequence

BLOCK = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache() -> KVCache:
    return KVCache(replace(fake_spec(), num_layers=1), 4, BLOCK, torch.float32, CPU)


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of a sequence of ``prompt`` and ``output`` tokens."""

    prompt: int
    output: int
    start: int
    end: int
    delta: int
    scored: bool = False


def sequence_of(piece: Piece, number: int) -> Sequence:
    """Positions of the prompt unlike plain indices, blocks in no order, outputs unlike prompts."""
    sequence = make_sequence(f"r{number}", piece.prompt, max_tokens=64)
    prompt = make_prompt(piece.prompt)
    positions = prompt.positions * 3 + torch.tensor([[0], [100], [200]]) + number
    prompt = replace(prompt, positions=positions, rope_delta=piece.delta)
    request = replace(sequence.request, prompt=prompt, prompt_logprobs=0 if piece.scored else None)
    sequence.request = request
    sequence.slot = number - 1
    sequence.output_ids = [40 + i for i in range(piece.output)]
    num_blocks = -(-(piece.prompt + piece.output) // BLOCK)
    sequence.blocks = [100 * number + (7 * i) % 50 for i in range(num_blocks)]
    return sequence


def chunk_of(piece: Piece, number: int) -> Chunk:
    return Chunk(sequence_of(piece, number), piece.start, piece.end - piece.start)


Plain = tuple[list[int], list[int], list[list[int]], list[int], list[int]]


def plain(chunks: list[Chunk]) -> Plain:
    """The loop that defines truth."""
    ids: list[int] = []
    slots: list[int] = []
    positions: list[list[int]] = []
    logit_rows: list[int] = []
    counts: list[int] = []
    for chunk in chunks:
        sequence = chunk.sequence
        prompt = sequence.request.prompt
        every = [*prompt.ids, *sequence.output_ids]
        wanted = 0
        for index in range(chunk.start, chunk.end):
            row = len(ids)
            ids.append(every[index])
            slots.append(sequence.blocks[index // BLOCK] * BLOCK + index % BLOCK)
            is_prompt = index < len(prompt.ids)
            beyond = [index + prompt.rope_delta] * 3
            positions.append(prompt.positions[:, index].tolist() if is_prompt else beyond)
            if chunk.wants_prompt_logits or index + 1 == len(every):
                logit_rows.append(row)
                wanted += 1
        counts.append(wanted)
    return ids, slots, positions, logit_rows, counts


def told(batch: Batch) -> Plain:
    slots = batch.attention.slot_mapping.tolist()
    rows = batch.logit_rows.tolist()
    return batch.ids.tolist(), slots, batch.positions.T.tolist(), rows, list(batch.logit_counts)


DECODE = Piece(prompt=6, output=3, start=8, end=9, delta=-2)
FIRST_DECODE = Piece(prompt=6, output=1, start=6, end=7, delta=5)
WHOLE = Piece(prompt=7, output=0, start=0, end=7, delta=0)
BEGUN = Piece(prompt=9, output=0, start=0, end=4, delta=1)
AGAIN = Piece(prompt=5, output=6, start=0, end=11, delta=-3)
AGAIN_BEYOND = Piece(prompt=5, output=9, start=8, end=14, delta=4)
UNCUT = Tiling(BLOCK, is_exact=False)
ONE_TOKEN = Piece(prompt=1, output=0, start=0, end=1, delta=0)
SCORED = Piece(prompt=8, output=0, start=4, end=8, delta=0, scored=True)


@pytest.mark.parametrize(
    "pieces",
    [
        [DECODE],
        [WHOLE],
        [ONE_TOKEN],
        [DECODE, FIRST_DECODE, DECODE],
        [DECODE, WHOLE, BEGUN],
        [DECODE, AGAIN, AGAIN_BEYOND, ONE_TOKEN],
        [SCORED, DECODE, BEGUN],
    ],
    ids=lambda pieces: f"{len(pieces)}-pieces",
)
def test_a_batch_is_what_a_loop_over_tokens_gives(cache: KVCache, pieces: list[Piece]) -> None:
    chunks = [chunk_of(piece, number) for number, piece in enumerate(pieces)]
    batch = build_batch(StepPlan(tuple(chunks), ()), cache, CPU, UNCUT)
    assert told(batch) == plain(chunks)
    assert batch.segments == tuple((c.num_tokens, c.sequence.slot) for c in chunks)


@st.composite
def any_piece(draw: st.DrawFn) -> Piece:
    prompt, output = draw(st.integers(1, 12)), draw(st.integers(0, 9))
    start = draw(st.integers(0, prompt + output - 1))
    end = draw(st.integers(start + 1, prompt + output))
    return Piece(prompt, output, start, end, draw(st.integers(-3, 3)), draw(st.booleans()))


@settings(max_examples=200, deadline=None)
@given(st.lists(any_piece(), min_size=1, max_size=6))
def test_so_it_is_for_any_pieces(pieces: list[Piece]) -> None:
    cache = KVCache(replace(fake_spec(), num_layers=1), 1, BLOCK, torch.float32, CPU)
    chunks = [chunk_of(piece, number) for number, piece in enumerate(pieces)]
    assert told(build_batch(StepPlan(tuple(chunks), ()), cache, CPU, UNCUT)) == plain(chunks)


def test_a_sequence_that_wants_no_token_asks_for_no_logits(cache: KVCache) -> None:
    sequence = sequence_of(WHOLE, 0)
    sequence.request = make_request("none", 7, max_tokens=0)
    batch = build_batch(StepPlan((Chunk(sequence, 0, 7),), ()), cache, CPU, UNCUT)
    assert batch.logit_counts == (0,) and batch.logit_rows.tolist() == []
