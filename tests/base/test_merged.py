"""Merged linears: one product with the bits of several, and whoever looks a part up finds a linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import base.linear
import base.wide_linears
from base.config import BaseConfig
from base.float32_linear import Float32Linear
from base.linear import dequantised_weight, settle_cpu_linears
from base.loader import load_base
from base.memory import memory_by_part
from base.merged_linear import MERGED, LinearPart, MergedLinear, Projection, groups, put
from base.model import BaseModel
from base.ops.nf4_linear import Nf4Linear, nf4_linear
from tests.base.test_linear import four_bit
from tests.support.paged import PagedCache, Segment, run

QKV = MERGED["qkv_proj"]
SHAPES = [
    (896, (896, 128, 128)),
    (128, (256, 64, 64)),
    (448, (448, 64, 64)),
    (64, (100, 28, 40)),
    (1184, (52, 36, 36)),
]


def linears(num_in: int, widths: tuple[int, ...], *, bias: bool = True) -> dict[str, nn.Module]:
    return {
        name: four_bit(num_in, width, bias=bias, seed=seed)
        for seed, (name, width) in enumerate(zip(QKV, widths, strict=False))
    }


def unmerged(one: nn.Module) -> nn.Module:
    holder = nn.ModuleDict({"one": one})
    settle_cpu_linears(holder, "float32")
    return holder["one"]


@pytest.mark.parametrize(("num_in", "widths"), SHAPES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_each_column_has_the_bits_of_its_own_product_for_every_number_of_rows(
    num_in: int, widths: tuple[int, ...], num_threads: int
) -> None:
    """Measured, not guaranteed, by torch's CPU kernels; what was merged must answer as what was not."""
    holder = nn.ModuleDict(linears(num_in, widths))
    settle_cpu_linears(holder, "float32")
    merged = holder["qkv_proj"]
    assert isinstance(merged, MergedLinear) and merged.is_quantised and merged.part_names == QKV
    alone = [unmerged(one) for one in linears(num_in, widths).values()]
    assert all(isinstance(one, Float32Linear) for one in alone)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        x = torch.randn(130, num_in, dtype=torch.bfloat16)
        whole: Tensor = merged(x)
        assert whole.shape == (130, sum(widths))
        for num_rows in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 64, 100, 130):
            found: Tensor = merged(x[:num_rows])
            assert torch.equal(found, whole[:num_rows])
            assert torch.equal(found, torch.cat([one(x[:num_rows]) for one in alone], 1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [True, False])
def test_a_part_is_a_linear_of_its_own_values(bias: bool) -> None:
    holder, sources = (
        nn.ModuleDict(linears(128, (256, 64, 64), bias=bias)),
        linears(128, (256, 64, 64), bias=bias),
    )
    settle_cpu_linears(holder, "float32")
    x = torch.randn(2, 5, 128, dtype=torch.bfloat16)
    parts: list[Tensor] = list(holder["qkv_proj"](x).split([256, 64, 64], -1))
    for name, columns in zip(QKV, parts, strict=True):
        part, source = holder[name], sources[name]
        assert isinstance(part, LinearPart) and part.is_quantised
        assert part.in_features == source.in_features and part.out_features == source.out_features
        assert torch.equal(part(x), columns)
        assert torch.equal(dequantised_weight(part), dequantised_weight(source))
        assert torch.equal(part.weight, dequantised_weight(source))
        assert (part.bias is None) == (not bias)
        if part.bias is not None:
            assert isinstance(source.bias, Tensor)
            assert torch.equal(part.bias, source.bias.float())


def test_nothing_is_kept_twice() -> None:
    holder = nn.ModuleDict(linears(128, (256, 64, 64)))
    settle_cpu_linears(holder, "float32")
    assert sum(memory_by_part(holder).values()) == 4 * (128 + 1) * (256 + 64 + 64)
    assert not list(holder.parameters())


def test_only_like_linears_of_one_parent_are_merged() -> None:
    some_bias = linears(128, (256, 64, 64))
    some_bias["k_proj"] = four_bit(128, 64, bias=False)
    mixed = linears(128, (256, 64, 64))
    mixed["v_proj"] = nn.Linear(128, 64, dtype=torch.bfloat16)
    other_input = linears(128, (256, 64, 64))
    other_input["q_proj"] = four_bit(192, 256, bias=True)
    lacking = linears(128, (256, 64))
    for apart in (some_bias, mixed, other_input, lacking):
        assert groups(apart) == [(name,) for name in apart]
        holder = nn.ModuleDict(apart)
        settle_cpu_linears(holder, "float32")
        assert all(isinstance(one, Float32Linear) for one in holder.values())
    named = {
        f"{layer}.{name}": one for layer in ("a", "b") for name, one in linears(128, (256, 64, 64)).items()
    }
    assert groups({**named, "a.o_proj": four_bit(64, 64, bias=False)}) == [
        tuple(f"a.{name}" for name in QKV), tuple(f"b.{name}" for name in QKV), ("a.o_proj",),
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["unpacked", "packed", "dequantised"])
def test_other_ways_are_not_merged_and_give_the_same_parts(how: str) -> None:
    holder = nn.ModuleDict(linears(128, (256, 64, 64)))
    settle_cpu_linears(holder, how)  # type: ignore[arg-type]
    assert set(holder) == set(QKV)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    parts = Projection(holder, "qkv_proj")(x)
    assert all(torch.equal(part, holder[name](x)) for part, name in zip(parts, QKV, strict=True))
    merged = nn.ModuleDict(linears(128, (256, 64, 64)))
    settle_cpu_linears(merged, "float32")
    for part, other in zip(Projection(merged, "qkv_proj")(x), parts, strict=True):
        assert (part - other).abs().max() <= 0.02 * other.abs().max()


@pytest.mark.parametrize("is_fused", [False, True])
def test_parts_of_a_4_bit_product_have_bitsandbytes_weights(is_fused: bool) -> None:
    if is_fused:
        pytest.importorskip("triton")
    sources = linears(192, (100, 28, 40))
    holder = nn.ModuleDict(linears(192, (100, 28, 40)))
    product = nf4_linear(list(sources.values()), is_fused=False)  # type: ignore[arg-type]
    product = Nf4Linear(product.nf4, product.bias, torch.float16, is_fused=is_fused)
    put(holder, QKV, product)
    x = torch.randn(3, 192, dtype=torch.float16)
    whole: Tensor = holder["qkv_proj"](x)
    start = 0
    for name, source in sources.items():
        part = holder[name]
        assert isinstance(part, LinearPart)
        stop = start + part.out_features
        assert torch.equal(part(x), whole[:, start:stop])
        bf16 = part.dequantised_weight().float() - dequantised_weight(source)
        assert bf16.abs().max() <= 2**-8 * dequantised_weight(source).abs().max()
        exact = nf4_linear([source], is_fused=False).nf4  # type: ignore[list-item]
        assert torch.equal(
            part.dequantised_weight(),
            Nf4Linear(exact, None, torch.float16, is_fused=False).dequantised_weight(),
        )
        start = stop


@pytest.fixture(scope="module")
def apart(odd_folder: Path) -> BaseModel:
    """The same base, nothing merged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base.wide_linears, "groups", lambda linears: [(name,) for name in linears])
        return load_base(BaseConfig(source=str(odd_folder), cpu_linear="float32"))


def test_a_merged_base_computes_what_an_unmerged_one_does_to_the_bit(
    apart: BaseModel, odd_folder: Path
) -> None:
    merged = load_base(BaseConfig(source=str(odd_folder), cpu_linear="float32"))
    kinds = [type(one) for one in merged.module.modules()]
    assert (
        kinds.count(MergedLinear) == 2 * merged.spec.num_layers + 4
    )  # and a gate and up in each vision block
    assert kinds.count(LinearPart) == 5 * merged.spec.num_layers + 8
    assert not any(isinstance(one, MergedLinear) for one in apart.module.modules())
    assert sum(merged.memory_by_part.values()) == sum(apart.memory_by_part.values())
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(64, 1176, generator=generator)
    assert torch.equal(merged.embed_images(pixels, [(1, 8, 8)]), apart.embed_images(pixels, [(1, 8, 8)]))
    results, references = [], []
    for one in (merged, apart):
        cache = PagedCache(one, num_blocks=20)
        segments = [
            Segment(one.embed_tokens(torch.arange(new) + first), torch.arange(new).expand(3, new), blocks, 0)
            for first, new, blocks in ((3, 1, (0,)), (9, 7, (1, 2)), (50, 30, tuple(range(4, 12))))
        ]
        results.append(torch.cat(run(one, cache, segments)))
        embeds = torch.cat([segment.embeds for segment in segments])
        positions = torch.cat([segment.positions for segment in segments], 1)
        references.append(one.reference_forward(embeds, positions, PagedCache(one, 20).plan(segments)))
    assert torch.equal(*results)
    assert torch.equal(*references)
