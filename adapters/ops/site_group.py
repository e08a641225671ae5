"""SiteGroup: sites with one input whose outputs lie side by side, and the seam of those who add adapters to them.

A linear of the base that was merged of q, k and v has three sites, any other one. ``attach`` chooses an ``Adder`` for
the device and lets it make an ``Add`` for each group, once; each is called once a step. Here is the plain one: batched
products, site by site, over rows that are gathered and widened once for all sites whose slots hold alike.

A shrink shared by the sites was measured and is no gain on a CPU (bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from adapters.ops.torch_ops import Rounding, add_lora, pad_rows
from adapters.routing import Routing
from adapters.slots import Shelf


@dataclass(frozen=True, slots=True, eq=False)
class SiteGroup:
    """What never changes of it; its shelves' contents do, at the bank's hand."""

    shelves: tuple[Shelf, ...]
    """In the order of their columns."""
    rounding: Rounding
    bias: Tensor | None  # [sum of out], the base's; asked for by DoRA alone

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """Of each site: the first, and the one behind the last."""
        ends, end = [], 0
        for shelf in self.shelves:
            ends.append((end, end := end + shelf.site.out_features))
        return tuple(ends)

    @property
    def name(self) -> str:
        return " + ".join(shelf.site.name for shelf in self.shelves)


Add = Callable[[Tensor, Tensor, Routing], None]
"""Adds this step's adapters, in place, to y [T, sum of out], the base's output for x [T, in]. T is the routing's number
of rows, and some of them are some adapter's. Rows of y may lie apart, a row's numbers do not. Rows and sites that no
adapter touches keep their bits. Raises ValueError if a row is routed to an empty slot."""

Adder = Callable[[SiteGroup], Add]
"""Makes a group's ``Add``; the group lives as long as it."""


class AdderOwner(Protocol):
    """What keeps a kernel's tables in step with one bank: TritonLora, NativeLora."""

    def adder(self, group: SiteGroup) -> Add:
        """An ``Adder``."""


def torch_adder(group: SiteGroup) -> Add:
    """For any device."""
    parts = [
        (shelf, start, stop, None if group.bias is None else group.bias[start:stop])
        for shelf, (start, stop) in zip(group.shelves, group.columns, strict=True)
    ]

    def add(y: Tensor, x: Tensor, routing: Routing) -> None:
        padded: dict[int, Tensor] = {}  # by the plan, which is one object for all sites that agree
        for shelf, start, stop, bias in parts:
            plan = routing.plan(shelf.layout)
            if plan is not None:
                if id(plan) not in padded:
                    padded[id(plan)] = pad_rows(x, plan, shelf.dtype)
                columns, rows = y[:, start:stop], padded[id(plan)]
                add_lora(columns, rows, plan, shelf.pages, shelf.scale, bias, group.rounding)

    return add
