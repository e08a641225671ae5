"""TritonLora: a model's adapters as Triton's kernels see them, kept in step with bank and routings.

Owns the device's table of what the slots hold, and for each routing and size of batch a tile table. Reads bank and
routings, changes neither; chosen by ``attach`` beside CUDA. Sizes of batches are rounded up, so that tables are few.

Before a captured graph is replayed, ``prepare`` does what a layer's own call would: all that the graph then reads is
refilled in place.

Place in a request's way: step 8, under every linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from adapters.composition import RANK_FACTOR
from adapters.ops.entries import DeviceTable
from adapters.ops.launch import SHORT_ROWS
from adapters.ops.site_group import Add, SiteGroup
from adapters.ops.tiles import LONG_TILE, SHORT_TILE, TileTable
from adapters.ops.torch_ops import Rounding
from adapters.ops.triton_ops import TritonLinear, add_lora
from adapters.routing import Routing
from adapters.sites import SiteTable
from adapters.slots import SlotBank, page_rank

MIN_ROWS: Final = 16


class TritonLora:
    """The engine's thread only."""

    def __init__(self, sites: SiteTable, bank: SlotBank) -> None:
        """Raises ValueError for a bank that keeps halves: these programs read one dtype."""
        if bank.keeps_halves:
            raise ValueError("Triton's programs read pages of the bank's dtype, and this bank keeps halves")
        self._bank = bank
        self._sites = sites
        self._max_rank = page_rank(bank.max_rank * RANK_FACTOR)
        self._entries = DeviceTable([bank.shelf(name) for name in sites], bank.device)
        self._steps: dict[Routing, _Tiles] = {}

    def linear(self, names: Sequence[str], rounding: Rounding) -> TritonLinear:
        """For one site, or up to three neighbours in the site table that share an input and lie side by side."""
        widths = tuple(self._sites[name].out_features for name in names)
        num_in = self._sites[names[0]].in_features
        entries = self._entries.entries(names)
        return TritonLinear(entries, num_in, widths, self._bank.dtype, self._max_rank, rounding)

    def prepare(self, routing: Routing) -> TileTable:
        """The tile table of this step's rows, with it and the slots' contents on the device.

        Raises ValueError if a row is routed to an empty slot.
        """
        self._entries.follow()
        tiles = self._steps.setdefault(routing, _Tiles(self._bank))
        return tiles.follow(routing)

    def adder(self, group: SiteGroup) -> Add:
        """An ``Adder``: one shrink and one expand for all sites of the group."""
        linear = self.linear([shelf.site.name for shelf in group.shelves], group.rounding)

        def add(y: Tensor, x: Tensor, routing: Routing) -> None:
            if not _is_idle(group, routing):
                self.add(y, x.contiguous(), linear, routing, group.bias)

        return add

    def add(
        self, y: Tensor, x: Tensor, linear: TritonLinear, routing: Routing, bias: Tensor | None
    ) -> Tensor:
        """y [T, out], the base's output for x [T, in], with this step's adapters added in place; returns y."""
        return add_lora(y, x, linear, self.prepare(routing), bias)


def _is_idle(group: SiteGroup, routing: Routing) -> bool:
    """Whether nothing need be computed there. While a graph is captured never: who comes later must count."""
    return not routing.is_open and not any(shelf.pages for shelf in group.shelves)


class _Tiles:
    """One routing's tile tables by size, and which of them says what the routing says."""

    def __init__(self, bank: SlotBank) -> None:
        self._bank = bank
        self._tables: dict[int, TileTable] = {}
        self._segments: tuple[tuple[int, int], ...] | None = None
        self._current: TileTable | None = None

    def follow(self, routing: Routing) -> TileTable:
        if self._current is None or routing.segments is not self._segments:
            slots = [slot for num_rows, slot in routing.segments for _ in range(num_rows)]
            self._bank.check_routed(slots)
            self._current = self._table(max(MIN_ROWS, 1 << (len(slots) - 1).bit_length()))
            self._current.fill(slots)
            self._segments = routing.segments
        return self._current

    def _table(self, num_rows: int) -> TileTable:
        if num_rows not in self._tables:
            tile_rows = SHORT_TILE if num_rows <= SHORT_ROWS else LONG_TILE
            self._tables[num_rows] = TileTable(num_rows, self._bank.num_slots, self._bank.device, tile_rows)
        return self._tables[num_rows]
