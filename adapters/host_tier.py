"""HostTier: prepared adapters in host memory (pinned beside CUDA), ready to be copied into any slot; bounded in bytes.

Owns the tier HOST: what is kept and who leaves. Knows no slot and no thread; the mover shares it between them.

Place in a request's way: step 5, between the disk and the device.
"""

from __future__ import annotations

from collections import OrderedDict

from adapters.ref import AdapterRef
from adapters.room import Footprint
from adapters.staging import StagedAdapter


class HostTier:
    """Prepared adapters by content digest, in the order of their last use. Not thread-safe.

    The least recently used leaves first, but a scan over many adapters does not wash out those in steady use: up to
    half the bytes are kept for the most recently used that were asked for again since they came.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._staged: OrderedDict[str, StagedAdapter] = OrderedDict()
        self._refs: dict[str, set[AdapterRef]] = {}
        self._steady: set[str] = set()
        self._evicted: list[AdapterRef] = []
        self.num_bytes = 0

    def refs(self) -> frozenset[AdapterRef]:
        return frozenset(ref for digest in self._staged for ref in self._refs[digest])

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref.digest in self._staged

    def footprint(self, ref: AdapterRef) -> Footprint | None:
        staged = self._staged.get(ref.digest)
        return None if staged is None else staged.footprint

    def get(self, ref: AdapterRef) -> StagedAdapter | None:
        staged = self._staged.get(ref.digest)
        if staged is not None:
            self._staged.move_to_end(ref.digest)
            self._refs[ref.digest].add(ref)
            self._steady.add(ref.digest)
        return staged

    def put(self, ref: AdapterRef, staged: StagedAdapter) -> None:
        """Keep it, and let others go for it; one that is larger than the whole tier is not kept."""
        if staged.num_bytes > self._max_bytes:
            return
        self.pop(ref)
        while self.num_bytes + staged.num_bytes > self._max_bytes:
            victim = self._victim()
            self._evicted += self._refs[victim]
            self._drop(victim)
        self.num_bytes += staged.num_bytes
        self._staged[ref.digest] = staged
        self._refs[ref.digest] = {ref}

    def take_evicted(self) -> list[AdapterRef]:
        """Those that had to leave for others since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def pop(self, ref: AdapterRef) -> int:
        """The bytes that it freed."""
        return self._drop(ref.digest) if ref.digest in self._staged else 0

    def _drop(self, digest: str) -> int:
        num_bytes = self._staged.pop(digest).num_bytes
        del self._refs[digest]
        self._steady.discard(digest)
        self.num_bytes -= num_bytes
        return num_bytes

    def _victim(self) -> str:
        sheltered = self._sheltered()
        return next((digest for digest in self._staged if digest not in sheltered), next(iter(self._staged)))

    def _sheltered(self) -> set[str]:
        kept, num_bytes = set(), 0
        for digest in reversed(self._staged):
            if digest in self._steady and num_bytes + self._staged[digest].num_bytes <= self._max_bytes // 2:
                kept.add(digest)
                num_bytes += self._staged[digest].num_bytes
        return kept
