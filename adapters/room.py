"""Room: the device bytes that the slots' adapters take together, counted before anything is written.

Owns the count and its limit: integers only. An adapter's weights lie in pages, and a page serves every slot: an adapter
costs nothing where a neighbour has pages of its rank already, and the whole page where nobody has. So what one more
adapter takes, and what one that leaves gives back, depends on who is there; and one of a large rank may need the room
of several small ones. The bank says which pages an adapter lies in; its ``num_bytes`` are what is counted here.

Place in a request's way: step 5, asked by the residency before it plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from adapters.errors import InsufficientMemory


class Page(NamedTuple):
    """One block of the bank's memory, shared by all slots."""

    site: str
    rank: int
    """Padded; 0 for DoRA's scales."""
    num_bytes: int


Footprint = frozenset[Page]
"""All pages that one adapter's weights lie in."""


class Room:
    """The residency's alone. ``max_bytes`` None counts and refuses nothing."""

    def __init__(self, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"{max_bytes} bytes hold no adapter; None sets no limit")
        self.max_bytes = max_bytes
        self._footprints: dict[int, Footprint] = {}  # by slot
        self._users: Counter[Page] = Counter()
        self._num_bytes = 0

    @property
    def is_bounded(self) -> bool:
        return self.max_bytes is not None

    @property
    def num_bytes(self) -> int:
        """Of the pages of everyone who entered: what the bank takes once they are written."""
        return self._num_bytes

    def enter(self, slot: int, footprint: Footprint) -> None:
        self._footprints[slot] = footprint
        self._num_bytes += sum(page.num_bytes for page in footprint if not self._users[page])
        self._users.update(footprint)

    def leave(self, slot: int) -> None:
        footprint = self._footprints.pop(slot)
        self._users.subtract(footprint)
        gone = [page for page in footprint if not self._users[page]]
        for page in gone:
            del self._users[page]
        self._num_bytes -= sum(page.num_bytes for page in gone)

    def footprint(self, slot: int) -> Footprint:
        """Of who is in a taken slot."""
        return self._footprints[slot]

    def fits(self, footprint: Footprint, leaving: Iterable[int] = ()) -> bool:
        """Whether one more adapter fits once the slots ``leaving`` are empty."""
        if self.max_bytes is None:
            return True
        left = Counter(page for slot in leaving for page in self._footprints[slot])
        freed = sum(page.num_bytes for page, count in left.items() if count == self._users[page])
        added = sum(page.num_bytes for page in footprint if self._users[page] == left[page])
        return self._num_bytes - freed + added <= self.max_bytes


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why an adapter never fits."""

    num_bytes: int
    num_bytes_with_pinned: int
    max_bytes: int

    def error(self, title: str) -> InsufficientMemory:
        needs = f"adapter {title} takes {self.num_bytes} bytes on the device"
        limit = f"device_adapter_memory allows {self.max_bytes}"
        if self.num_bytes > self.max_bytes:
            return InsufficientMemory(
                f"{needs}, its rank's pages for all slots; {limit}: raise it or lower num_slots"
            )
        return InsufficientMemory(
            f"{needs}, {self.num_bytes_with_pinned} with the pinned ones; {limit}: unpin another or raise it"
        )


def joint_bytes(footprints: Iterable[Footprint]) -> int:
    """What adapters take together, each page counted once."""
    return sum(page.num_bytes for page in frozenset[Page]().union(*footprints))
