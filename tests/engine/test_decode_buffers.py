"""What a recorded decode reads, against a loop: tables, lengths, places, and rows that a step does not use."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.decode_buffers import DecodeBuffers
from engine.step import Chunk
from tests.support.requests import make_sequence

ROWS, MAX_BLOCKS, BLOCK, SCRATCH = 4, 5, 4, 99
Table = list[int]


def chunk_of(blocks: Table, num_tokens: int, token_id: int) -> Chunk:
    sequence = make_sequence("r", 1)
    sequence.output_ids = [token_id] * (num_tokens - 1)
    sequence.blocks = blocks
    return Chunk(sequence, num_tokens - 1, 1)


tables = st.lists(st.integers(0, 98), min_size=1, max_size=MAX_BLOCKS)
steps = st.lists(
    st.lists(st.tuples(tables, st.integers(0, BLOCK - 1)), max_size=ROWS), min_size=1, max_size=6
)


@given(steps)
def test_after_any_steps_the_device_says_what_the_last_one_is(made: list[list[tuple[Table, int]]]) -> None:
    buffers = DecodeBuffers(ROWS, MAX_BLOCKS, BLOCK, SCRATCH, 8, torch.device("cpu"))
    rows = buffers.rows(ROWS)
    for number, step in enumerate(made):
        # a block more than is needed: what was allocated ahead is not the step's business
        chunks = [
            chunk_of([*table, 7], (len(table) - 1) * BLOCK + offset + 1, number) for table, offset in step
        ]
        buffers.fill(chunks, ROWS)
        for row, (table, offset) in enumerate(step):
            length = (len(table) - 1) * BLOCK + offset + 1
            assert rows.tensors.block_table[row, : len(table)].tolist() == table
            assert rows.tensors.context_lens[row] == length
            assert rows.tensors.slot_mapping[row] == table[-1] * BLOCK + offset
            assert rows.positions[:, row].tolist() == [length - 1] * 3
            assert rows.ids[row] == (number if length > 1 else 0)
        for row in range(len(step), ROWS):
            assert rows.tensors.block_table[row, 0] == SCRATCH
            assert rows.tensors.context_lens[row] == 1
            assert rows.tensors.slot_mapping[row] == SCRATCH * BLOCK


def test_nothing_moves_and_a_bucket_has_the_first_rows() -> None:
    buffers = DecodeBuffers(ROWS, MAX_BLOCKS, BLOCK, SCRATCH, 8, torch.device("cpu"))
    before = buffers.rows(2)
    buffers.fill([chunk_of([3], 2, 5), chunk_of([4], 3, 6)], 2)
    after = buffers.rows(2)
    assert before.ids.tolist() == [5, 6]
    assert before.logits.shape == (2, 8)
    for one, other in (
        (before.ids, after.ids),
        (before.positions, after.positions),
        (before.tensors.block_table, after.tensors.block_table),
        (before.tensors.context_lens, after.tensors.context_lens),
        (before.tensors.slot_mapping, after.tensors.slot_mapping),
        (before.logits, after.logits),
    ):
        assert one.data_ptr() == other.data_ptr()
        assert one.shape == other.shape
