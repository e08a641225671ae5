"""Fairness: in which order waiting sequences are looked at. Decides only; pure.

First come, first served, while nobody waits long: that keeps adapters together. Sequences that have waited longer are
dealt out among their adapters, the one with the fewest running first, so that one adapter's flood is one queue beside
the others and not a wall before them. Versions of one name count each for itself; compositions all as one, since
clients choose their weights. Background sequences come when there is nobody else at all.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection

from adapters.ref import AdapterRef
from engine.sequence import Sequence

Share = tuple[str, int]


def share_of(ref: AdapterRef) -> Share:
    """Whose share of the engine a sequence takes from."""
    return (ref.name, 0) if ref.is_composed else (ref.name, ref.version)


def foreground(sequences: Collection[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if not sequence.request.is_background]


def in_turn(
    waiting: Collection[Sequence], running: Collection[Sequence], now: float, ageing_s: float
) -> list[Sequence]:
    """Every waiting sequence that may start now, the most urgent first."""
    wanted = foreground(waiting)
    if not wanted:
        return [] if foreground(running) else list(waiting)
    aged = [s for s in wanted if now - s.request.arrival_s >= ageing_s]
    if len({share_of(s.adapter) for s in wanted}) < 2 or not aged:
        return wanted
    fresh = [s for s in wanted if now - s.request.arrival_s < ageing_s]
    return _dealt(aged, Counter(share_of(s.adapter) for s in running)) + fresh


def _dealt(aged: list[Sequence], counts: Counter[Share]) -> list[Sequence]:
    """One at a time from the queue of whoever has the fewest, counting those already dealt; ties by age."""
    queues: dict[Share, deque[tuple[int, Sequence]]] = {}
    for place, sequence in enumerate(aged):
        queues.setdefault(share_of(sequence.adapter), deque()).append((place, sequence))
    heap = [(counts[share], queue[0][0], share) for share, queue in queues.items()]
    heapq.heapify(heap)
    dealt = []
    while heap:
        count, _, share = heapq.heappop(heap)
        dealt.append(queues[share].popleft()[1])
        if queues[share]:
            heapq.heappush(heap, (count + 1, queues[share][0][0], share))
    return dealt
