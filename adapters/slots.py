"""SlotBank: the weights of the adapters that are on the device, by site and slot.

Owns device memory for adapters. Knows neither refs nor requests: a slot is a number, and who is in it is the
residency's business. The mover's hand writes it; the layers read it.

Storage. A site keeps one block of memory ("pages") for each rank in use there, padded to 8, 16, 32, 64, ...: A
[num_slots, R, in] and B [num_slots, out, R], indexed by slot, so that neighbouring slots are one batched product
without any copy. Pages are allocated when the first slot needs that rank at that site and freed when the last one
leaves, so sites that nobody touches cost nothing and ranks mix without padding to ``max_rank``. On a CPU the operating
system gives memory to written slots only; on CUDA the few sizes are what its caching allocator reuses best.

Pages are in the bank's dtype. A float32 bank that ``keeps_halves`` has others beside them in bfloat16, for slots whose
A and B at the site lose nothing by it (what was trained or saved in bfloat16, with a scale that is a power of two): a
kernel that widens on the way reads half the bytes and computes the same.

A slot's numbers depend on its adapter alone: not on its index, its neighbours, nor ``max_rank``.

Place in a request's way: step 8, under every linear.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.room import Footprint, Page
from adapters.sites import Site, SiteTable
from adapters.staging import StagedAdapter, StagedSite, Stager
from adapters.weights import AdapterWeights

MIN_PAGE_RANK = 8
"""Below 8 columns BLAS takes kernels (matrix-vector, for rank 1) whose sums depend on the number of rows."""
MAX_FOOTPRINTS = 256
OUT_TILE = 16
"""B's rows are padded to a multiple of 16, so that any number of threads splits them between like kernels."""


def page_rank(rank: int) -> int:
    """The padded rank under which a rank is stored: a power of two, at least 8."""
    return max(MIN_PAGE_RANK, 1 << (rank - 1).bit_length())


