"""Leases: who is using which version now, so that its bytes outlive its name.

Owns the counts, and one hold on the store for each package in use. Does not know whether a version still has a name;
the registry says so, and is told when a package's last lease goes.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from adapters.errors import AdapterNotFound
from adapters.ref import AdapterRef
from adapters.store import Hold, PackageStore

Key = TypeVar("Key")


class Lease:
    """A claim on one version. Release it once or often; or use it in a ``with``."""

    def __init__(self, ref: AdapterRef, release: Callable[[AdapterRef], None]) -> None:
        self.ref = ref
        self._release = release
        self._lock = threading.Lock()
        self._is_released = False

    def release(self) -> None:
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
        self._release(self.ref)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class LeaseBook:
    """Thread-safe. ``on_last_release`` gets the digest, outside the book's lock."""

    def __init__(self, store: PackageStore, on_last_release: Callable[[str], None]) -> None:
        self._store = store
        self._on_last_release = on_last_release
        self._lock = threading.Lock()
        self._by_ref: Counter[AdapterRef] = Counter()
        self._by_digest: Counter[str] = Counter()
        self._holds: dict[str, Hold] = {}
        self._last_used_s: dict[AdapterRef, float] = {}

    def take(self, ref: AdapterRef, *, is_live: bool) -> Lease:
        """Raises AdapterNotFound unless the version is known, or leased already by another part of the same request."""
        if ref.is_base:
            return Lease(ref, lambda ref: None)
        with self._lock:
            if not is_live and ref not in self._by_ref:
                raise AdapterNotFound(str(ref))
            if ref.digest not in self._holds:
                self._holds[ref.digest] = self._hold(ref)
            self._by_ref[ref] += 1
            self._by_digest[ref.digest] += 1
            self._last_used_s[ref] = time.time()
        return Lease(ref, self._give_back)

    def usage(self, ref: AdapterRef) -> tuple[int, float | None]:
        """Leases now, and the Unix time of the last one."""
        return self._by_ref[ref], self._last_used_s.get(ref)

    def is_held(self, digest: str) -> bool:
        return digest in self._holds

    def forget(self, digest: str) -> None:
        """The package is gone: so is the memory of when it was used."""
        with self._lock:
            self._last_used_s = {
                ref: used_s for ref, used_s in self._last_used_s.items() if ref.digest != digest
            }

    def close(self) -> None:
        """Drop every hold: the process is done with the store. Leases released later do nothing."""
        with self._lock:
            while self._holds:
                self._holds.popitem()[1].release()
            self._by_ref.clear()
            self._by_digest.clear()

    def _hold(self, ref: AdapterRef) -> Hold:
        try:
            return self._store.hold(ref.digest)
        except FileNotFoundError:
            raise AdapterNotFound(str(ref)) from None

    def _give_back(self, ref: AdapterRef) -> None:
        with self._lock:
            if ref not in self._by_ref:
                return  # closed meanwhile
            _decrement(self._by_ref, ref)
            is_last = _decrement(self._by_digest, ref.digest)
            if is_last:
                self._holds.pop(ref.digest).release()
        if is_last:
            self._on_last_release(ref.digest)


def _decrement(counter: Counter[Key], key: Key) -> bool:
    counter[key] -= 1
    if counter[key]:
        return False
    del counter[key]
    return True
