"""MergedLinear: linears of one input (q, k and v; gate and up) as one product, and what is left of each in its place.

The product lies beside the linears that it was made of, under a name of ours; each of them becomes a ``LinearPart``,
some columns of it, so that whoever looks a linear up by its name finds one. Nothing is kept twice. Who wants all parts
asks ``Projection``, which also serves where nothing was merged.

A column's bits are those of the product that it had alone: on a CPU by measurement (tests/base/test_merged.py), as
everything that row-invariance rests on.

Place in a request's way: step 8; merged once, at load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor, nn

from base.children import child
from base.float32_linear import Float32Linear
from base.native_linear import NativeLinear
from base.ops.nf4_linear import Nf4Linear

MERGED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""What is merged, by the leaf of its name, and of which siblings, in the order of the columns."""

Product = NativeLinear | Float32Linear | Nf4Linear


class MergedLinear(nn.Module):
    """[..., in] -> [..., sum of out], the parts side by side."""

    def __init__(self, product: Product, part_names: tuple[str, ...]) -> None:
        """part_names: its siblings by leaf, in the order of the columns; by this attribute others know it."""
        super().__init__()
        self.product = product
        self.part_names = part_names
        self.in_features, self.out_features = product.in_features, product.out_features

    @property
    def is_quantised(self) -> bool:
        return self.product.is_quantised

    @property
    def bias(self) -> Tensor | None:
        return self.product.bias

    def forward(self, x: Tensor) -> Tensor:
        return child(self._modules, "product")(x)


class LinearPart(nn.Module):
    """[..., in] -> [..., out], a view of some columns of a merged product. For the references: it computes them all."""

    def __init__(self, product: Product, start: int, stop: int) -> None:
        super().__init__()
        self._product = (product,)  # no child: it would be counted under each part's name
        self._start, self._stop = start, stop
        self.in_features, self.out_features = product.in_features, stop - start

    @property
    def is_quantised(self) -> bool:
        return self._product[0].is_quantised

    @property
    def weight(self) -> Tensor:
        return self.dequantised_weight()

    @property
    def bias(self) -> Tensor | None:
        bias = self._product[0].bias
        return None if bias is None else bias[self._start : self._stop]

    def dequantised_weight(self) -> Tensor:
        """[out, in], a new tensor, as the product's."""
        return self._product[0].dequantised_weight(self._start, self._stop)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self._product[0](x)
        return result[..., self._start : self._stop]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, columns from {self._start}"


class Projection:
    """The linears of one input by name, as they are now: merged or not, wrapped or not."""

    def __init__(self, module: nn.Module, merged: str) -> None:
        """merged: a key of MERGED, whose parts are children of ``module``."""
        self._modules = module._modules
        self._merged, self._names = merged, MERGED[merged]
        self._widths = [_width(module.get_submodule(name), "out_features") for name in self._names]

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """[..., in] -> [..., out] of each; views of one tensor, rows apart, if they were merged."""
        if self._merged in self._modules:
            parts: Sequence[Tensor] = child(self._modules, self._merged)(x).split(self._widths, -1)
            return parts
        return [child(self._modules, name)(x) for name in self._names]


def groups(linears: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """Their names, those that can be merged together, in order of the first of each."""
    found: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for name in linears:
        if name not in seen:
            found.append(_group(name, linears))
            seen.update(found[-1])
    return found


def put(module: nn.Module, names: Sequence[str], product: Product) -> None:
    """One product in the place of one linear below ``module``, or of a group's linears, which may be gone by then."""
    parent_name, _, leaf = names[0].rpartition(".")
    parent = module.get_submodule(parent_name)
    if len(names) == 1:
        setattr(parent, leaf, product)
        return
    leaves = tuple(name.rpartition(".")[2] for name in names)
    start = 0
    for leaf in leaves:
        stop = start + _width(parent.get_submodule(leaf), "out_features")
        setattr(parent, leaf, LinearPart(product, start, stop))
        start = stop
    merged = next(name for name, parts in MERGED.items() if parts == leaves)
    parent.add_module(merged, MergedLinear(product, leaves))


def _group(name: str, linears: Mapping[str, nn.Module]) -> tuple[str, ...]:
    parent, dot, leaf = name.rpartition(".")
    for parts in MERGED.values():
        names = tuple(f"{parent}{dot}{part}" for part in parts)
        if (
            leaf in parts
            and all(one in linears for one in names)
            and _are_alike([linears[one] for one in names])
        ):
            return names
    return (name,)


def _are_alike(linears: Sequence[nn.Module]) -> bool:
    """Whether they are of one kind, have one input, and all or none a bias."""
    kinds = {(type(one), _width(one, "in_features"), one.bias is None) for one in linears}
    return len(kinds) == 1


def _width(linear: nn.Module, attribute: str) -> int:
    width = getattr(linear, attribute)
    if not isinstance(width, int):
        raise TypeError(f"{type(linear).__name__}.{attribute} is not a whole number")
    return width
