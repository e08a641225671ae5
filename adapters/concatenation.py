"""Concatenation: the weights of a composition, made of its parts' without merging anything into the base.

At each site the parts' A are stacked along the rank and their B stand side by side, each times its part's weight, so
that ``B @ A`` is the weighted sum of what the parts add: PEFT's ``add_weighted_adapter(combination_type="cat")``. A
site that one part alone touches keeps that part's rank. Knows no slots.

Place in a request's way: step 5, under the mover's read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapters.errors import AdapterRejected, RejectReason
from adapters.ref import AdapterRef
from adapters.weights import AdapterWeights, SiteWeights

Read = Callable[[AdapterRef], AdapterWeights]


@dataclass(frozen=True, slots=True)
class ComposingReader:
    """``read``, which reads registered versions, made to read compositions of them too. Any thread."""

    read: Read

    def __call__(self, ref: AdapterRef) -> AdapterWeights:
        """Raises what ``read`` raises, and AdapterRejected for parts that cannot be added up."""
        if not ref.is_composed:
            return self.read(ref)
        return concatenate([(self.read(part.ref), part.weight) for part in ref.parts], ref.digest)


def concatenate(parts: Sequence[tuple[AdapterWeights, float]], digest: str) -> AdapterWeights:
    """The weighted sum of ``parts``, as one adapter whose rank at a site is the sum of theirs there.

    Raises AdapterRejected (``unsupported_kind``) for a part with DoRA's magnitudes.
    """
    scaled: dict[str, list[SiteWeights]] = {}
    for weights, weight in parts:
        for name, site in weights.sites.items():
            scaled.setdefault(name, []).append(_scaled(name, site, weight))
    sites = {name: _side_by_side(found) for name, found in scaled.items()}
    return AdapterWeights(
        sites=sites,
        num_bytes=sum(site.num_bytes for site in sites.values()),
        max_rank=max(site.a.shape[0] for site in sites.values()),
        digest=digest,
        num_parts=len(parts),
    )


def _scaled(name: str, site: SiteWeights, weight: float) -> SiteWeights:
    if site.magnitude is not None:
        raise AdapterRejected(
            RejectReason.UNSUPPORTED_KIND, f"{name} uses DoRA, which cannot be scaled or composed", (name,)
        )
    return SiteWeights(site.a, site.b * weight, None)


def _side_by_side(found: Sequence[SiteWeights]) -> SiteWeights:
    if len(found) == 1:
        return found[0]
    a = torch.cat([site.a for site in found], dim=0)  # [sum of R, in]
    b = torch.cat([site.b for site in found], dim=1)  # [out, sum of R]
    return SiteWeights(a, b, None)
