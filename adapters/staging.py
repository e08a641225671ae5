"""Staging: one adapter made ready for any slot of a bank, on any thread; what is left to do is to copy it.

Owns the checks of last resort (does it fit this base and ``max_rank``), the bank's dtype, what loses nothing in half of
it, and DoRA's norms, which need the base's weights. Knows no slot. The registry has validated the package long before;
what it promised is checked again here because a wrong shape would end in another request's numbers.

Place in a request's way: step 5, between the mover's read and its copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.composition import RANK_FACTOR
from adapters.errors import AdapterRejected, RejectReason
from adapters.profile import Proof
from adapters.room import Footprint
from adapters.sites import SiteTable
from adapters.weights import AdapterWeights, SiteWeights

NORM_ROWS = 1024
"""DoRA's norms are taken over as many rows at once: bounds the memory of B @ A."""


@dataclass(frozen=True, slots=True)
class StagedSite:
    a: Tensor  # [R, in] the bank's dtype, on the host; or bfloat16 in a bank that keeps halves
    b: Tensor  # [out, R] a's dtype, on the host
    scale: Tensor | None  # [out] float32, DoRA's magnitude over the norms; None for plain LoRA

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.a, self.b, self.scale) if tensor is not None)


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    sites: Mapping[str, StagedSite]
    proof: Proof | None = None
    """Carried along for whoever proves it on the device."""
    footprint: Footprint = frozenset()
    """The bank's pages that it will lie in."""

    @property
    def num_bytes(self) -> int:
        return sum(site.num_bytes for site in self.sites.values())


class Stager:
    def __init__(
        self, sites: SiteTable, max_rank: int, dtype: torch.dtype, *, is_pinned: bool, keeps_halves: bool
    ) -> None:
        self._sites = sites
        self._max_rank = max_rank
        self._dtype = dtype
        self._is_pinned = is_pinned
        self._keeps_halves = keeps_halves
        self.base_weight: Callable[[str], Tensor] | None = None

    def stage(self, weights: AdapterWeights) -> StagedAdapter:
        """Raises AdapterRejected; shares memory with ``weights`` where nothing has to be converted."""
        max_rank = self._max_rank * min(weights.num_parts, RANK_FACTOR)
        sites = {name: self._stage_site(name, site, max_rank) for name, site in weights.sites.items()}
        return StagedAdapter(sites, weights.proof)

    def _stage_site(self, name: str, weights: SiteWeights, max_rank: int) -> StagedSite:
        self._check(name, weights, max_rank)
        scale = None
        if weights.magnitude is not None:
            scale = self._pinned(self._dora_scale(name, weights, weights.magnitude))
        dtype = self._kept_dtype(weights)
        return StagedSite(self._ready(weights.a, dtype), self._ready(weights.b, dtype), scale)

    def _check(self, name: str, weights: SiteWeights, max_rank: int) -> None:
        site = self._sites.get(name)
        if site is None:
            raise AdapterRejected(RejectReason.UNKNOWN_KEYS, f"this base has no linear {name}", (name,))
        rank = weights.a.shape[0]
        if rank > max_rank:
            reason = f"rank {rank} at {name}; this server allows {max_rank} (set max_rank or retrain)"
            raise AdapterRejected(RejectReason.RANK_TOO_LARGE, reason, (name,))
        if weights.a.shape != (rank, site.in_features) or weights.b.shape != (site.out_features, rank):
            found = f"A {tuple(weights.a.shape)} and B {tuple(weights.b.shape)}"
            reason = f"{name} takes [R, {site.in_features}] and [{site.out_features}, R], not {found}"
            raise AdapterRejected(RejectReason.BAD_SHAPE, reason, (name,))
        if weights.magnitude is not None and weights.magnitude.shape != (site.out_features,):
            reason = (
                f"{name} takes a magnitude of [{site.out_features}], not {tuple(weights.magnitude.shape)}"
            )
            raise AdapterRejected(RejectReason.BAD_SHAPE, reason, (name,))

    def _kept_dtype(self, weights: SiteWeights) -> torch.dtype:
        is_half = self._keeps_halves and is_bfloat16(weights.a) and is_bfloat16(weights.b)
        return torch.bfloat16 if is_half else self._dtype

    def _ready(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return self._pinned(tensor.to(dtype).contiguous())

    def _pinned(self, tensor: Tensor) -> Tensor:
        """Beside CUDA: a copy of pageable memory would have the host wait for all that its stream waits for."""
        return tensor.pin_memory() if self._is_pinned else tensor

    def _dora_scale(self, name: str, weights: SiteWeights, magnitude: Tensor) -> Tensor:
        """[out] float32: magnitude / ||W + B A|| by row of W, PEFT's ``DoraLinearLayer.get_weight_norm``."""
        if self.base_weight is None:
            raise RuntimeError("DoRA needs the base's weights: attach the bank to a model first")
        base = self.base_weight(name)  # [out, in] float32
        a, b = weights.a.to(base.device), weights.b.to(base.device)
        norms = [
            torch.linalg.norm(base[i : i + NORM_ROWS] + b[i : i + NORM_ROWS] @ a, dim=1)
            for i in range(0, base.shape[0], NORM_ROWS)
        ]
        return magnitude.float() / torch.cat(norms).to(magnitude.device)


def is_bfloat16(numbers: Tensor) -> bool:
    """Whether bfloat16 holds [rows, columns] float32 to the bit; where not, the first row nearly always settles it."""
    return _are_low_bits_zero(numbers[:1]) and _are_low_bits_zero(numbers)


def _are_low_bits_zero(numbers: Tensor) -> bool:
    return int((numbers.view(torch.int32) & 0xFFFF).amax()) == 0
