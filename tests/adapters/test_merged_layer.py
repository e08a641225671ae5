"""Adapters of a merged linear, added together, are those of its parts, added one by one, to the bit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from adapters.layer import MultiLoraLinear, attach, detach
from adapters.ops.reference import lora_rows
from adapters.routing import RoutingSet
from adapters.sites import Site
from adapters.slots import SlotBank
from adapters.staging import StagedSite
from base.float32_linear import Float32Linear
from base.linear import dequantised_weight, settle_cpu_linears
from base.merged_linear import LinearPart, MergedLinear
from base.ops.native_library import has_native_library
from tests.support.lora import CPU, adder_of, make_weights, row_slots

WIDTHS = {"q_proj": 384, "k_proj": 52, "v_proj": 128}
SITES = {name: Site(name, 256, width, "language") for name, width in WIDTHS.items()}
Q, K, V = WIDTHS
Segments = Sequence[tuple[int, int]]

SLOTS: Sequence[tuple[Mapping[str, int], bool]] = (
    ({Q: 16, K: 16, V: 16}, False),
    ({Q: 16, K: 16, V: 16}, False),
    ({Q: 4, V: 64}, False),  # ranks that differ by site, and a site left alone
    ({V: 8}, False),
    ({Q: 8, K: 8, V: 8}, True),
    ({K: 12}, True),
    ({}, False),  # touches none of them
)
"""What each slot's adapter has at which site, and whether it is DoRA."""

SEGMENTS: dict[str, Segments] = {
    "one row": [(1, 0)],
    "one base row": [(1, -1)],
    "decodes in slot order": [(1, slot) for slot in range(7)],
    "decodes of two alike": [(1, 0), (1, 1)],
    "decodes among base rows": [(1, slot) for slot in (3, -1, 0, 2, 5, -1, 1, 4, 6, 0)],
    "prompts and decodes": [(1, 2), (40, 4), (1, -1), (5, 3), (1, 2), (70, 0), (3, 6)],
    "an adapter that touches nothing": [(3, 6), (1, -1)],
    "sites apart": [(2, 3), (2, 5)],
}


def linears() -> dict[str, nn.Module]:
    torch.manual_seed(5)
    made: dict[str, nn.Module] = {}
    for name, width in WIDTHS.items():
        linear = nn.Linear(256, width).to(torch.bfloat16)
        made[name] = linear
    return made


