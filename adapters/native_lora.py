"""NativeLora: a model's adapters as the CPU's compiled kernel sees them, kept in step with bank and routings.

Owns the table of what the slots hold and the panels of each routing's step; as adapters.triton_lora does beside CUDA.
Reads bank and routings, changes neither.

Place in a request's way: step 8, under every linear.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.composition import RANK_FACTOR
from adapters.ops.entries import DeviceTable
from adapters.ops.native_ops import NativeSites, Panels
from adapters.ops.site_group import Add, SiteGroup
from adapters.routing import Routing
from adapters.sites import SiteTable
from adapters.slots import SlotBank, page_rank


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What a routing said, and what came of it."""

    segments: tuple[tuple[int, int], ...]
    panels: Panels


class NativeLora:
    """The engine's thread only."""

    def __init__(self, sites: SiteTable, bank: SlotBank, library: ctypes.CDLL) -> None:
        """bank: may keep halves. library: base.ops.native_library's.

        Raises ValueError for a bank that is not float32 on the CPU.
        """
        if bank.device.type != "cpu" or bank.dtype != torch.float32:
            raise ValueError(f"the compiled adapters are float32 on a CPU, not {bank.dtype} on {bank.device}")
        self._library = library
        self._bank = bank
        self._max_rank = page_rank(bank.max_rank * RANK_FACTOR)
        self._entries = DeviceTable([bank.shelf(name) for name in sites], bank.device)
        self._steps: dict[Routing, _Step] = {}

    def adder(self, group: SiteGroup) -> Add:
        """An ``Adder``. The sites of a group must be neighbours in the site table."""
        sites = [shelf.site for shelf in group.shelves]
        native = NativeSites(
            self._library,
            self._entries.entries([site.name for site in sites]),
            sites[0].in_features,
            [site.out_features for site in sites],
            group.bias,
            group.rounding,
            self._max_rank,
        )

        def add(y: Tensor, x: Tensor, routing: Routing) -> None:
            if any(shelf.pages for shelf in group.shelves):
                native.add(y, x, self._panels(routing))

        return add

    def _panels(self, routing: Routing) -> Panels:
        """This step's, with the table in step. Raises ValueError if a row is routed to an empty slot."""
        if self._entries.follow():
            self._steps.clear()
        step = self._steps.get(routing)
        if step is None or step.segments is not routing.segments:
            self._bank.check_routed(slot for _, slot in routing.segments)
            step = self._steps[routing] = _Step(routing.segments, Panels.of(routing.segments))
        return step.panels
