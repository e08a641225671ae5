"""DecodeBuffers: all that a recorded decode reads and writes, in tensors that stay where they are.

One set serves every bucket: a bucket of N rows has the first N rows of each. Rows that a step does not use write to a
block of their own, which no sequence has, and attend to the one key there. Block tables cross to the device as what
changed in them: a row that grows by a block is one number.

Place in a request's way: step 7, where the step is a graph's.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.ops.upload import Upload
from base.attention import PlanTensors
from engine.batch import IDS, NUM_FACTS, POSITIONS, SLOTS, write_decode, write_facts
from engine.step import Chunk


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRows:
    """The first N rows of the buffers: views, valid for the buffers' life."""

    ids: Tensor  # [N] int64
    positions: Tensor  # [3, N] int64
    tensors: PlanTensors
    logits: Tensor  # [N, V] float32: what the step leaves
    chosen: Tensor  # [N] int64: the token that each row chose, or NO_TOKEN


class DecodeBuffers:
    """The engine's thread only."""

    def __init__(
        self,
        num_rows: int,
        max_blocks: int,
        block_size: int,
        scratch_block: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        """max_blocks: of the longest sequence. scratch_block: a block of the cache that is nobody's."""
        self.num_rows = num_rows
        self.max_blocks = max_blocks
        self._block_size = block_size
        self._scratch = [scratch_block]
        size = NUM_FACTS * num_rows
        self._host = np.zeros(size + -(-num_rows // 2), dtype=np.int64)  # lengths of 4 bytes after facts of 8
        self._facts = self._host[:size].reshape(NUM_FACTS, num_rows)
        self._lengths = self._host[size:].view(np.int32)
        device_facts = torch.zeros(self._host.size, dtype=torch.int64, device=device)
        self._upload = Upload(device_facts)
        self._device_facts = device_facts[:size].view(NUM_FACTS, num_rows)
        self._device_lengths = device_facts[size:].view(torch.int32)
        self._tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        self._written: list[list[int]] = [[] for _ in range(num_rows)]
        """What the device's table says in each row, as far as anybody wrote."""
        self._starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self._logits = torch.zeros(num_rows, vocab_size, dtype=torch.float32, device=device)
        self._chosen = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def rows(self, num_rows: int) -> DecodeRows:
        """The part that a bucket of ``num_rows`` reads."""
        tensors = PlanTensors(
            block_table=self._tables[:num_rows],
            context_lens=self._device_lengths[:num_rows],
            query_starts=self._starts[: num_rows + 1],
            slot_mapping=self._device_facts[SLOTS, :num_rows],
        )
        return DecodeRows(
            self._device_facts[IDS, :num_rows],
            self._device_facts[POSITIONS, :num_rows],
            tensors,
            self._logits[:num_rows],
            self._chosen[:num_rows],
        )

    def fill(self, chunks: Seq[Chunk], num_rows: int, sources: Seq[int] | None = None) -> None:
        """One token of each of ``chunks``, and unused rows up to ``num_rows``.

        sources: for tokens that the host does not know yet, the row of the step before that chooses each.
        """
        tables: list[Seq[int]] = []
        for row, chunk in enumerate(chunks):
            columns = self._facts[:, row : row + 1]
            if sources is None:
                write_facts(columns, chunk, self._block_size)
            else:
                write_decode(columns, chunk, self._block_size, sources[row])
            tables.append(chunk.sequence.blocks[: -(-chunk.end // self._block_size)])
            self._lengths[row] = chunk.end
        unused = slice(len(chunks), num_rows)
        self._facts[:, unused] = 0
        self._facts[SLOTS, unused] = self._scratch[0] * self._block_size
        self._lengths[unused] = 1
        self._upload.send(self._host)
        if sources is not None:
            self._feed(len(chunks))
        self._fill_tables([*tables, *[self._scratch] * (num_rows - len(chunks))])

    def _feed(self, num_rows: int) -> None:
        """Put what the step before chose in the place of the rows that chose it. One that has no token ends there."""
        ids = self._device_facts[IDS, :num_rows]
        ids.copy_(self._chosen.index_select(0, ids).clamp_(min=0))

    def _fill_tables(self, tables: Seq[Seq[int]]) -> None:
        """Send the blocks that the device does not know yet."""
        places: list[int] = []
        blocks: list[int] = []
        changed: dict[int, list[int]] = {}
        for row, table in enumerate(tables):
            known = _num_equal(self._written[row], table)
            if known == len(table):
                continue
            first = row * self.max_blocks
            places += range(first + known, first + len(table))
            blocks += table[known:]
            changed[row] = list(table)
        if places:
            sent = torch.from_numpy(np.array([places, blocks])).to(self._tables.device, non_blocking=True)
            self._tables.view(-1).index_copy_(0, sent[0], sent[1].to(torch.int32))
        for row, table in changed.items():  # only now: what could not be sent is sent again
            self._written[row] = table


def _num_equal(written: Seq[int], table: Seq[int]) -> int:
    """How many blocks of ``table`` need not be sent: all that are there already if it only grew, else none."""
    common = min(len(written), len(table))
    return common if written[:common] == table[:common] else 0
