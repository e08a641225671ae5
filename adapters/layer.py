"""MultiLoraLinear: a linear of the base with every slot's adapter beside it, and ``attach``, which puts them in place.

Owns no numbers: the base's linear, the bank's shelves and the routing are given at construction. Rows of base-only
requests and of adapters that leave this site alone come out as the base's own bits.

A linear that the base has merged (q, k and v; gate and up) has the sites of its parts, and their adapters are added
together. The parts, which remain under their own names for the references, are wrapped each on its own.

Place in a request's way: step 8, inside the language model and the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from adapters.ops.site_group import Adder, SiteGroup, torch_adder
from adapters.ops.torch_ops import Rounding
from adapters.routing import Routing, RoutingSet
from adapters.sites import Site, SiteTable
from adapters.slots import SlotBank


class MultiLoraLinear(nn.Module):
    """``base``, wrapped. Looks like a linear to those who ask for ``weight``, ``bias`` or widths."""

    def __init__(
        self,
        base: nn.Module,
        sites: Sequence[Site],
        bank: SlotBank,
        routing: Routing,
        adder: Adder = torch_adder,
    ) -> None:
        """sites: those of the base's columns, in order; one, unless the base is merged. adder: whose sums are added."""
        super().__init__()
        self.base = base
        self.sites = tuple(sites)
        self.in_features = sites[0].in_features
        self.out_features = sum(site.out_features for site in sites)
        self._routing = routing
        shelves = tuple(bank.shelf(site.name) for site in sites)
        self.group = SiteGroup(shelves, rounding_of(base), self.bias)
        self._add = adder(self.group)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], the base's dtype.

        Raises ValueError if x has another number of rows than the routing was filled with.
        """
        y: Tensor = self.base(x)
        routing = self._routing
        if routing.is_base_only:
            return y
        flat_y = y.reshape(-1, y.shape[-1])
        if flat_y.shape[0] != routing.num_rows:
            raise ValueError(
                f"{self.group.name} got {flat_y.shape[0]} rows, and routing for {routing.num_rows}"
            )
        self._add(flat_y, x.reshape(-1, x.shape[-1]), routing)
        return flat_y.view(y.shape)

    @property
    def weight(self) -> Tensor:
        weight = self.base.weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"{type(self.base).__name__}.weight is not a tensor")
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.base.bias
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"{type(self.base).__name__}.bias is not a tensor")
        return bias


def rounding_of(base: nn.Module) -> Rounding:
    """How PEFT rounds around it."""
    return Rounding.DELTA if is_four_bit(base) else Rounding.SUM


def is_four_bit(base: nn.Module) -> bool:
    """Whether the linear's weight came through 4-bit quantisation, whichever way it is computed now."""
    return bool(getattr(base, "is_quantised", False)) or type(base).__name__ == "Linear4bit"


def merged_sites(module: nn.Module, sites: SiteTable) -> Iterator[tuple[str, list[Site]]]:
    """The name of each merged linear with sites, told by its ``part_names``, and these in their columns' order.

    Raises ValueError for one of which only some parts are sites: their adapters would be lost on whoever calls it.
    """
    for name, child in module.named_modules():
        part_names = getattr(child, "part_names", None)
        if isinstance(part_names, tuple):
            prefix = name[: name.rfind(".") + 1]
            names = [prefix + str(part) for part in part_names]
            unknown = [one for one in names if one not in sites]
            if not unknown:
                yield name, [sites[one] for one in names]
            elif len(unknown) < len(names):
                raise ValueError(f"{name} is merged of sites and others, such as {unknown[0]}")


def attach(
    module: nn.Module,
    sites: SiteTable,
    bank: SlotBank,
    routing: RoutingSet,
    base_weight: Callable[[nn.Module], Tensor],
    adder: Adder = torch_adder,
) -> None:
    """Wrap every site of ``module`` and every merged linear in place, and give the bank the base's weights for DoRA.

    base_weight turns a linear of the base into its weight, [out, in] of any float dtype, dequantised and unpacked; it
    is called from the mover's threads and must only read. adder: who computes the adapters, TritonLora's, NativeLora's
    or plain torch. Raises ValueError, and changes nothing, if adapters are attached already, or if a part of a merged
    linear is no site.
    """
    bases = {name: module.get_submodule(name) for name in sites}
    attached = next((name for name, base in bases.items() if isinstance(base, MultiLoraLinear)), None)
    if attached is not None:
        raise ValueError(f"adapters are attached to this model already (at {attached}); detach them first")
    groups = dict(merged_sites(module, sites))
    for name, members in [*((name, [site]) for name, site in sites.items()), *groups.items()]:
        base = module.get_submodule(name)
        _replace(module, name, MultiLoraLinear(base, members, bank, routing.of(members[0].part), adder))

    @torch.no_grad()
    def weight_of(name: str) -> Tensor:
        return base_weight(bases[name]).float()

    bank.connect(weight_of)


def detach(module: nn.Module) -> None:
    """Put the base's own linears back; nothing happens where none is wrapped."""
    wrapped = [(name, child) for name, child in module.named_modules() if isinstance(child, MultiLoraLinear)]
    for name, child in wrapped:
        _replace(module, name, child.base)


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child)
