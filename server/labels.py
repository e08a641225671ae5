"""AdapterLabels: which adapters have metric series of their own. The most used 64 do; all others share ``other``.

Owns: the choice. Does not know the series: it says when a name leaves. A name comes in with an ``AdapterRef``, which
only the registry makes, so no series is ever created by a client's string. All compositions share one label, since
clients choose their weights.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable

from adapters.ref import COMPOSED, AdapterRef

OTHER = "other"
BASE_LABEL = "base"
MAX_LABELS = 64
MAX_LABEL_CHARS = 2048
"""Of all names together: each character stands in some 60 lines, and a scrape stays under 512 KiB."""
LEAD = 2
"""An adapter takes another's place once it was used more than twice as often: places do not flap."""
HALF_LIFE_USES = 10_000
"""After so many uses all counts are halved, so that yesterday's favourite makes room."""
MAX_REMEMBERED = 1024


class AdapterLabels:
    """Thread-safe. ``on_leave(name)`` is called when a name's series should go."""

    def __init__(self, on_leave: Callable[[str], None]) -> None:
        self._on_leave = on_leave
        self._own: dict[str, AdapterRef] = {}
        self._uses: Counter[str] = Counter()
        self._num_uses = 0
        self._gone: OrderedDict[AdapterRef, None] = OrderedDict()
        self._lock = threading.Lock()

    def label(self, ref: AdapterRef) -> str:
        """The label value for an adapter; never makes a new one."""
        return BASE_LABEL if ref.is_base else self.label_of(ref.name)

    def label_of(self, name: str) -> str:
        if name in (BASE_LABEL, COMPOSED):
            return name
        return name if name in self._own else OTHER

    def refs(self) -> list[AdapterRef]:
        """The adapters with series of their own, as last used."""
        return list(self._own.values())

    def use(self, ref: AdapterRef) -> None:
        """A request for the adapter was born."""
        if ref.is_base or ref.is_composed:
            return
        with self._lock:
            if ref in self._gone:
                return
            self._count(ref.name)
            if ref.name in self._own or self._has_place(ref.name):
                self._own[ref.name] = ref

    def forget(self, ref: AdapterRef) -> None:
        """The adapter was removed: its series go, and requests still in flight count as ``other``."""
        if ref.is_composed:
            return
        with self._lock:
            self._uses.pop(ref.name, None)
            self._gone[ref] = None
            if len(self._gone) > MAX_REMEMBERED:
                self._gone.popitem(last=False)
            if self._own.pop(ref.name, None) is not None:
                self._on_leave(ref.name)

    def welcome(self, ref: AdapterRef) -> None:
        """The adapter was registered (again)."""
        with self._lock:
            self._gone.pop(ref, None)

    def _count(self, name: str) -> None:
        self._uses[name] += 1
        self._num_uses += 1
        if self._num_uses % HALF_LIFE_USES == 0:
            self._uses = Counter({key: count // 2 for key, count in self._uses.items() if count > 1})

    def _has_place(self, name: str) -> bool:
        """Room for one more name, if need be after the least used one has left."""
        if self._fits(name):
            return True
        if not self._own:
            return False
        least = min(self._own, key=lambda other: self._uses[other])
        if self._uses[name] <= LEAD * self._uses[least]:
            return False
        del self._own[least]
        self._on_leave(least)
        return self._fits(name)

    def _fits(self, name: str) -> bool:
        num_chars = sum(map(len, self._own)) + len(name)
        return len(self._own) < MAX_LABELS and num_chars <= MAX_LABEL_CHARS