def _padded_out(site: Site) -> int:
    return -(-site.out_features // OUT_TILE) * OUT_TILE


class PageKey(NamedTuple):
    """What slots that share pages agree in."""

    rank: int  # padded
    dtype: torch.dtype


class Form(NamedTuple):
    """What a loaded slot holds at one site."""

    rank: int  # padded; 0 where its adapter leaves the site alone
    is_dora: bool
    dtype: torch.dtype = torch.float32  # of A and B

    @property
    def key(self) -> PageKey:
        return PageKey(self.rank, self.dtype)


UNTOUCHED = Form(0, False)


def _key_of(staged: StagedSite) -> PageKey:
    return PageKey(page_rank(staged.a.shape[0]), staged.a.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The forms of all slots at a site; None for an empty slot. Sites that agree share one object."""

    forms: tuple[Form | None, ...]


@dataclass(frozen=True, slots=True)
class Pages:
    """All slots' weights of one key, of padded rank R, at one site; only written slots hold numbers."""

    a: Tensor  # [num_slots, R, in]
    b: Tensor  # [num_slots, out_padded, R], a's dtype

    def write(self, slot: int, a: Tensor, b: Tensor) -> None:
        rank, out = a.shape[0], b.shape[0]
        self.a[slot, :rank].copy_(a, non_blocking=True)
        self.b[slot, :out, :rank].copy_(b, non_blocking=True)
        for padding in (self.a[slot, rank:], self.b[slot, :out, rank:], self.b[slot, out:]):
            if padding.numel():
                padding.zero_()

    @property
    def num_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


class Shelf:
    """One site's part of the bank. Layers keep it for life; only the bank changes it."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype) -> None:
        self.site = site
        self.dtype = dtype  # the bank's: what its products are computed in
        self.pages: dict[PageKey, Pages] = {}
        self.scale: Tensor | None = None  # [num_slots, out] float32, DoRA's; None while nobody has one
        self.forms: list[Form] = [UNTOUCHED] * num_slots
        self.layout = Layout((None,) * num_slots)

    @property
    def num_bytes(self) -> int:
        return sum(pages.num_bytes for pages in self.pages.values()) + (
            0 if self.scale is None else self.scale.nbytes
        )

    def slot_bytes(self, slot: int) -> int:
        form = self.forms[slot]
        if form == UNTOUCHED:
            return 0
        share = self.pages[form.key].num_bytes // len(self.forms)
        return share + (self.site.out_features * 4 if form.is_dora else 0)


def bank_bytes(sites: SiteTable, num_slots: int, max_rank: int, itemsize: int) -> int:
    """What a bank takes once each slot holds ``max_rank`` everywhere in its own dtype. Slots of several ranks or
    dtypes at a site may take more, and where that does not fit the load fails, not the step."""
    rank = page_rank(max_rank)
    return sum(
        num_slots * rank * (site.in_features + _padded_out(site)) * itemsize for site in sites.values()
    )


class SlotBank:
    """``stage`` may be called from any thread, the rest from the engine's only."""

    def __init__(
        self,
        sites: SiteTable,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        keeps_halves: bool = False,
    ) -> None:
        """keeps_halves: in bfloat16 what loses nothing by it; for a float32 bank whose kernel reads both."""
        if num_slots < 1 or max_rank < 1:
            raise ValueError(f"num_slots and max_rank must be at least 1, not {num_slots} and {max_rank}")
        if keeps_halves and dtype != torch.float32:
            raise ValueError(f"a bank of {dtype} has no halves to keep")
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.dtype = dtype
        self.device = device
        self.keeps_halves = keeps_halves
        self._shelves = {name: Shelf(site, num_slots, dtype) for name, site in sites.items()}
        self._loaded = [False] * num_slots
        self._footprints: dict[
            Footprint, Footprint
        ] = {}  # like ones are one object: a thousand adapters have a few
        is_pinned = device.type == "cuda"
        self._stager = Stager(sites, max_rank, dtype, is_pinned=is_pinned, keeps_halves=keeps_halves)

    def connect(self, base_weight: Callable[[str], Tensor]) -> None:
        """Give access to the base's weights, site name -> [out, in] float32: what DoRA's norms are taken of."""
        self._stager.base_weight = base_weight

    def shelf(self, name: str) -> Shelf:
        return self._shelves[name]

    def stage(self, weights: AdapterWeights) -> StagedAdapter:
        """Check against this bank, convert and take DoRA's norms; touches no slot. From any thread.

        Raises AdapterRejected if it does not fit this base or ``max_rank``.
        """
        staged = self._stager.stage(weights)
        return replace(staged, footprint=self._footprint(staged))

    def _footprint(self, staged: StagedAdapter) -> Footprint:
        pages = set()
        for name, part in staged.sites.items():
            site, key = self._shelves[name].site, _key_of(part)
            pages.add(Page(name, key.rank, self._page_bytes(site, key)))
            if part.scale is not None:
                pages.add(Page(name, 0, self.num_slots * site.out_features * 4))
        if len(self._footprints) >= MAX_FOOTPRINTS:
            self._footprints.clear()
        footprint = frozenset(pages)
        return self._footprints.setdefault(footprint, footprint)

    def _page_bytes(self, site: Site, key: PageKey) -> int:
        """As ``_new_pages`` allocates; the room counts by it, and a test compares."""
        return self.num_slots * key.rank * (site.in_features + _padded_out(site)) * key.dtype.itemsize

    def write(self, slot: int, weights: AdapterWeights | StagedAdapter) -> None:
        """Put an adapter into a slot, in place of what was there. If it raises, the slot is empty."""
        for _ in self.writing(slot, weights):
            pass

    def writing(self, slot: int, weights: AdapterWeights | StagedAdapter) -> Generator[int]:
        """As ``write``, a site at a time: yields the bytes just copied (on CUDA launched), once for each of the
        adapter's sites. Nobody sees the slot before the end; if it raises or is closed before, the slot is empty."""
        staged = weights if isinstance(weights, StagedAdapter) else self.stage(weights)
        self._empty(slot)
        try:
            for name, site in staged.sites.items():
                self._write_site(self._shelves[name], slot, site)
                yield site.num_bytes
        except BaseException:
            self.clear(slot)
            raise
        self._loaded[slot] = True
        self._refresh_layouts()

    def _write_site(self, shelf: Shelf, slot: int, staged: StagedSite) -> None:
        key = _key_of(staged)
        pages = shelf.pages.get(key) or self._new_pages(shelf.site, key)
        shelf.pages[key] = pages
        shelf.forms[slot] = Form(key.rank, staged.scale is not None, key.dtype)
        pages.write(slot, staged.a, staged.b)
        if staged.scale is not None:
            if shelf.scale is None:
                shape = (self.num_slots, shelf.site.out_features)
                shelf.scale = torch.empty(shape, dtype=torch.float32, device=self.device)
            shelf.scale[slot].copy_(staged.scale, non_blocking=True)

    def _new_pages(self, site: Site, key: PageKey) -> Pages:
        a = torch.empty((self.num_slots, key.rank, site.in_features), dtype=key.dtype, device=self.device)
        b = torch.empty((self.num_slots, _padded_out(site), key.rank), dtype=key.dtype, device=self.device)
        return Pages(a, b)

    def clear(self, slot: int) -> None:
        """Empty a slot and free what nobody else uses; nothing happens to an empty one."""
        self._empty(slot)
        self._refresh_layouts()

    def _empty(self, slot: int) -> None:
        for shelf in self._shelves.values():
            shelf.forms[slot] = UNTOUCHED
            for key in set(shelf.pages) - {form.key for form in shelf.forms}:
                del shelf.pages[key]
            if not any(form.is_dora for form in shelf.forms):
                shelf.scale = None
        self._loaded[slot] = False

    def _refresh_layouts(self) -> None:
        known: dict[tuple[Form | None, ...], Layout] = {}
        for shelf in self._shelves.values():
            pairs = zip(shelf.forms, self._loaded, strict=True)
            forms = tuple(form if is_loaded else None for form, is_loaded in pairs)
            shelf.layout = known.setdefault(forms, Layout(forms))

    def is_loaded(self, slot: int) -> bool:
        return self._loaded[slot]

    def check_routed(self, slots: Iterable[int]) -> None:
        """Raises ValueError if one of them, other than -1, is no slot of this bank or is empty."""
        for slot in set(slots) - {-1}:
            if slot >= self.num_slots or not self._loaded[slot]:
                raise ValueError(f"rows are routed to slot {slot}, which holds no adapter")

    def slot_bytes(self, slot: int) -> int:
        """Device bytes of a slot's adapter, padding included; 0 if it is empty."""
        return sum(shelf.slot_bytes(slot) for shelf in self._shelves.values())

    @property
    def num_bytes(self) -> int:
        """Device bytes of all pages, those of empty slots in them included."""
        return sum(shelf.num_bytes for shelf in self._shelves.values())
