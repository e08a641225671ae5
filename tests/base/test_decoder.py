"""The decoder computes what transformers' own text model does, over every shape of step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from base.attention import AttentionPlan
from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from base.rotary import Rotary
from base.torch_attention import padded_length
from tests.base.test_generation import prompts
from tests.support.paged import PagedCache, Segment, embed_prompt
from tests.support.rotaries import random_turns

SHAPES = {
    "one token": [(0, 1)],
    "whole prompt": [(0, 19)],
    "piece of a prompt": [(11, 9)],
    "one decode": [(37, 1)],
    "decodes of equal length": [(20, 1), (20, 1), (20, 1)],
    "decodes of many lengths": [(0, 1), (15, 1), (16, 1), (62, 1), (63, 1), (64, 1), (130, 1), (700, 1)],
    "a mixed step": [(40, 1), (0, 12), (3, 1), (9, 5), (70, 1), (200, 30), (200, 1)],
}
"""(cached, new) tokens of each segment."""


@pytest.fixture(scope="module", params=["tiny", "odd"])
def bases(request: pytest.FixtureRequest) -> tuple[BaseModel, BaseModel]:
    """The same weights in bfloat16 and in float32."""
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    half, full = (
        load_base(BaseConfig(source=str(folder), dtype=dtype, cpu_linear="dequantised"))
        for dtype in ("bfloat16", "float32")
    )
    return half, full


def step(base: BaseModel, shape: list[tuple[int, int]]) -> tuple[Tensor, Tensor, AttentionPlan, PagedCache]:
    """A step of random rows over a random past, each segment with blocks of its own."""
    generator = torch.Generator().manual_seed(7)
    cache = PagedCache(base, num_blocks=sum((past + new) // 4 + 1 for past, new in shape))
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    segments, first = [], 0
    for past, new in shape:
        blocks = tuple(reversed(range(first, first + (past + new) // 4 + 1)))
        first += len(blocks)
        embeds = torch.randn(new, base.spec.hidden_size, generator=generator).to(base.dtype)
        positions = torch.arange(past, past + new) + torch.tensor([[0], [2], [5]])
        segments.append(Segment(embeds, positions, blocks, past))
    embeds = torch.cat([segment.embeds for segment in segments])
    return embeds, torch.cat([s.positions for s in segments], dim=1), cache.plan(segments), cache


def both_ways(base: BaseModel, shape: list[tuple[int, int]]) -> tuple[Tensor, Tensor, PagedCache, PagedCache]:
    """One step by the decoder and by transformers: hidden states of both, then the caches of both."""
    embeds, positions, plan, ours = step(base, shape)
    before = embeds.clone()
    hidden = base.forward(embeds, positions, plan)
    assert torch.equal(embeds, before)
    _, _, plan, theirs = step(base, shape)
    return hidden, base.reference_forward(embeds, positions, plan), ours, theirs


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_hidden_states_and_caches_are_transformers(
    shape: list[tuple[int, int]], bases: tuple[BaseModel, BaseModel]
) -> None:
    for base, tolerance in zip(bases, (2**-5, 1e-5), strict=True):
        hidden, expected, ours, theirs = both_ways(base, shape)
        assert (hidden - expected).abs().max() <= tolerance * expected.abs().max()
        if all(new > 1 for _, new in shape):  # only decodes sum in another order
            assert torch.equal(hidden, expected)
        assert torch.equal(ours.keys[0], theirs.keys[0])  # the first layer's come from the same rows
        assert torch.equal(ours.values[0], theirs.values[0])
        for cache, reference in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
            assert (cache - reference).abs().max() <= tolerance * reference.abs().max()


def test_another_position_changes_the_hidden_states(bases: tuple[BaseModel, BaseModel]) -> None:
    """The control of the test above: it can fail."""
    base = bases[1]
    embeds, positions, plan, _ = step(base, SHAPES["a mixed step"])
    hidden = base.forward(embeds, positions, plan)
    positions[1, 3] += 1
    assert (base.forward(embeds, positions, plan) - hidden).abs().max() > 1e-3


def test_a_prompt_with_images_is_transformers_to_the_bit(bases: tuple[BaseModel, BaseModel]) -> None:
    base = bases[0]
    prompt = prompts(base)[-1]
    cache = PagedCache(base, num_blocks=len(prompt.ids) // 4 + 1)
    segment = Segment(embed_prompt(base, prompt), prompt.positions, tuple(range(len(prompt.ids) // 4 + 1)), 0)
    plan = cache.plan([segment])
    hidden = base.forward(segment.embeds, segment.positions, plan)
    assert torch.equal(hidden, base.reference_forward(segment.embeds, segment.positions, plan))


@pytest.mark.parametrize("threads", [1, 2, 8], indirect=True)
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("lengths", [range(1, 70), range(118, 140), [255, 256, 257, 500, 513, 700, 1030]])
def test_a_decode_has_the_same_bits_alone_and_among_others(
    lengths: list[int], bases: tuple[BaseModel, BaseModel]
) -> None:
    shape = [(length - 1, 1) for length in lengths]
    for base in bases:
        embeds, _, plan, _ = step(base, [*shape, (50, 9), (0, 6)])
        attend = base.decoder.attention.begin(plan, base.dtype)
        spec = base.spec
        query = torch.randn(len(embeds), spec.num_heads, spec.head_dim, dtype=base.dtype)
        key, value = torch.randn(2, len(embeds), spec.num_kv_heads, spec.head_dim, dtype=base.dtype)
        cos, sin = random_turns(len(embeds), spec.head_dim, base.dtype)
        together = attend(0, query, key, value, Rotary(cos, sin), 0.3)
        for row, (length, table) in enumerate(zip(lengths, plan.block_tables, strict=False)):
            alone = AttentionPlan(
                query_starts=(0, 1),
                context_lens=(length,),
                block_tables=(table,),
                slot_mapping=plan.slot_mapping[row : row + 1],
                key_cache=plan.key_cache,
                value_cache=plan.value_cache,
                block_size=plan.block_size,
            )
            mine = slice(row, row + 1)
            single = base.decoder.attention.begin(alone, base.dtype)
            rotary = Rotary(cos[mine], sin[mine])
            assert torch.equal(single(0, query[mine], key[mine], value[mine], rotary, 0.3)[0], together[row])


def test_a_decode_never_reads_what_others_left_in_its_blocks(bases: tuple[BaseModel, BaseModel]) -> None:
    base = bases[0]
    embeds, positions, plan, cache = step(base, [(13, 1), (64, 1)])
    for tensor in (*cache.keys, *cache.values):
        for table, length in zip(plan.block_tables, plan.context_lens, strict=True):
            tensor[table[-1], length % 4 or 4 :] = float("nan")
    assert bool(torch.isfinite(base.forward(embeds, positions, plan)).all())


def test_padding_is_at_most_an_eighth_beyond_the_first_step() -> None:
    lengths = range(1, 5000)
    assert all(length <= padded_length(length) < length + max(64, length / 4) for length in lengths)
    assert all(padded_length(length) % 64 == 0 for length in lengths)
    assert len({padded_length(length) for length in lengths}) < 45