class Rig:
    """The same linears and adapters, merged in one holder, apart in the other."""

    def __init__(self, *, is_quantised: bool, kernel: Literal["torch", "triton", "native"] = "torch") -> None:
        self.merged = nn.ModuleDict(linears())
        settle_cpu_linears(self.merged, "float32")
        self.apart = nn.ModuleDict({
            name: Float32Linear(one.weight, one.bias, is_quantised=is_quantised)  # type: ignore[arg-type]
            for name, one in linears().items()
        })  # fmt: skip
        product = self.merged["qkv_proj"].product
        assert isinstance(product, Float32Linear)
        product.is_quantised = is_quantised
        self.banks, self.routings = [], []
        self.staged: dict[str, dict[int, StagedSite]] = {name: {} for name in WIDTHS}
        for holder in (self.merged, self.apart):
            bank, routing = SlotBank(SITES, len(SLOTS), 64, torch.float32, CPU), RoutingSet.on(CPU)
            adder = adder_of(kernel if holder is self.merged else "torch", SITES, bank)
            attach(holder, SITES, bank, routing, dequantised_weight, adder)
            self.banks.append(bank)
            self.routings.append(routing)
        for slot, (ranks, is_dora) in enumerate(SLOTS):
            self.write(slot, ranks, is_dora=is_dora)

    def write(self, slot: int, ranks: Mapping[str, int], *, is_dora: bool, seed: int = 0) -> None:
        weights = make_weights(seed + slot, ranks, SITES, is_dora=is_dora)
        for bank in self.banks:
            bank.write(slot, weights)
        staged = self.banks[0].stage(weights).sites
        for name, slots in self.staged.items():
            slots.pop(slot, None)
            if name in staged:
                slots[slot] = staged[name]

    @torch.inference_mode()
    def __call__(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """From the merged linear, from its parts, and from linears of their own; each [T, sum of out]."""
        for routing in self.routings:
            routing.language.fill(segments)
        whole: Tensor = self.merged["qkv_proj"](x)
        parts = torch.cat([self.merged[name](x) for name in WIDTHS], -1)
        return whole, parts, torch.cat([self.apart[name](x) for name in WIDTHS], -1)


def rows(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, 256, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize("is_quantised", [True, False])
def test_a_group_equals_its_sites_one_by_one_to_the_bit(segments: Segments, is_quantised: bool) -> None:
    rig = Rig(is_quantised=is_quantised)
    x = rows(sum(count for count, _ in segments))
    whole, parts, apart = rig(x, segments)
    assert torch.equal(whole, apart)
    assert torch.equal(parts, apart)
    for shape in ((1, *x.shape), (x.shape[0], 1, x.shape[1])):
        assert torch.equal(rig(x.view(shape), segments)[0].view(whole.shape), whole)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_a_group_equals_the_plain_loop_and_leaves_what_nobody_touches(segments: Segments) -> None:
    rig = Rig(is_quantised=True)
    x, slots = rows(sum(count for count, _ in segments)), row_slots(segments)
    whole, _, _ = rig(x, segments)
    merged = rig.merged["qkv_proj"]
    assert isinstance(merged, MultiLoraLinear)
    base: Tensor = merged.base(x)
    start = 0
    for name, width in WIDTHS.items():
        columns = slice(start, start + width)
        staged, bias = rig.staged[name], merged.bias
        assert bias is not None
        expected = lora_rows(base[:, columns], x, slots, staged, bias[columns], merged.group.rounding)
        torch.testing.assert_close(whole[:, columns], expected, rtol=2**-6, atol=1e-5)
        changed = (whole[:, columns] != base[:, columns]).any(1).tolist()
        assert changed == [slot in staged for slot in slots]
        start += width


def test_random_batches_and_swaps_keep_a_rows_bits() -> None:
    rig, dice = Rig(is_quantised=True), random.Random(3)
    for turn in range(20):
        slot = dice.randrange(len(SLOTS))
        ranks = {name: dice.choice((1, 4, 8, 16, 64)) for name in WIDTHS if dice.random() < 0.7}
        rig.write(slot, ranks, is_dora=dice.random() < 0.3, seed=100 * turn)
        segments = [(dice.choice((1, 1, 2, 5, 18)), dice.randrange(-1, len(SLOTS))) for _ in range(9)]
        x = rows(sum(count for count, _ in segments), turn)
        whole, parts, apart = rig(x, segments)
        assert torch.equal(whole, apart)
        assert torch.equal(parts, apart)
        row = dice.randrange(len(x))
        alone, _, _ = rig(x[row : row + 1], [(1, row_slots(segments)[row])])
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_triton_serves_a_group_by_one_shrink(segments: Segments) -> None:
    pytest.importorskip("triton")
    rig = Rig(is_quantised=True, kernel="triton")
    x = rows(sum(count for count, _ in segments)).float()
    whole, parts, apart = rig(x, segments)
    torch.testing.assert_close(whole, apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_native_library(), reason="the compiled kernels are not here")
@pytest.mark.parametrize("is_quantised", [True, False])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_the_compiled_kernel_adds_a_group_as_its_sites_one_by_one(
    segments: Segments, is_quantised: bool
) -> None:
    rig = Rig(is_quantised=is_quantised, kernel="native")
    x = rows(sum(count for count, _ in segments))
    whole, parts, _ = rig(x, segments)
    assert torch.equal(whole, parts)
    whole, _, apart = rig(x.float(), segments)
    torch.testing.assert_close(whole, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_native_library(), reason="the compiled kernels are not here")
def test_the_compiled_kernel_follows_what_happens_to_slots() -> None:
    rig = Rig(is_quantised=False, kernel="native")
    x, segments = rows(6).float(), [(2, 0), (1, -1), (3, 1)]
    before, _, _ = rig(x, segments)
    rig.write(1, dict.fromkeys(WIDTHS, 16), is_dora=True, seed=70)
    after, _, apart = rig(x, segments)
    torch.testing.assert_close(after, apart, rtol=1e-5, atol=1e-5)
    assert torch.equal(after[:3], before[:3]) and bool((after[3:] != before[3:]).any(dim=1).all())
    rig.banks[0].clear(1)
    with pytest.raises(ValueError, match="slot 1, which holds no adapter"):
        rig(x, segments)


def test_a_merged_linear_is_wrapped_whole_and_restored() -> None:
    rig = Rig(is_quantised=True)
    layer = rig.merged["qkv_proj"]
    assert isinstance(layer, MultiLoraLinear)
    assert (layer.in_features, layer.out_features) == (256, sum(WIDTHS.values()))
    assert [site.name for site in layer.sites] == list(WIDTHS)
    assert layer.group.columns == ((0, 384), (384, 436), (436, 564))
    rig.routings[0].language.fill([(2, 0)])
    with pytest.raises(ValueError, match=r"q_proj \+ k_proj \+ v_proj got 3 rows, and routing for 2"):
        layer(rows(3))
    detach(rig.merged)
    assert isinstance(rig.merged["qkv_proj"], MergedLinear)
    assert all(isinstance(rig.merged[name], LinearPart) for name in WIDTHS)


def test_a_merged_linear_of_which_a_part_is_no_site_is_refused() -> None:
    """Whoever calls the merged one would lose that part's adapters."""
    holder = nn.ModuleDict(linears())
    settle_cpu_linears(holder, "float32")
    sites = {name: site for name, site in SITES.items() if name != "k_proj"}
    bank = SlotBank(sites, 2, 8, torch.float32, CPU)
    with pytest.raises(ValueError, match="such as k_proj"):
        attach(holder, sites, bank, RoutingSet.on(CPU), dequantised_weight)
    assert isinstance(holder["q_proj"], LinearPart)
