"""Small adapters over small linears, for tests of slots, routing and layers."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from adapters.layer import attach
from adapters.native_lora import NativeLora
from adapters.ops.site_group import Adder, AdderOwner, torch_adder
from adapters.ref import AdapterRef
from adapters.routing import RoutingSet
from adapters.sites import Site, SiteTable
from adapters.slots import SlotBank
from adapters.triton_lora import TritonLora
from adapters.weights import AdapterWeights, SiteWeights
from base.ops.native_library import native_library

CPU = torch.device("cpu")


def make_ref(name: str, version: int = 1) -> AdapterRef:
    return AdapterRef(name, version, digest=f"digest-{name}-{version}")


def make_weights(
    seed: int,
    ranks: Mapping[str, int],
    sites: Mapping[str, Site],
    *,
    is_dora: bool = False,
    halves: Container[str] = (),
) -> AdapterWeights:
    """An adapter with the given rank at each named site; deltas are about as large as the base's outputs.

    halves: the sites at which A and B are numbers of bfloat16.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {name: _site_weights(generator, rank, sites[name], is_dora) for name, rank in ranks.items()}
    made |= {name: _in_halves(site) for name, site in made.items() if name in halves}
    num_bytes = sum(site.num_bytes for site in made.values())
    return AdapterWeights(made, num_bytes, max(ranks.values(), default=0), f"digest-{seed}")


def _site_weights(generator: torch.Generator, rank: int, site: Site, is_dora: bool) -> SiteWeights:
    a = torch.randn(rank, site.in_features, generator=generator) / site.in_features**0.5
    b = torch.randn(site.out_features, rank, generator=generator) / rank**0.5
    magnitude = torch.rand(site.out_features, generator=generator) * 2 + 0.5 if is_dora else None
    return SiteWeights(a, b, magnitude)


def _in_halves(site: SiteWeights) -> SiteWeights:
    return replace(site, a=site.a.bfloat16().float(), b=site.b.bfloat16().float())


def row_slots(segments: Sequence[tuple[int, int]]) -> list[int]:
    """Runs of (rows, slot), as ``Routing.fill`` takes them, as one slot a row."""
    return [slot for num_rows, slot in segments for _ in range(num_rows)]


class Tiny(nn.Module):
    """A "model" of named bf16 linears; forward sends the same x through each."""

    def __init__(self, widths: Mapping[str, tuple[int, int]], dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(7)
        for name, (num_in, num_out) in widths.items():
            self.add_module(name, nn.Linear(num_in, num_out).to(dtype))
        self.requires_grad_(False)


class Bench:
    """A tiny model with a bank attached: everything around one or a few linears."""

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        *,
        num_slots: int = 16,
        max_rank: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        kernel: Literal["torch", "triton", "native"] = "torch",
        keeps_halves: bool = False,
    ) -> None:
        self.module = Tiny(widths, dtype)
        self.sites = {name: Site(name, *each, "language") for name, each in widths.items()}
        self.bank = SlotBank(self.sites, num_slots, max_rank, torch.float32, CPU, keeps_halves=keeps_halves)
        self.routing = RoutingSet.on(CPU)
        self.triton = TritonLora(self.sites, self.bank) if kernel == "triton" else None
        adder = adder_of(kernel, self.sites, self.bank) if self.triton is None else self.triton.adder
        attach(self.module, self.sites, self.bank, self.routing, plain_weight, adder)

    def run(self, name: str, x: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
        self.routing.language.fill(segments)
        with torch.inference_mode():
            result: Tensor = self.module.get_submodule(name)(x)
        return result

    def base(self, name: str, x: Tensor) -> Tensor:
        with torch.inference_mode():
            result: Tensor = self.module.get_submodule(name).get_submodule("base")(x)
        return result


def adder_of(kernel: Literal["torch", "triton", "native"], sites: SiteTable, bank: SlotBank) -> Adder:
    if kernel == "torch":
        return torch_adder
    owner: AdderOwner = (
        TritonLora(sites, bank) if kernel == "triton" else NativeLora(sites, bank, native_library())
    )
    return owner.adder


def plain_weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
