"""Readback: tokens on their way from the device to the host, while the device goes on.

Owns a ring of pinned host buffers, each with the event that says that its copy is over. On a CPU a plain copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

RING: Final = 3
"""One more than the steps that are on the device at once."""


class Readback:
    """One thread's. Copies are ordered like everything on the current stream."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        """num_rows: the most that are sent at once."""
        self._turn = 0
        self._hosts: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._hosts = [torch.empty(num_rows, dtype=torch.int64, pin_memory=True) for _ in range(RING)]
            self._events = [torch.cuda.Event() for _ in range(RING)]

    def send(self, ids: Tensor) -> Callable[[], list[int]]:
        """Begin to copy [S] int64; what is returned waits for them. To be called before RING more are sent."""
        if not self._hosts:
            return ids.clone().tolist
        host, event = self._hosts[self._turn][: len(ids)], self._events[self._turn]
        host.copy_(ids, non_blocking=True)
        event.record()
        self._turn = (self._turn + 1) % RING

        def wait() -> list[int]:
            event.synchronize()
            values: list[int] = host.tolist()
            return values

        return wait
