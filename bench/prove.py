"""Prove: the items that the engine must show on two cores, by number; each gives claims, or says why it could not.

Owns the list, its order and how long each item takes. An item that fails does not end the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.cells import NothingMeasured, Tell
from bench.claims import Proof, not_measured
from bench.peers import PeerFailed
from bench.proofs.bed import Bed
from bench.proofs.crowd import prove_crowd
from bench.proofs.lora import prove_lora
from bench.proofs.neighbours import prove_flood, prove_long_prompt
from bench.proofs.peers import prove_peers
from bench.proofs.sharing import prove_pictures, prove_prefix
from bench.serving import ServerDied


@dataclass(frozen=True, slots=True)
class Item:
    number: int
    about: str
    fixed_s: float
    """Starting, warming up; and a pair of all its runs: on two quiet AVX2 cores at the 0.5B-like shape."""
    pair_s: float
    prove: Callable[[Bed], Proof]

    def seconds(self, num_pairs: int) -> float:
        return self.fixed_s + num_pairs * self.pair_s


ITEMS = (
    Item(1, "what adapters cost", 40, 40, prove_lora),
    Item(2, "peers on the same weights and calls", 150, 260, prove_peers),
    Item(3, "a thousand adapters, and four times the slots", 100, 24, prove_crowd),
    Item(4, "one picture, eight adapters", 20, 8, prove_pictures),
    Item(5, "a shared system prompt", 5, 4, prove_prefix),
    Item(6, "a long prompt beside eight streams", 10, 22, prove_long_prompt),
    Item(7, "a flood on one adapter", 10, 10, prove_flood),
)


def chosen(text: str | None) -> tuple[Item, ...]:
    """From numbers with commas between; None is all. Raises ValueError for one that is not there."""
    if text is None:
        return ITEMS
    known = {str(item.number): item for item in ITEMS}
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"no item {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(known[word] for word in dict.fromkeys(words))


def estimate(items: Sequence[Item], num_pairs: int) -> str:
    """How long it will take, by item, in words."""
    parts = [f"{item.number}: {item.seconds(num_pairs) / 60:.1f} min" for item in items]
    whole = sum(item.seconds(num_pairs) for item in items) / 60
    return f"about {whole:.0f} minutes on two quiet cores ({', '.join(parts)})"


def prove(
    bed: Bed, items: Sequence[Item], keep: Callable[[list[dict[str, object]]], None]
) -> list[dict[str, object]]:
    """The cells of all items; ``keep`` gets those so far after each, so that a run cut short has left something."""
    cells: list[dict[str, object]] = []
    try:
        for item in items:
            bed.tell(f"item {item.number}: {item.about}")
            cells += _cells(item, bed, bed.tell)
            keep(cells)
    finally:
        bed.close()
    return cells


def _cells(item: Item, bed: Bed, tell: Tell) -> list[dict[str, object]]:
    try:
        proof = item.prove(bed)
    except (NothingMeasured, PeerFailed, ServerDied, ValueError, OSError) as error:
        tell(f"item {item.number} gave nothing: {error}")
        return [not_measured(item.number, item.about, str(error))]
    for claim in proof.claims:
        tell(f"{claim.name}: {claim.measured:.3f}")
    return proof.as_cells(item.number, item.about)
