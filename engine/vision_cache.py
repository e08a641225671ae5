"""VisionCache: image embeddings by content, bounded by bytes. A sequence pins what its prefill still needs.

A key is (digest of the prepared pixels and grid, digest of the adapter's vision weights): all adapters without vision
weights share one encode with the base.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageKey:
    image_digest: str
    vision_digest: str
    """Empty for the base and for adapters without vision weights."""


class VisionCache:
    """Least recently used leaves first; pinned embeddings never do, even over budget."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[ImageKey, Tensor] = OrderedDict()  # [tokens, H] base dtype
        self._pins: dict[ImageKey, int] = {}
        self.num_bytes = 0

    def __contains__(self, key: ImageKey) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: ImageKey) -> Tensor:
        """[tokens, H]; valid while pinned. KeyError if absent."""
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: ImageKey, embeddings: Tensor) -> None:
        if key in self._entries:
            return
        self._entries[key] = embeddings
        self.num_bytes += embeddings.nbytes
        self._shrink()

    def pin(self, key: ImageKey) -> None:
        """Keep the key's embeddings, present or to come, until as many ``unpin``."""
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: ImageKey) -> None:
        self._pins[key] -= 1
        if self._pins[key] == 0:
            del self._pins[key]
            self._shrink()

    def shed(self) -> None:
        """Drop all that nobody has pinned: the device needs the room."""
        for key in [k for k in self._entries if k not in self._pins]:
            self.num_bytes -= self._entries.pop(key).nbytes

    def _shrink(self) -> None:
        if self.num_bytes <= self._max_bytes:
            return
        for key in [k for k in self._entries if k not in self._pins]:
            self.num_bytes -= self._entries.pop(key).nbytes
            if self.num_bytes <= self._max_bytes:
                return
