"""try_lora: a kernel's adapters beside torch's products, at a model's own shapes, for whoever decides who serves.

Owns small adapters made for it, of several ranks, one of them DoRA, in a bank of its own. Decides nothing. Place in a
request's way: none; once, at start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from adapters.layer import merged_sites, rounding_of
from adapters.ops.launch import SHORT_ROWS
from adapters.ops.site_group import AdderOwner, SiteGroup, torch_adder
from adapters.ops.torch_ops import Rounding
from adapters.routing import Routing
from adapters.sites import Site, SiteTable
from adapters.slots import SlotBank
from adapters.weights import AdapterWeights, SiteWeights

STEPS: Final = (
    ((1, 0),),
    ((1, 2), (1, -1), (1, 1)),
    ((5, 1), (1, -1), (8, 0), (3, 2)),
    ((SHORT_ROWS, 0), (40, 2)),
)
"""Steps as runs of (rows, slot), -1 being the base: one row, few, several tiles, and more than decodes ever have."""
SMALL_RANK: Final = 5


def try_lora(
    module: nn.Module,
    sites: SiteTable,
    max_rank: int,
    bank_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Callable[[SiteTable, SlotBank], AdderOwner],
    *,
    keeps_halves: bool = False,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What was computed, by the kernel, and by batched products: [T, out] in ``dtype``, one linear of each kind, each
    step.

    ``module`` has no adapters attached; kernel is asked once, for a bank of the trial's own, which keeps halves where
    the serving one will. Raises what it raises.
    """
    linears = reversed(_linears(module, sites))
    kinds = {_kind(module.get_submodule(name), members): (name, members) for name, members in linears}
    chosen = {site.name: site for _, members in kinds.values() for site in members}
    bank = _bank(chosen, max_rank, bank_dtype, device, keeps_halves)
    adders, routing = kernel(chosen, bank), Routing(device)
    tried = {}
    for (_, widths, rounding, is_biased), (name, members) in kinds.items():
        bias = _numbers(3, sum(widths)).to(device, dtype) if is_biased else None
        group = SiteGroup(tuple(bank.shelf(site.name) for site in members), rounding, bias)
        tried[name] = group, adders.adder(group), torch_adder(group)
    for segments in STEPS:
        routing.fill(segments)
        for name, (group, add, add_plainly) in tried.items():
            num_in, num_out = group.shelves[0].site.in_features, group.columns[-1][1]
            x, y = (_numbers(2, routing.num_rows, width).to(device, dtype) for width in (num_in, num_out))
            found, expected = y.clone(), y.clone()
            add(found, x, routing)
            add_plainly(expected, x, routing)
            if torch.equal(expected, y):
                raise ValueError(f"the trial's adapters leave {name} alone")
            yield f"{name} over {routing.num_rows} rows", found, expected


def _linears(module: nn.Module, sites: SiteTable) -> list[tuple[str, list[Site]]]:
    """Those that are computed when serving: the merged ones, and of the others each."""
    merged = list(merged_sites(module, sites))
    parts = {site.name for _, members in merged for site in members}
    return [*merged, *((name, [site]) for name, site in sites.items() if name not in parts)]


def _kind(linear: nn.Module, members: Sequence[Site]) -> tuple[int, tuple[int, ...], Rounding, bool]:
    """Linears of one kind are computed alike: by input, widths, rounding, and whether there is a bias."""
    widths = tuple(site.out_features for site in members)
    return members[0].in_features, widths, rounding_of(linear), getattr(linear, "bias", None) is not None


def _bank(
    sites: Mapping[str, Site], max_rank: int, dtype: torch.dtype, device: torch.device, keeps_halves: bool
) -> SlotBank:
    """Slot 0 with half the largest rank, 1 with a small one, of numbers that bfloat16 holds, 2 with the largest and
    DoRA."""
    bank = SlotBank(sites, 3, max_rank, dtype, device, keeps_halves=keeps_halves)
    bank.connect(lambda name: _numbers(4, sites[name].out_features, sites[name].in_features).to(device))
    ranks = (max(1, max_rank // 2), min(SMALL_RANK, max_rank), max_rank)
    for slot, rank in enumerate(ranks):
        bank.write(slot, _adapter(sites, rank, slot, is_half=slot == 1, is_dora=slot == 2))
    return bank


def _adapter(
    sites: Mapping[str, Site], rank: int, seed: int, *, is_half: bool, is_dora: bool
) -> AdapterWeights:
    """What it adds is about as large as the base's output."""
    made = {}
    for name, site in sites.items():
        a = _numbers(10 + seed, rank, site.in_features) / site.in_features**0.5
        b = _numbers(20 + seed, site.out_features, rank) / rank**0.5
        magnitude = _numbers(30 + seed, site.out_features).abs() * site.in_features**0.5 if is_dora else None
        if is_half:
            a, b = (each.bfloat16().float() for each in (a, b))
        made[name] = SiteWeights(a, b, magnitude)
    return AdapterWeights(made, sum(one.num_bytes for one in made.values()), rank, f"trial-{seed}")


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
