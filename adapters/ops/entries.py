"""DeviceTable: where each slot's weights of each site are, as the kernels read it.

Owns one tensor on the device [sites, slots, 4] int64 of addresses and forms, refreshed in place at a step boundary
after slots were written: a graph captured with one adapter then runs with any. Reads the bank's shelves and
changes nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from adapters.ops.native_ops import TYPES
from adapters.ops.upload import Upload
from adapters.slots import Form, Layout, PageKey, Shelf

ENTRY_FIELDS: Final = 4
_UNNAMED: Final = -1
"""A type for which there is no code: Triton's programs are compiled for the bank's."""
_Stamp: TypeAlias = tuple[tuple[Form, ...], frozenset[tuple[PageKey, int, int]], int]
_Rows: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class DeviceTable:
    """For all sites of a bank, in the order given: sites that share an input (q, k, v) must be neighbours."""

    def __init__(self, shelves: Sequence[Shelf], device: torch.device) -> None:
        self._shelves = tuple(shelves)
        self.num_slots = len(self._shelves[0].forms)
        shape = (len(self._shelves), self.num_slots, ENTRY_FIELDS)
        self._host = np.zeros(shape, dtype=np.int64)
        self._stamps: list[_Stamp | None] = [None] * len(self._shelves)
        self._places = {shelf.site.name: place for place, shelf in enumerate(self._shelves)}
        self._entries = torch.zeros(shape, dtype=torch.int64, device=device)
        self._upload = Upload(self._entries)
        self._seen: Layout | None = None

    def follow(self) -> bool:
        """``refresh`` if anything happened to a slot since the last call, and whether it did; cheap, for every step."""
        layout = self._shelves[0].layout  # a new one after everything that happens to a slot
        if layout is self._seen:
            return False
        self._seen = layout
        self.refresh()
        return True

    def refresh(self) -> bool:
        """Take over what the bank holds now; whether anything had changed. Copies nothing if nothing had."""
        stamps = [_stamp(shelf) for shelf in self._shelves]
        changed = [place for place, stamp in enumerate(stamps) if stamp != self._stamps[place]]
        for place in changed:
            self._host[place] = _rows(self._shelves[place])
        self._stamps[:] = stamps
        if changed:
            self._upload.send(self._host)
        return bool(changed)

    def entries(self, names: Sequence[str]) -> Tensor:
        """[names, slots, 4] int64, a view valid for the table's life: the address of A [R, in], of B [out, R], of the
        scale [out] float32 (0 without), and two int32: R (0 where the slot leaves the site alone) in the lower half,
        A's and B's type (as in ``TYPES``) in the upper one. Names must be neighbours.
        """
        first = self._places[names[0]]
        if [self._places[name] for name in names] != list(range(first, first + len(names))):
            raise ValueError(f"{', '.join(names)} are not side by side in the table")
        return self._entries[first : first + len(names)]


def _stamp(shelf: Shelf) -> _Stamp:
    """Equal as long as nothing that the table says of the shelf has changed."""
    pages = ((key, each.a.data_ptr(), each.b.data_ptr()) for key, each in shelf.pages.items())
    return tuple(shelf.forms), frozenset(pages), 0 if shelf.scale is None else shelf.scale.data_ptr()


def _rows(shelf: Shelf) -> _Rows:
    """One site's part of the table."""
    slots = np.arange(len(shelf.forms))
    made = np.zeros((slots.size, ENTRY_FIELDS), dtype=np.int64)
    for key, pages in shelf.pages.items():
        mine = np.array([form.key == key for form in shelf.forms])
        made[mine, 3] = key.rank + (TYPES.get(key.dtype, _UNNAMED) << 32)
        for field, weights in ((0, pages.a), (1, pages.b)):
            if weights.stride(2) != 1 or weights.stride(1) != weights.shape[2]:
                raise ValueError(f"pages of {shelf.site.name} must hold each slot's rows side by side")
            stride = weights.stride(0) * weights.element_size()
            made[mine, field] = weights.data_ptr() + slots[mine] * stride
    if shelf.scale is not None:
        is_dora = np.array([form.is_dora for form in shelf.forms])
        stride = shelf.scale.stride(0) * shelf.scale.element_size()
        made[is_dora, 2] = shelf.scale.data_ptr() + slots[is_dora] * stride
    return made
