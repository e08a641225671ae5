"""try_lora: Triton's adapters beside torch's batched products, at a model's own shapes, for whoever decides who serves.

Owns small adapters made for it, of several ranks, one of them DoRA, in a bank of its own. Decides nothing. Place in a
request's way: none; once, at start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from adapters.layer import is_four_bit
from adapters.ops.launch import SHORT_ROWS
from adapters.ops.torch_ops import Rounding, add_lora
from adapters.routing import Routing
from adapters.sites import Site, SiteTable
from adapters.slots import SlotBank
from adapters.triton_lora import TritonLora
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
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What was computed, by Triton, and by batched products: [T, out] in ``dtype``, one site of each kind, each step.

    ``module`` has no adapters attached. Raises what a kernel raises.
    """
    roundings = {
        name: Rounding.DELTA if is_four_bit(module.get_submodule(name)) else Rounding.SUM for name in sites
    }
    biased = {name: getattr(module.get_submodule(name), "bias", None) is not None for name in sites}
    kinds = {
        (site.in_features, site.out_features, roundings[name], biased[name]): (name, site)
        for name, site in reversed(list(sites.items()))
    }
    chosen = dict(reversed(kinds.values()))
    bank = _bank(chosen, max_rank, bank_dtype, device)
    triton, routing = TritonLora(chosen, bank), Routing(device)
    for segments in STEPS:
        routing.fill(segments)
        for name, site in chosen.items():
            x, y = (_numbers(2, routing.num_rows, width).to(device, dtype) for width in _widths(site))
            bias = _numbers(3, site.out_features).to(device, dtype) if biased[name] else None
            shelf, rounding = bank.shelf(name), roundings[name]
            plan = routing.plan(shelf.layout)
            if plan is None:
                raise ValueError(f"the trial's adapters leave {name} alone")
            found = triton.add(y.clone(), x, triton.linear([name], rounding), routing, bias)
            expected = add_lora(y, x, plan, shelf.pages, shelf.scale, bias, rounding)
            yield f"{name} over {routing.num_rows} rows", found, expected


def _bank(sites: Mapping[str, Site], max_rank: int, dtype: torch.dtype, device: torch.device) -> SlotBank:
    """Slot 0 with half the largest rank, 1 with a small one, 2 with the largest and DoRA."""
    bank = SlotBank(sites, 3, max_rank, dtype, device)
    bank.connect(lambda name: _numbers(4, sites[name].out_features, sites[name].in_features).to(device))
    ranks = (max(1, max_rank // 2), min(SMALL_RANK, max_rank), max_rank)
    for slot, rank in enumerate(ranks):
        bank.write(slot, _adapter(sites, rank, slot, is_dora=slot == 2))
    return bank


def _adapter(sites: Mapping[str, Site], rank: int, seed: int, *, is_dora: bool) -> AdapterWeights:
    """What it adds is about as large as the base's output."""
    made = {}
    for name, site in sites.items():
        a = _numbers(10 + seed, rank, site.in_features) / site.in_features**0.5
        b = _numbers(20 + seed, site.out_features, rank) / rank**0.5
        magnitude = _numbers(30 + seed, site.out_features).abs() * site.in_features**0.5 if is_dora else None
        made[name] = SiteWeights(a, b, magnitude)
    return AdapterWeights(made, sum(one.num_bytes for one in made.values()), rank, f"trial-{seed}")


def _widths(site: Site) -> tuple[int, int]:
    return site.in_features, site.out_features


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
