"""What a recorded decode reads, against a loop: tables, lengths, places, and rows that a step does not use."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.decode_buffers import DecodeBuffers
from engine.ranking import NO_TOKEN
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


def test_what_the_step_before_chose_is_put_where_its_sequences_are_now() -> None:
    buffers = DecodeBuffers(ROWS, MAX_BLOCKS, BLOCK, SCRATCH, 8, torch.device("cpu"))
    rows = buffers.rows(ROWS)
    rows.chosen.copy_(torch.tensor([11, NO_TOKEN, 13, 14]))
    chunks = [chunk_of([3, 4], 6, 5), chunk_of([8], 2, 5), chunk_of([9], 3, 5)]
    for chunk in chunks:
        chunk.sequence.output_ids.pop()  # the host does not know it
    buffers.fill(chunks, 4, [3, 0, 1])
    assert rows.ids.tolist() == [14, 11, 0, 0]  # one that has no token ends there: any id will do
    assert rows.positions.tolist() == [[5, 1, 2, 0]] * 3
    assert rows.tensors.context_lens.tolist() == [6, 2, 3, 1]
    assert rows.tensors.slot_mapping.tolist() == [
        4 * BLOCK + 1,
        8 * BLOCK + 1,
        9 * BLOCK + 2,
        SCRATCH * BLOCK,
    ]
    assert rows.tensors.block_table[0, :2].tolist() == [3, 4]


def test_blocks_that_could_not_be_sent_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = DecodeBuffers(ROWS, MAX_BLOCKS, BLOCK, SCRATCH, 8, torch.device("cpu"))
    sent = torch.Tensor.index_copy_

    def failing(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(torch.Tensor, "index_copy_", failing)
    with pytest.raises(torch.OutOfMemoryError):
        buffers.fill([chunk_of([3], 2, 5)], 1)
    monkeypatch.setattr(torch.Tensor, "index_copy_", sent)
    buffers.fill([chunk_of([3], 2, 5)], 1)
    assert buffers.rows(1).tensors.block_table[0, 0] == 3


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
