"""Upload: a tensor on the device that the host refills in place, again and again, without waiting for the device.

Owns a ring of pinned host buffers: a copy still under way is never written over. On a CPU it is a plain copy.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

RING: Final = 4
"""More than the steps that an engine is ahead of its device, so that a buffer is free when its turn comes."""


class Upload:
    """One thread's. Copies are ordered like everything on the current stream."""

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._turn = 0
        self._hosts: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []
        if target.is_cuda:
            self._hosts = [torch.empty_like(target, device="cpu", pin_memory=True) for _ in range(RING)]
            self._events = [torch.cuda.Event() for _ in range(RING)]

    def send(self, values: np.ndarray[tuple[int, ...], np.dtype[np.int32] | np.dtype[np.int64]]) -> None:
        """Copy values of the target's shape and type; they may be changed as soon as this returns."""
        if not self._hosts:
            self._target.copy_(torch.from_numpy(values))
            return
        host, event = self._hosts[self._turn], self._events[self._turn]
        event.synchronize()  # nothing, unless the host is a whole ring ahead
        host.copy_(torch.from_numpy(values))
        self._target.copy_(host, non_blocking=True)
        event.record()
        self._turn = (self._turn + 1) % RING
