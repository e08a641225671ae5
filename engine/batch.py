"""Batch: a StepPlan as flat tensors. Pure construction; nothing is computed and nothing of the engine is changed."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from base.attention import AttentionPlan
from engine.kv import KVCache
from engine.step import Chunk, StepPlan
from engine.vision_cache import ImageKey


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


def build_batch(plan: StepPlan, cache: KVCache, device: torch.device) -> Batch:
    """Flatten a plan. The caller keeps the plan's sequences unchanged until the batch has run."""
    chunks = plan.chunks
    starts = _starts(chunks)
    rows, counts = _logit_rows(chunks, starts)
    return Batch(
        ids=torch.tensor([i for c in chunks for i in c.sequence.token_ids(c.start, c.end)], device=device),
        positions=torch.cat([_positions(c) for c in chunks], dim=1).to(device),
        attention=_attention_plan(chunks, starts, cache, device),
        segments=tuple((c.num_tokens, c.sequence.slot) for c in chunks),
        image_spans=tuple(_image_spans(chunks, starts)),
        logit_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        logit_counts=tuple(counts),
    )


def _starts(chunks: Seq[Chunk]) -> list[int]:
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + chunk.num_tokens)
    return starts


def _positions(chunk: Chunk) -> Tensor:
    """[3, n] multimodal rotary positions: the prompt's own, then running on at ``index + rope_delta``."""
    prompt = chunk.sequence.request.prompt
    inside = prompt.positions[:, chunk.start : min(chunk.end, len(prompt.ids))]
    if chunk.end <= len(prompt.ids):
        return inside
    beyond = torch.arange(max(chunk.start, len(prompt.ids)), chunk.end) + prompt.rope_delta
    return torch.cat([inside, beyond.expand(3, -1)], dim=1)


def _attention_plan(
    chunks: Seq[Chunk], starts: list[int], cache: KVCache, device: torch.device
) -> AttentionPlan:
    size = cache.block_size
    slots = [c.sequence.blocks[i // size] * size + i % size for c in chunks for i in range(c.start, c.end)]
    return AttentionPlan(
        query_starts=tuple(starts),
        context_lens=tuple(c.end for c in chunks),
        block_tables=tuple(tuple(c.sequence.blocks[: -(-c.end // size)]) for c in chunks),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
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
