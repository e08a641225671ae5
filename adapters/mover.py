"""Mover: carries out the residency's moves: reads adapters on its own threads, keeps the host tier, writes slots.

Owns the reads under way, and shares the host tier's bytes between the threads. Decides
nothing: which adapter goes into which slot is the residency's. One read serves all who want the same content.

Reads run beside the steps. Copies into slots are launched in ``finished``, at a step's boundary: a slice of it where
sequences run. On a CPU that is what a step waits for; on CUDA they run beside the steps, and a later ``finished`` finds
them over.

Place in a request's way: step 5.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from adapters.copies import Copies, Ready, translate
from adapters.errors import AdapterError
from adapters.host_tier import HostTier
from adapters.lane import Lane, lane_of
from adapters.moves import Evict, Load, Move, Moved, MoveFailed, Tier
from adapters.ref import AdapterRef
from adapters.room import Footprint
from adapters.slots import SlotBank
from adapters.staging import StagedAdapter
from adapters.weights import AdapterWeights


@dataclass(slots=True)
class _Read:
    """One read under way, and the loads that wait for it."""

    begin_s: float
    loads: list[Load] = field(default_factory=list)
    prefetches: list[AdapterRef] = field(default_factory=list)
    """Those who asked for it before they have a slot; what came of it is told by ``take_prefetched``."""
    keeps: bool = True  # False once its content was forgotten: it then passes the host tier by


class Mover:
    """The engine thread's; only the host tier's figures and ``prefetch`` are anyone's."""

    def __init__(
        self,
        bank: SlotBank,
        read: Callable[[AdapterRef], AdapterWeights],
        host_bytes: int,
        on_ready: Callable[[], None],
        num_threads: int = 2,
        lane: Lane | None = None,
    ) -> None:
        """read is called from the mover's threads, and so is on_ready: ``finished`` has something to return.

        lane: where copies run; by default the bank's device's.
        """
        self._bank = bank
        self._read = read
        self._on_ready = on_ready
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(
            num_threads,
            thread_name_prefix="lorikeet-mover",
            # until it asks, a thread's products have all processors, whatever the process set as the default
            initializer=torch.get_num_threads,
        )
        self._lock = threading.Lock()  # guards the five below; never held while reading or copying
        self._host = HostTier(host_bytes)
        self._reads: dict[str, _Read] = {}
        self._ready: list[Ready] = []
        self._prefetched: dict[AdapterRef, Footprint | AdapterError] = {}
        self._ahead_s: dict[str, float] = {}
        """Seconds of reads ahead whose load has not come yet: it reports them as its own."""
        self._loading: dict[int, Load] = {}  # by slot; this and the next are the engine's thread's only
        self._copies = Copies(bank, lane or lane_of(bank.device))

    # ---- the engine's thread -----------------------------------------------------------------------------------

    def start(self, moves: Sequence[Move]) -> None:
        """Carry out in order: an Evict empties its slot now, a Load begins and ends in a later ``finished``.

        Raises ValueError for a move that contradicts one under way or a slot's content.
        """
        for move in moves:
            if move.slot in self._loading:
                raise ValueError(f"slot {move.slot} is loading {self._loading[move.slot].ref}: {move}")
            if isinstance(move, Evict):
                self._bank.clear(move.slot)
                continue
            if self._bank.is_loaded(move.slot):
                raise ValueError(f"slot {move.slot} is not empty: {move}")
            self._loading[move.slot] = move
            self._begin(move)

    def _begin(self, load: Load) -> None:
        with self._lock:
            staged = self._host.get(load.ref)
            if staged is not None:
                read_s = self._ahead_s.pop(load.ref.digest, 0.0)
                self._ready.append(Ready(load, staged, read_s, Tier.HOST))
        if staged is not None:
            self._on_ready()
        else:
            self._fetch(load.ref, load)

    def prefetch(self, ref: AdapterRef) -> bool:
        """Bring an adapter to the host tier in the background; False while as many reads as threads are under way.

        How it ended is told once, by ``take_prefetched``.
        """
        with self._lock:
            if ref.digest not in self._reads and len(self._reads) >= self._num_threads:
                return False
        self._fetch(ref, None)
        return True

    def take_prefetched(self) -> dict[AdapterRef, Footprint | AdapterError]:
        """Prefetches that ended since the last call: where they will lie, or the error of those that failed."""
        with self._lock:
            ended, self._prefetched = self._prefetched, {}
        return ended

    def _fetch(self, ref: AdapterRef, load: Load | None) -> None:
        """Join the read of this content that is under way, or begin one."""
        with self._lock:
            is_new = ref.digest not in self._reads
            read = self._reads.setdefault(ref.digest, _Read(time.monotonic()))
            if load is not None:
                read.loads.append(load)
            else:
                read.prefetches.append(ref)
        if is_new:
            future = self._threads.submit(self._read_and_stage, ref)
            future.add_done_callback(lambda done: self._end_read(ref, done))

    def finished(self, max_bytes: int | None = None) -> list[Moved | MoveFailed]:
        """Write what is ready into its slots, in the order of becoming ready, and return what ended with it.

        ``max_bytes`` are copied at most, and the site that passes them; the rest is left to the next call, and so is
        what is launched and not over. None: all ends, and the next step is ordered behind it.
        """
        with self._lock:
            ready, self._ready = self._ready, []
        self._copies.add(ready)
        results = self._copies.advance(max_bytes)
        for result in results:
            del self._loading[result.move.slot]
        return results

    @property
    def is_copying(self) -> bool:
        """Whether ``finished`` has left something to its next call."""
        return self._copies.is_busy

    def forget(self, ref: AdapterRef) -> int:
        """Free the adapter's copy on the host; returns its bytes. A read under way will not be kept either."""
        with self._lock:
            if ref.digest in self._reads:
                self._reads[ref.digest].keeps = False
            self._ahead_s.pop(ref.digest, None)
            return self._host.pop(ref)

    def close(self) -> None:
        """Drop the reads that have not begun and wait for those that have. Loads under way are never finished."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    # ---- the mover's threads -----------------------------------------------------------------------------------

    def _read_and_stage(self, ref: AdapterRef) -> StagedAdapter:
        return self._bank.stage(self._read(ref))

    def _end_read(self, ref: AdapterRef, done: Future[StagedAdapter]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        outcome = done.result() if error is None else translate(ref, error)
        with self._lock:
            read = self._reads.pop(ref.digest)
            if isinstance(outcome, StagedAdapter) and read.keeps:
                self._host.put(ref, outcome)
            told = outcome if isinstance(outcome, AdapterError) else outcome.footprint
            self._prefetched |= dict.fromkeys(read.prefetches, told)
            read_s = time.monotonic() - read.begin_s
            if not read.loads and ref in self._host:
                self._ahead_s[ref.digest] = read_s
            self._ready += [Ready(load, outcome, read_s, Tier.DISK) for load in read.loads]
        self._on_ready()

    # ---- any thread --------------------------------------------------------------------------------------------

    @property
    def host_num_bytes(self) -> int:
        with self._lock:
            return self._host.num_bytes

    def host_refs(self) -> frozenset[AdapterRef]:
        with self._lock:
            return self._host.refs()

    def take_evicted_from_host(self) -> list[AdapterRef]:
        with self._lock:
            return self._host.take_evicted()

    def footprint(self, ref: AdapterRef) -> Footprint | None:
        """Where it will lie on the device; None unless it is on the host. Does not count as a use."""
        with self._lock:
            return self._host.footprint(ref)

    def is_on_host(self, ref: AdapterRef) -> bool:
        with self._lock:
            return ref in self._host
