"""VisionStore: what a frozen tower made of each picture, kept in host memory within a budget of bytes.

A tower that does not learn gives the same for the same picture, epoch after epoch, so each is computed once. Owns:
the budget and who leaves first (least recently used). Does not know: towers, which weights an entry came from; whoever
changes those calls ``clear``. Place in a training run: under the pictures of a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

_CPU = torch.device("cpu")


class VisionStore:
    """Tensors by key, at most ``max_bytes`` of them. For one thread."""

    def __init__(self, max_bytes: int) -> None:
        """0 keeps nothing."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, device: torch.device) -> Tensor | None:
        """A copy on ``device`` (on the CPU the entry itself: do not write into it)."""
        found = self._kept.get(key)
        if found is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._kept.move_to_end(key)
        return found.to(device)

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep ``value`` if it fits the budget at all; the least recently used make room."""
        if value.nbytes > self.max_bytes or key in self._kept:
            return
        self._kept[key] = value.detach().to(_CPU)
        self.num_bytes += value.nbytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= dropped.nbytes

    def clear(self) -> None:
        """Forget everything: the weights that it came from are no longer these."""
        self._kept.clear()
        self.num_bytes = 0
