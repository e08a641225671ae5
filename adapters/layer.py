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
from adapters.ops.triton_ops import TritonLinear
from adapters.routing import Routing, RoutingSet
from adapters.sites import Site, SiteTable
from adapters.slots import SlotBank
from adapters.triton_lora import TritonLora, suits


class MultiLoraLinear(nn.Module):
    """``base``, wrapped. Looks like a linear to those who ask for ``weight``, ``bias`` or widths."""

    def __init__(
        self, base: nn.Module, site: Site, bank: SlotBank, routing: Routing, triton: TritonLora | None = None
    ) -> None:
        """triton: computes the adapters' part instead of batched products."""
        super().__init__()
        self.base = base
        self.site = site
        self._shelf = bank.shelf(site.name)
        self._routing = routing
        self._rounding = Rounding.DELTA if is_four_bit(base) else Rounding.SUM
        self._triton = triton
        self._kernels = None if triton is None else triton.linear([site.name], self._rounding)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], the base's dtype.

        Raises ValueError if x has another number of rows than the routing was filled with.
        """
        y: Tensor = self.base(x)
        if self._routing.is_base_only:
            return y
        if self._triton is not None and self._kernels is not None:
            return self._add_by_triton(y, x, self._triton, self._kernels)
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

    def _add_by_triton(self, y: Tensor, x: Tensor, triton: TritonLora, kernels: TritonLinear) -> Tensor:
        if triton.is_idle(self._shelf, self._routing):
            return y
        flat_y, flat_x = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        if flat_y.shape[0] != self._routing.num_rows:
            raise ValueError(
                f"{self.site.name} got {flat_y.shape[0]} rows, and routing for {self._routing.num_rows}"
            )
        return triton.add(flat_y, flat_x.contiguous(), kernels, self._routing, self.bias).view(y.shape)

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
    *,
    is_triton: bool | None = None,
) -> TritonLora | None:
    """Wrap every site of ``module`` in place, and give the bank the base's weights for DoRA.

    base_weight turns a linear of the base into its weight, [out, in] of any float dtype, dequantised and unpacked; it
    is called from the mover's threads and must only read. is_triton: whether Triton computes the adapters; by default
    where it suits the bank's device. Returns what must be prepared before a captured graph is replayed, or None where
    plain torch computes. Raises ValueError, and changes nothing, if adapters are
    attached already.
    """
    bases = {name: module.get_submodule(name) for name in sites}
    attached = next((name for name, base in bases.items() if isinstance(base, MultiLoraLinear)), None)
    if attached is not None:
        raise ValueError(f"adapters are attached to this model already (at {attached}); detach them first")
    if is_triton is None:
        is_triton = suits(bank.device)
    triton = TritonLora(sites, bank) if is_triton else None
    for name, site in sites.items():
        _replace(module, name, MultiLoraLinear(bases[name], site, bank, routing.of(site.part), triton))

    @torch.no_grad()
    def weight_of(name: str) -> Tensor:
        return base_weight(bases[name]).float()

    bank.connect(weight_of)
    return triton


def detach(module: nn.Module) -> None:
    """Put the base's own linears back; nothing happens where none is wrapped."""
    wrapped = [(name, child) for name, child in module.named_modules() if isinstance(child, MultiLoraLinear)]
    for name, child in wrapped:
        _replace(module, name, child.base)


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child)
