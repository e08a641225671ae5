"""A tiny paged cache and a greedy loop over BaseModel: what the engine does, for one prompt and without adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base.attention import AttentionPlan
from base.model import BaseModel
from base.processor import PromptInputs


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's part of a step."""

    embeds: Tensor  # [N, H]
    positions: Tensor  # [3, N] int64
    blocks: tuple[int, ...]
    num_cached: int


class PagedCache:
    """Key and value blocks for every layer, and the plans that use them."""

    def __init__(self, base: BaseModel, num_blocks: int, block_size: int = 4) -> None:
        spec = base.spec
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self.block_size = block_size
        self.keys = tuple(torch.full(shape, 7.0, dtype=base.dtype) for _ in range(spec.num_layers))
        self.values = tuple(torch.full(shape, 7.0, dtype=base.dtype) for _ in range(spec.num_layers))

    def plan(self, segments: Sequence[Segment]) -> AttentionPlan:
        starts, slots = [0], []
        for segment in segments:
            length = segment.embeds.shape[0]
            starts.append(starts[-1] + length)
            indices = range(segment.num_cached, segment.num_cached + length)
            slots += [
                segment.blocks[i // self.block_size] * self.block_size + i % self.block_size for i in indices
            ]
        return AttentionPlan(
            query_starts=tuple(starts),
            context_lens=tuple(s.num_cached + s.embeds.shape[0] for s in segments),
            block_tables=tuple(s.blocks for s in segments),
            slot_mapping=torch.tensor(slots),
            key_cache=self.keys,
            value_cache=self.values,
            block_size=self.block_size,
        )


def run(base: BaseModel, cache: PagedCache, segments: Sequence[Segment]) -> list[Tensor]:
    """One step over all segments: each one's hidden rows [N, H]."""
    embeds = torch.cat([segment.embeds for segment in segments])
    positions = torch.cat([segment.positions for segment in segments], dim=1)
    hidden = base.forward(embeds, positions, cache.plan(segments))
    return list(hidden.split([segment.embeds.shape[0] for segment in segments]))


def embed_prompt(base: BaseModel, prompt: PromptInputs) -> Tensor:
    """[T, H], images in their places."""
    embeds = base.embed_tokens(torch.tensor(prompt.ids))
    for image in prompt.images:
        embeds[image.offset : image.offset + image.num_tokens] = base.embed_images(image.pixels, [image.grid])
    return embeds


def generate_greedy(
    base: BaseModel,
    prompt: PromptInputs,
    num_tokens: int,
    *,
    chunk: int | None = None,
    choose: Callable[[Tensor, int], int] | None = None,
) -> list[int]:
    """Greedy tokens of one prompt, prefilled in chunks of ``chunk`` tokens (None: whole); stops at no end token.

    ``choose`` (logits [V], step) may pick another token than the first, as when a reference is forced.
    """
    total = len(prompt.ids) + num_tokens
    cache = PagedCache(base, num_blocks=total // 4 + 3)
    blocks = tuple(reversed(range(1, total // 4 + 2)))
    embeds = embed_prompt(base, prompt)
    hidden = torch.empty(0)
    for begin in range(0, len(prompt.ids), chunk or len(prompt.ids)):
        end = min(begin + (chunk or len(prompt.ids)), len(prompt.ids))
        segment = Segment(embeds[begin:end], prompt.positions[:, begin:end], blocks, begin)
        (hidden,) = run(base, cache, [segment])
    tokens: list[int] = []
    while True:
        logits = base.logits(hidden[-1:])[0]
        tokens.append(choose(logits, len(tokens)) if choose else int(logits.argmax()))
        if len(tokens) == num_tokens:
            return tokens
        length = len(prompt.ids) + len(tokens) - 1
        positions = torch.full((3, 1), length + prompt.rope_delta)
        (hidden,) = run(
            base, cache, [Segment(base.embed_tokens(torch.tensor(tokens[-1:])), positions, blocks, length)]
        )
