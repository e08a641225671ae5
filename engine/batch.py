"""Batch: a StepPlan as flat tensors. Pure construction; nothing is computed and nothing of the engine is changed.

All numbers of a step are written into one array on the host and cross to the device in one copy; a decoding row, of
which most steps are made, is five numbers in a column.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base.attention import AttentionPlan
from engine.kv import KVCache
from engine.step import Chunk, StepPlan
from engine.tiling import Tiling
from engine.vision_cache import ImageKey

IDS, SLOTS, POSITIONS = 0, 1, slice(2, 5)
NUM_FACTS = 5
"""Numbers of a token: its id, its place in the cache, three positions."""


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Batch rows ``[row, row + num_tokens)`` take rows ``[start, start + num_tokens)`` of an image's embedding."""

    key: ImageKey
    row: int
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """S chunks flattened to T tokens in plan order."""

    ids: Tensor  # [T] int64
    positions: Tensor  # [3, T] int64
    attention: AttentionPlan
    segments: tuple[tuple[int, int], ...]
    """(rows, adapter slot) runs in row order: what Routing.fill takes."""
    image_spans: tuple[ImageSpan, ...]
    logit_rows: Tensor  # [L] int64: the rows whose logits are wanted
    logit_counts: tuple[int, ...]
    """How many of the L rows belong to each chunk, in plan order."""


def build_batch(plan: StepPlan, cache: KVCache, device: torch.device, tiling: Tiling) -> Batch:
    """Flatten a plan. The caller keeps the plan's sequences unchanged until the batch has run."""
    chunks = plan.chunks
    starts = _starts(chunks)
    rows, counts = _logit_rows(chunks, starts)
    num_tokens = starts[-1]
    host = np.empty(NUM_FACTS * num_tokens + len(rows), dtype=np.int64)
    tokens = host[: NUM_FACTS * num_tokens].reshape(NUM_FACTS, num_tokens)
    for chunk, start in zip(chunks, starts, strict=False):
        write_facts(tokens[:, start : start + chunk.num_tokens], chunk, cache.block_size)
    host[tokens.size :] = rows
    flat = torch.from_numpy(host).to(device, non_blocking=True)
    columns = flat[: tokens.size].view(NUM_FACTS, num_tokens)
    return Batch(
        ids=columns[IDS],
        positions=columns[POSITIONS],
        attention=_attention_plan(chunks, columns[SLOTS], cache, tiling),
        segments=tuple((c.num_tokens, c.sequence.slot) for c in chunks),
        image_spans=tuple(_image_spans(chunks, starts)),
        logit_rows=flat[tokens.size :],
        logit_counts=tuple(counts),
    )


def _starts(chunks: Seq[Chunk]) -> list[int]:
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + chunk.num_tokens)
    return starts


def write_facts(columns: NDArray[np.int64], chunk: Chunk, block_size: int) -> None:
    """Into [5, n]: each token's id, its place in the KV cache, and its three positions."""
    sequence = chunk.sequence
    if chunk.is_decode:
        token_id = sequence.output_ids[chunk.start - sequence.num_prompt_tokens]
        write_decode(columns, chunk, block_size, token_id)
        return
    indices = np.arange(chunk.start, chunk.end)
    columns[IDS] = sequence.token_ids(chunk.start, chunk.end)
    blocks = np.asarray(sequence.blocks, dtype=np.int64)
    columns[SLOTS] = blocks[indices // block_size] * block_size + indices % block_size
    columns[POSITIONS] = _positions(chunk, indices)


def write_decode(columns: NDArray[np.int64], chunk: Chunk, block_size: int, token_id: int) -> None:
    """As ``write_facts``, of one generated token, into [5, 1]."""
    block, offset = divmod(chunk.start, block_size)
    place = chunk.sequence.blocks[block] * block_size + offset
    position = chunk.start + chunk.sequence.request.prompt.rope_delta
    columns[:, 0] = (token_id, place, position, position, position)


def _positions(chunk: Chunk, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """[3, n] multimodal rotary positions: the prompt's own, then running on at ``index + rope_delta``."""
    prompt = chunk.sequence.request.prompt
    inside = prompt.positions[:, chunk.start : chunk.end].numpy()
    beyond = indices[inside.shape[1] :] + prompt.rope_delta
    return np.concatenate([inside, np.broadcast_to(beyond, (3, len(beyond)))], axis=1)


def _attention_plan(
    chunks: Seq[Chunk], slot_mapping: Tensor, cache: KVCache, tiling: Tiling
) -> AttentionPlan:
    """One segment for each piece of a chunk that is attended in one call."""
    size = cache.block_size
    pieces = [
        (c.sequence.blocks, begin, end)
        for c in chunks
        for begin, end in tiling.pieces(c.start, c.end, c.sequence.num_prompt_tokens)
    ]
    return AttentionPlan(
        query_starts=tuple(accumulate((end - begin for _, begin, end in pieces), initial=0)),
        context_lens=tuple(end for _, _, end in pieces),
        block_tables=tuple(tuple(blocks[: -(-end // size)]) for blocks, _, end in pieces),
        slot_mapping=slot_mapping,
        key_cache=cache.keys,
        value_cache=cache.values,
        block_size=size,
    )


def _image_spans(chunks: Seq[Chunk], starts: list[int]) -> list[ImageSpan]:
    spans = []
    for chunk, row in zip(chunks, starts, strict=False):
        for image in chunk.images():
            first = max(image.offset, chunk.start)
            last = min(image.offset + image.num_tokens, chunk.end)
            key = chunk.sequence.image_key(image)
            spans.append(ImageSpan(key, row + first - chunk.start, first - image.offset, last - first))
    return spans


def _logit_rows(chunks: Seq[Chunk], starts: list[int]) -> tuple[list[int], list[int]]:
    """Each chunk that yields a token wants its last row; one that owes prompt log-probabilities wants all."""
    rows: list[int] = []
    counts: list[int] = []
    for chunk, start in zip(chunks, starts, strict=False):
        end = start + chunk.num_tokens
        first = start if chunk.wants_prompt_logits else end - 1 if chunk.yields_token else end
        rows += range(first, end)
        counts.append(end - first)
    return rows, counts
