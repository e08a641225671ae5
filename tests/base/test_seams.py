"""The seams in transformers that everything here rests on: what an upgrade of it can break."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from base.attention import LORIKEET_PAGED
from base.model import BaseModel
from tests.support.paged import PagedCache, Segment, run


def test_our_attention_function_is_registered(tiny: BaseModel) -> None:
    assert tiny.module.model.language_model.config._attn_implementation == LORIKEET_PAGED
    assert LORIKEET_PAGED in AttentionInterface._global_mapping


def test_keyword_arguments_of_the_forward_call_reach_the_attention_function_unchanged(
    tiny: BaseModel,
) -> None:
    seen: list[tuple[object, object, torch.Size, torch.Size]] = []

    def spy(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **arguments: object
    ) -> object:
        seen.append((arguments["plan"], mask, query.shape, key.shape))
        return query.transpose(1, 2), None

    AttentionInterface.register("lorikeet_spy", spy)
    config = tiny.module.model.language_model.config
    config._attn_implementation = "lorikeet_spy"
    embeds = torch.zeros(5, 128, dtype=torch.bfloat16)
    plan = PagedCache(tiny, 2).plan([Segment(embeds, torch.zeros(3, 5).long(), (0, 1), 0)])
    try:
        tiny.reference_forward(embeds, torch.zeros(3, 5).long(), plan)
    finally:
        config._attn_implementation = LORIKEET_PAGED
    assert len(seen) == tiny.spec.num_layers
    for found, mask, query, key in seen:
        assert found is plan
        assert mask is None
        assert query == (1, 4, 5, 32)
        assert key == (1, 2, 5, 32)


def test_no_state_is_kept_between_steps(tiny: BaseModel) -> None:
    embeds = tiny.embed_tokens(torch.tensor([1, 2, 3]))
    cache = PagedCache(tiny, num_blocks=4)
    segment = Segment(embeds, torch.arange(3).expand(3, 3), (0,), 0)
    (first,) = run(tiny, cache, [segment])
    (second,) = run(tiny, cache, [segment])
    assert torch.equal(first, second)
    assert tiny.module.model.rope_deltas is None


@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_a_linear_may_be_wrapped_in_place_and_is_found_at_the_next_call(leaf: str, tiny: BaseModel) -> None:
    class Doubling(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.base(x) * 2
            return result

    segment = Segment(tiny.embed_tokens(torch.tensor([1, 2])), torch.arange(2).expand(3, 2), (0,), 0)
    (before,) = run(tiny, PagedCache(tiny, 2), [segment])
    name = f"model.language_model.layers.0.mlp.{leaf}"
    linear = tiny.module.get_submodule(name)
    tiny.module.set_submodule(name, Doubling(linear))
    try:
        (wrapped,) = run(tiny, PagedCache(tiny, 2), [segment])
    finally:
        tiny.module.set_submodule(name, linear)
    (after,) = run(tiny, PagedCache(tiny, 2), [segment])
    assert not torch.equal(before, wrapped)
    assert torch.equal(before, after)


def test_results_may_be_written_to_outside_of_the_base(tiny: BaseModel) -> None:
    embeds = tiny.embed_tokens(torch.tensor([1, 2]))
    embeds[0] = 0  # an inference tensor would refuse
    assert not embeds.requires_grad


def test_torchvision_is_not_needed() -> None:
    assert "torchvision" not in sys.modules
