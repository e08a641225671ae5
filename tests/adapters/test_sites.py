from __future__ import annotations

import pytest
import torch
from torch import nn

from adapters.sites import discover_sites
from tests.support.packages import tiny_qwen


def test_every_linear_of_layers_blocks_and_merger_is_a_site() -> None:
    model = tiny_qwen()
    sites = discover_sites(model)
    linears = {
        name
        for name, child in model.named_modules()
        if isinstance(child, nn.Linear) and "lm_head" not in name
    }
    assert set(sites) == linears
    assert len(sites) == 2 * 7 + 2 * 5 + 2


def test_a_site_knows_its_widths_its_part_and_its_leaf() -> None:
    sites = discover_sites(tiny_qwen())
    down = sites["model.language_model.layers.1.mlp.down_proj"]
    assert (down.in_features, down.out_features, down.part, down.leaf) == (96, 64, "language", "down_proj")
    qkv = sites["model.visual.blocks.0.attn.qkv"]
    assert (qkv.in_features, qkv.out_features, qkv.part, qkv.leaf) == (32, 96, "vision", "attn.qkv")
    merger = sites["model.visual.merger.mlp.2"]
    assert (merger.out_features, merger.part, merger.leaf) == (64, "merger", "merger.mlp.2")


def test_sites_are_found_on_the_meta_device() -> None:
    with torch.device("meta"):
        on_meta = discover_sites(tiny_qwen())
    assert on_meta == discover_sites(tiny_qwen())


class _Wrapped(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


def test_sites_are_the_same_after_linears_were_wrapped() -> None:
    model = tiny_qwen()
    before = discover_sites(model)
    for name in before:
        model.set_submodule(name, _Wrapped(model.get_submodule(name)))
    assert discover_sites(model) == before


def test_a_module_without_such_linears_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Qwen2\.5-VL"):
        discover_sites(nn.Linear(2, 2))
