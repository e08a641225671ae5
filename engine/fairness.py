"""Fairness: in which order sequences with a prompt to compute are looked at, and who gives up a place. Pure.

They are dealt out among their adapters, the one with the fewest decoding first, so that one adapter's flood is one
queue beside the others and not a wall before them; within an adapter, first come, first served. Versions of one name
count each for itself; compositions all as one, since clients choose their weights. Background sequences come when there
is nobody else at all.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq

from adapters.ref import AdapterRef
from engine.sequence import Sequence

Share = tuple[str, int]


def share_of(ref: AdapterRef) -> Share:
    """Whose share of the engine a sequence takes from."""
    return (ref.name, 0) if ref.is_composed else (ref.name, ref.version)


def foreground(sequences: Collection[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if not sequence.request.is_background]


def in_turn(waiting: Collection[Sequence], running: Collection[Sequence]) -> Iterator[Sequence]:
    """Every sequence with a prompt to compute, running or waiting, the most urgent first."""
    prefilling = [s for s in running if not s.is_decoding]
    wanted = foreground(waiting)
    if not wanted and not foreground(running):
        return iter([*prefilling, *waiting])
    counts = Counter(share_of(s.adapter) for s in running if s.is_decoding)
    return _dealt([*prefilling, *wanted], counts)


def has_prompts(waiting: Collection[Sequence], running: Collection[Sequence], max_running: int) -> bool:
    """Whether the next step may hold a piece of a prompt, if nobody ends: somebody is in turn, and has a place or would
    be given one.
    """
    if any(not sequence.is_decoding for sequence in running):
        return True
    wanted = foreground(waiting)
    if len(foreground(running)) >= max_running:
        return any_yields(wanted, running)
    return bool(wanted) or (bool(waiting) and not foreground(running))


def any_yields(newcomers: Collection[Sequence], running: Collection[Sequence]) -> bool:
    """Whether ``who_yields`` names anybody for one of them; ``running`` is not empty."""
    counts = Counter(share_of(s.adapter) for s in running)
    most = max(counts.values())
    return any(most - counts[share] >= 2 for share in {share_of(s.adapter) for s in newcomers})


def who_yields(newcomer: Sequence, running: Seq[Sequence]) -> Sequence | None:
    """Whose place the newcomer may have when all are taken: the youngest of the adapter with the most, if that leaves
    it no fewer than the newcomer's then has.
    """
    counts = Counter(share_of(s.adapter) for s in running)
    richest = max(counts, key=lambda share: counts[share])
    if counts[richest] - counts[share_of(newcomer.adapter)] < 2:
        return None
    return next(s for s in reversed(running) if share_of(s.adapter) == richest)


def _dealt(sequences: Collection[Sequence], counts: Counter[Share]) -> Iterator[Sequence]:
    """One at a time from the queue of whoever has the fewest, counting those already dealt; ties by place."""
    queues: dict[Share, deque[tuple[int, Sequence]]] = {}
    for place, sequence in enumerate(sequences):
        queues.setdefault(share_of(sequence.adapter), deque()).append((place, sequence))
    heap = [(counts[share], queue[0][0], share) for share, queue in queues.items()]
    heapq.heapify(heap)
    while heap:
        count, _, share = heapq.heappop(heap)
        yield queues[share].popleft()[1]
        if queues[share]:
            heapq.heappush(heap, (count + 1, queues[share][0][0], share))
