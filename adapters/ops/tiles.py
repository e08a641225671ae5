"""TileTable: a batch's rows sorted by slot and cut into tiles of one slot each, as Triton's programs read it.

Owns one small tensor on the device, refilled in place before a forward: a captured graph keeps reading it. Its size is
the worst case of its rows and slots; programs of tiles that are not used find no rows and leave. Rows of the base
(-1) are in no tile. Knows no weights: what a slot holds at a site is adapters.ops.entries' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from adapters.ops.upload import Upload

TILE_FIELDS: Final = 4
SHORT_TILE, LONG_TILE = 16, 32
"""Rows of a tile, in decodes and in prefills. 16 is a tensor core's least; adapters.ops.kernels.lora rules out 64."""


def max_tiles(num_rows: int, num_slots: int, tile_rows: int) -> int:
    """The most tiles that any routing of ``num_rows`` rows over ``num_slots`` slots takes."""
    used = min(num_rows, num_slots)
    return used + (num_rows - used) // tile_rows


class TileTable:
    """For exactly ``num_rows`` rows. The engine's thread only."""

    def __init__(
        self, num_rows: int, num_slots: int, device: torch.device, tile_rows: int = SHORT_TILE
    ) -> None:
        if num_rows < 1 or num_slots < 1:
            raise ValueError(f"num_rows and num_slots must be at least 1, not {num_rows} and {num_slots}")
        self.num_rows = num_rows
        self.num_slots = num_slots
        self.tile_rows = tile_rows
        self.capacity = max_tiles(num_rows, num_slots, tile_rows)
        size = self.capacity * TILE_FIELDS + num_rows
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self._upload = Upload(self._buffer)
        self.tiles: Tensor = self._buffer[: self.capacity * TILE_FIELDS]
        """[capacity, 4] int32, flat: slot, first place, number of rows, unused."""
        self.rows: Tensor = self._buffer[self.capacity * TILE_FIELDS :]
        """[num_rows] int32: the row at each place; meaningful where a tile says so."""

    def fill(self, slots: Sequence[int]) -> None:
        """Say which slot each row belongs to (-1: none); rows beyond ``slots`` belong to none.

        Raises ValueError for more rows than the table has, or a slot that is not there.
        """
        given = np.asarray(slots, dtype=np.int64)
        if given.size > self.num_rows:
            raise ValueError(f"{given.size} rows do not fit a table of {self.num_rows}")
        if given.size and (given.min() < -1 or given.max() >= self.num_slots):
            raise ValueError(f"slots are -1 to {self.num_slots - 1}, not {given.min()} to {given.max()}")
        packed = np.zeros(self._buffer.numel(), dtype=np.int32)
        order = np.argsort(given, kind="stable")
        order = order[np.searchsorted(given[order], 0) :]
        packed[self.capacity * TILE_FIELDS :][: order.size] = order
        tiles = _tiles(given[order], self.tile_rows)
        packed[: tiles.size] = tiles.reshape(-1)
        self._upload.send(packed)


def _tiles(slots: np.ndarray[tuple[int], np.dtype[np.int64]], tile_rows: int) -> np.ndarray[
    tuple[int, int], np.dtype[np.int32]
]:  # fmt: skip
    """Sorted slots of touched rows -> [tiles, 4]."""
    used, firsts, counts = np.unique(slots, return_index=True, return_counts=True)
    per_slot = -(-counts // tile_rows)
    slot_of = np.repeat(np.arange(used.size), per_slot)
    within = np.arange(slot_of.size) - np.repeat(np.cumsum(per_slot) - per_slot, per_slot)
    made = np.zeros((slot_of.size, TILE_FIELDS), dtype=np.int32)
    made[:, 0] = used[slot_of]
    made[:, 1] = firsts[slot_of] + within * tile_rows
    made[:, 2] = np.minimum(counts[slot_of] - within * tile_rows, tile_rows)
    return made
