"""Residency: which adapter is in which device slot, and which comes and goes next.

Owns the tier DEVICE, its bytes (``Room``), pins and holds: integers and refs, no tensors. Decides and does not act:
``plan`` returns moves, the mover carries them out, and its results come back through ``settle``. The engine's thread
only.

A slot's life: free -> loading (planned, nobody may use it) -> resident (visible at a step boundary) -> free. A held
slot (sequences run on it), a pinned one, one that is loading and one that is asked for in the same plan never leave. Of
the rest the least recently used leaves, with one exception that keeps a scan over many adapters from washing out those
in steady use: up to half the slots are kept for the most recently used adapters that were held twice or more since they
came; they leave only when nothing else can.

Where the room has a limit, as many leave as the newcomer's bytes need, and nobody when that would not be enough.

Place in a request's way: step 5, where a sequence whose adapter is not on the device waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from adapters.errors import AdapterBusy
from adapters.moves import Evict, Load, Move, Moved, MoveFailed
from adapters.ref import AdapterRef
from adapters.room import Footprint, Room, Shortage, joint_bytes


@dataclass(frozen=True, slots=True)
class Resident:
    slot: int
    ref: AdapterRef
    is_pinned: bool
    num_holds: int
    num_uses: int
    """Holds since it came, past ones included."""


@dataclass(slots=True)
class _Seat:
    """What is known of one taken slot."""

    slot: int
    is_resident: bool = False
    num_holds: int = 0
    num_uses: int = 0  # holds since it came
    last_used: int = 0  # tick


class Residency:
    def __init__(self, num_slots: int, room: Room | None = None) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; at least one slot is needed to serve adapters")
        self._num_slots = num_slots
        self._room = room or Room()
        self._footprints: Mapping[AdapterRef, Footprint] = {}  # of those who were last asked for
        self._seats: dict[AdapterRef, _Seat] = {}
        self._pins: set[AdapterRef] = set()
        self._clock = itertools.count(1)
        self._revision = 0

    @property
    def revision(self) -> int:
        """Another number whenever ``residents`` or ``loading`` may answer otherwise than before."""
        return self._revision

    # ---- deciding ----------------------------------------------------------------------------------------------

    def plan(
        self,
        wanted: Sequence[AdapterRef],
        ready: Mapping[AdapterRef, Footprint] | None = None,
    ) -> tuple[Move, ...]:
        """Moves that bring as many of ``wanted`` (most urgent first) to the device as can come; () when none can.

        ``ready`` holds those that can come at once, with the pages that they will take; None says that all can, and
        that their bytes do not count. Nobody leaves for another one, which takes a free slot only, and where the room
        is bounded waits until its bytes are known. The first that does not fit ends the plan: smaller ones do not
        overtake it, or it would wait for ever.
        From here on the slots of the returned loads count as taken: call it again with the same refs and it returns
        nothing. The mover gets all moves, in order; an Evict stands before the Load into its slot.
        """
        moves: list[Move] = []
        keep = set(wanted)
        self._footprints = ready or {}
        for ref in dict.fromkeys(wanted):
            if ref.is_base or ref in self._seats:
                continue
            is_ready = ready is None or ref in ready
            if not is_ready and (self._room.is_bounded or not self._free_slots()):
                continue
            victims = self._victims(ref, keep)
            if victims is None:
                break
            moves += [self._vacate(victim) for victim in victims]
            moves.append(self._seat(ref))
        self._revision += bool(moves)
        return tuple(moves)

    def _victims(self, ref: AdapterRef, keep: Collection[AdapterRef]) -> list[AdapterRef] | None:
        """Who leaves for it, the least missed first; None when all that may leave are not enough."""
        sheltered = self._sheltered()
        candidates = [other for other in self._seats if other not in keep and self._may_leave(other)]
        candidates.sort(key=lambda other: (other in sheltered, self._seats[other].last_used))
        for count in range(len(candidates) + 1):
            if self.fits(ref, candidates[:count]):
                return self._needed(ref, candidates[:count])
        return None

    def _needed(self, ref: AdapterRef, victims: list[AdapterRef]) -> list[AdapterRef]:
        """Without those whose leaving frees too little to matter: pages that others use too."""
        for spared in victims[::-1]:
            others = [victim for victim in victims if victim is not spared]
            if self.fits(ref, others):
                victims = others
        return victims

    def fits(self, ref: AdapterRef, leaving: Collection[AdapterRef] = ()) -> bool:
        """Whether it has a slot and room for its bytes, as far as they are known, once ``leaving`` are gone."""
        slots = [self._seats[other].slot for other in leaving]
        has_slot = len(self._seats) - len(slots) < self._num_slots
        return has_slot and self._room.fits(self._footprints.get(ref, frozenset()), slots)

    def _seat(self, ref: AdapterRef) -> Load:
        slot = min(self._free_slots())
        self._seats[ref] = _Seat(slot)
        self._room.enter(slot, self._footprints.get(ref, frozenset()))
        return Load(ref, slot)

    def _vacate(self, ref: AdapterRef) -> Evict:
        slot = self._seats.pop(ref).slot
        self._room.leave(slot)
        return Evict(ref, slot)

    def _may_leave(self, ref: AdapterRef) -> bool:
        seat = self._seats[ref]
        return seat.is_resident and seat.num_holds == 0 and ref not in self._pins

    def _sheltered(self) -> frozenset[AdapterRef]:
        """The adapters in steady use: at most half the slots."""
        steady = [ref for ref, seat in self._seats.items() if seat.num_uses > 1]
        steady.sort(key=lambda ref: self._seats[ref].last_used, reverse=True)
        return frozenset(steady[: self._num_slots // 2])

    def _free_slots(self) -> set[int]:
        return set(range(self._num_slots)) - {seat.slot for seat in self._seats.values()}

    def settle(self, result: Moved | MoveFailed) -> None:
        """Make a finished load visible, or forget a failed one. A failed ref is loaded again only if asked for again.

        Raises ValueError for a load that this residency did not plan or has already settled.
        """
        seat = self._seats.get(result.move.ref)
        if seat is None or seat.is_resident or seat.slot != result.move.slot:
            raise ValueError(f"{result.move.ref} is not loading into slot {result.move.slot}")
        self._revision += 1
        if isinstance(result, MoveFailed):
            self._vacate(result.move.ref)
            return
        seat.is_resident = True
        seat.last_used = next(self._clock)

    def drop(self, ref: AdapterRef) -> Evict | None:
        """Free the adapter's slot and its pin, for an unload; None if it has no slot.

        Raises AdapterBusy while sequences hold it or its load is under way.
        """
        seat = self._seats.get(ref)
        if seat is not None and (seat.num_holds or not seat.is_resident):
            raise AdapterBusy(ref.title, seat.num_holds)
        self._revision += 1
        self._pins.discard(ref)
        return None if seat is None else self._vacate(ref)

    # ---- holds and pins ----------------------------------------------------------------------------------------

    def hold(self, ref: AdapterRef) -> int:
        """Keep a resident adapter in its slot, which is returned, until as many ``release`` calls."""
        seat = self._resident_seat(ref)
        self._revision += 1
        seat.num_holds += 1
        seat.num_uses += 1
        seat.last_used = next(self._clock)
        return seat.slot

    def release(self, ref: AdapterRef) -> None:
        seat = self._resident_seat(ref)
        if seat.num_holds == 0:
            raise ValueError(f"{ref} is released more often than held")
        self._revision += 1
        seat.num_holds -= 1
        seat.last_used = next(self._clock)

    def _resident_seat(self, ref: AdapterRef) -> _Seat:
        seat = self._seats.get(ref)
        if seat is None or not seat.is_resident:
            raise ValueError(f"{ref} is not resident")
        return seat

    def pin(self, ref: AdapterRef) -> None:
        """Never evict it. It may be pinned before it comes, and stays pinned until ``unpin`` or ``drop``."""
        self._revision += 1
        self._pins.add(ref)

    def unpin(self, ref: AdapterRef) -> None:
        self._revision += 1
        self._pins.discard(ref)

    # ---- asking ------------------------------------------------------------------------------------------------

    def slot_of(self, ref: AdapterRef) -> int | None:
        """None unless resident, that is, visible to new sequences."""
        seat = self._seats.get(ref)
        return seat.slot if seat is not None and seat.is_resident else None

    def num_holds(self, ref: AdapterRef) -> int:
        seat = self._seats.get(ref)
        return 0 if seat is None else seat.num_holds

    def is_loading(self, ref: AdapterRef) -> bool:
        seat = self._seats.get(ref)
        return seat is not None and not seat.is_resident

    def has_seat(self, ref: AdapterRef) -> bool:
        """Whether a slot is taken for it, be it loading or resident."""
        return ref in self._seats

    def can_ever_load(self, ref: AdapterRef) -> bool:
        """Whether waiting can help: it has a slot already, or some slot is not pinned."""
        return ref in self._seats or sum(other in self._pins for other in self._seats) < self._num_slots

    def shortage(self, ref: AdapterRef, footprint: Footprint) -> Shortage | None:
        """Why it never fits, however many leave: its own bytes, or those with what is pinned, pass the limit."""
        if ref in self._seats or self._room.max_bytes is None:
            return None
        pinned = [
            self._room.footprint(seat.slot) for other, seat in self._seats.items() if other in self._pins
        ]
        num_bytes = joint_bytes([footprint, *pinned])
        if num_bytes <= self._room.max_bytes:
            return None
        return Shortage(joint_bytes([footprint]), num_bytes, self._room.max_bytes)

    def residents(self) -> tuple[Resident, ...]:
        """By slot."""
        return tuple(
            Resident(seat.slot, ref, ref in self._pins, seat.num_holds, seat.num_uses)
            for ref, seat in self._by_slot()
            if seat.is_resident
        )

    def loading(self) -> tuple[Load, ...]:
        """By slot."""
        return tuple(Load(ref, seat.slot) for ref, seat in self._by_slot() if not seat.is_resident)

    def _by_slot(self) -> list[tuple[AdapterRef, _Seat]]:
        return sorted(self._seats.items(), key=lambda item: item[1].slot)
