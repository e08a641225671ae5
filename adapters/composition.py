"""Composition: several adapters as one, without merging anything: what weighted parts mean, and which can be composed.

Owns the meaning: weights of the same version add up, those that come to 0 leave, one part at weight 1 is that adapter,
and none is the base. The order of naming counts for nothing, so that the same parts share a slot and every cache. Knows
no tensors (``concatenation`` has them) and no names.

Place in a request's way: step 2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters.errors import AdapterError
from adapters.manifest import Kind
from adapters.ref import BASE, COMPOSED, AdapterRef, WeightedRef
from adapters.sites import Part

MAX_PARTS = 8
RANK_FACTOR = 2
"""Ranks of the parts at one linear may come to so many times ``max_rank``: any two adapters can be composed, and the
memory of a slot stays bounded."""
_SEED = "lorikeet composition 1"


class CompositionRejected(AdapterError):
    """These parts cannot be composed, though each may be served alone."""


class Described(Protocol):
    """What is known of a registered version (``validation.PackageReport``)."""

    @property
    def kind(self) -> Kind: ...
    @property
    def rank(self) -> int: ...
    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def parts(self) -> tuple[Part, ...]: ...


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One part of a composition, with what is known of its package."""

    part: WeightedRef
    report: Described


def compose(weighted: Iterable[tuple[AdapterRef, float]]) -> AdapterRef:
    """One ref for all of them; the base adds nothing. Raises CompositionRejected for too many parts.

    Whether their kinds and ranks go together is ``check_composition``'s to say.
    """
    parts = _added_up(weighted)
    if not parts:
        return BASE
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].ref
    if len(parts) > MAX_PARTS:
        raise CompositionRejected(f"{len(parts)} adapters are to be composed; at most {MAX_PARTS} can be")
    return AdapterRef(
        name=COMPOSED,
        version=1,
        digest=_digest(parts, lambda ref: ref.digest),
        vision_digest=_digest(parts, lambda ref: ref.vision_digest),
        language_digest=_digest(parts, lambda ref: ref.language_digest),
        parts=parts,
    )


def _added_up(weighted: Iterable[tuple[AdapterRef, float]]) -> tuple[WeightedRef, ...]:
    by_ref: dict[AdapterRef, list[float]] = {}
    for ref, weight in weighted:
        if not math.isfinite(weight):
            raise CompositionRejected(f"the weight of {ref} is {weight}; weights are finite numbers")
        if not ref.is_base:
            by_ref.setdefault(ref, []).append(weight)
    sums = {ref: math.fsum(weights) for ref, weights in by_ref.items()}
    ordered = sorted(sums, key=lambda ref: (ref.name, ref.version))
    return tuple(WeightedRef(ref, sums[ref]) for ref in ordered if sums[ref] != 0)


def _digest(parts: Sequence[WeightedRef], digest_of: Callable[[AdapterRef], str]) -> str:
    """Of the parts that have one. A single one at weight 1 acts as it does alone, to the bit, and keeps its own."""
    acting = [(digest_of(part.ref), part.weight) for part in parts if digest_of(part.ref)]
    if not acting:
        return ""
    if len(acting) == 1 and acting[0][1] == 1:
        return acting[0][0]
    lines = [_SEED, *(f"{digest} {weight.hex()}" for digest, weight in acting)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_composition(ingredients: Sequence[Ingredient], max_rank: int) -> None:
    """Raises CompositionRejected for what cannot be added up: DoRA, and more rank than a slot takes."""
    _check_kinds(ingredients)
    _check_ranks(ingredients, RANK_FACTOR * max_rank)


def _check_kinds(ingredients: Sequence[Ingredient]) -> None:
    dora = [str(one.part.ref) for one in ingredients if one.report.kind == "dora"]
    if dora:
        raise CompositionRejected(
            f"{', '.join(dora)} uses DoRA, which rescales what all others add: it can be served alone at weight 1, "
            "and neither scaled nor composed"
        )


def _check_ranks(ingredients: Sequence[Ingredient], limit: int) -> None:
    """By linears of one kind: each part counts there with its largest rank."""
    ranks: dict[tuple[Part, str], int] = {}
    for one in ingredients:
        for place in ((part, target) for part in one.report.parts for target in one.report.targets):
            ranks[place] = ranks.get(place, 0) + one.report.rank
    (_, target), rank = max(ranks.items(), key=lambda item: item[1])
    if rank > limit:
        raise CompositionRejected(
            f"the ranks of the composed adapters come to {rank} at {target}; this server allows {limit} "
            f"({RANK_FACTOR} times max_rank): compose fewer, or set max_rank"
        )
