"""MultiLoraLinear: a linear of the base with every slot's adapter beside it, and ``attach``, which puts them in place.

Owns no numbers: the base's linear, the bank's shelf and the routing are given at construction. Rows of base-only
requests and of adapters that leave this site alone come out as the base's own bits.

Place in a request's way: step 8, inside the language model and the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from adapters.ops.torch_ops import Rounding, add_lora
from adapters.routing import Routing, RoutingSet
from adapters.sites import Site, SiteTable
from adapters.slots import SlotBank


class MultiLoraLinear(nn.Module):
    """``base``, wrapped. Looks like a linear to those who ask for ``weight``, ``bias`` or widths."""

    def __init__(self, base: nn.Module, site: Site, bank: SlotBank, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self._shelf = bank.shelf(site.name)
        self._routing = routing
        self._rounding = Rounding.DELTA if is_four_bit(base) else Rounding.SUM

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], the base's dtype.

        Raises ValueError if x has another number of rows than the routing was filled with.
        """
        y: Tensor = self.base(x)
        if self._routing.is_base_only:
            return y
        shelf = self._shelf
        plan = self._routing.plan(shelf.layout)
        if plan is None:
            return y
        flat_y = y.reshape(-1, y.shape[-1])
        if plan.num_rows != flat_y.shape[0]:
            raise ValueError(f"{self.site.name} got {flat_y.shape[0]} rows, and routing for {plan.num_rows}")
        flat_x = x.reshape(-1, x.shape[-1])
        # only DoRA asks for the bias, and to look it up takes time
        bias = None if shelf.scale is None else self.bias
        result = add_lora(flat_y, flat_x, plan, shelf.pages, shelf.scale, bias, self._rounding)
        return result.view(y.shape)

    @property
    def in_features(self) -> int:
        return self.site.in_features

    @property
    def out_features(self) -> int:
        return self.site.out_features

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


def is_four_bit(base: nn.Module) -> bool:
    """Whether the linear's weight came through 4-bit quantisation, whichever way it is computed now."""
    return bool(getattr(base, "is_quantised", False)) or type(base).__name__ == "Linear4bit"


def attach(
    module: nn.Module,
    sites: SiteTable,
    bank: SlotBank,
    routing: RoutingSet,
    base_weight: Callable[[nn.Module], Tensor],
) -> None:
    """Wrap every site of ``module`` in place, and give the bank the base's weights for DoRA.

    base_weight turns a linear of the base into its weight, [out, in] of any float dtype, dequantised and unpacked; it
    is called from the mover's threads and must only read. Raises ValueError, and changes nothing, if adapters are
    attached already.
    """
    bases = {name: module.get_submodule(name) for name in sites}
    attached = next((name for name, base in bases.items() if isinstance(base, MultiLoraLinear)), None)
    if attached is not None:
        raise ValueError(f"adapters are attached to this model already (at {attached}); detach them first")
    for name, site in sites.items():
        _replace(module, name, MultiLoraLinear(bases[name], site, bank, routing.of(site.part)))

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
