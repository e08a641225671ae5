"""StepClock: where one step's time went, phase by phase. It knows no step: whoever ends a phase names it.

Phases are told apart by the host's clock. On a GPU the work of ``forward`` is only started there, and ``sample``, which
waits for the tokens, holds the rest of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal

Phase = Literal["receive", "adapters", "plan", "encode", "batch", "forward", "sample", "commit", "send"]
"""In a step's order: the inbox; adapters that came or are wanted; who computes; new images; flat tensors; the language
model; tokens; what became of each sequence; status and outbox."""


class StepClock:
    """Made when a step begins. Phases that come again, in a retry, add up."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last_s = now()
        self.seconds: dict[Phase, float] = {}

    def lap(self, phase: Phase) -> float:
        """What passed since the last lap was ``phase``; returns it in seconds."""
        now_s = self._now()
        passed_s = now_s - self._last_s
        self._last_s = now_s
        self.seconds[phase] = self.seconds.get(phase, 0.0) + passed_s
        return passed_s

    def split(self, seconds: Mapping[Phase, float]) -> None:
        """What passed since the last lap was all of these, as somebody else's clock had them."""
        self._last_s = self._now()
        for phase, passed_s in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + passed_s
