"""StepClock: where one step's time went, phase by phase. It knows no step: whoever ends a phase names it.

Phases are told apart by the host's clock. On a GPU the work of ``forward`` is only started there, and ``sample``, which
waits for the tokens, holds the rest of it. Beside it runs the processor's clock of this thread: a phase that takes
longer than that waited, for the device, for a processor, or for the interpreter while another thread had it.
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

    def __init__(
        self, now: Callable[[], float] = time.monotonic, cpu_now: Callable[[], float] = time.thread_time
    ) -> None:
        """cpu_now: the processor time of the thread that calls."""
        self._now, self._cpu_now = now, cpu_now
        self._last_s, self._last_cpu_s = now(), cpu_now()
        self.seconds: dict[Phase, float] = {}
        self.cpu_seconds: dict[Phase, float] = {}

    def lap(self, phase: Phase) -> float:
        """What passed since the last lap was ``phase``; returns it in seconds."""
        now_s, cpu_s = self._now(), self._cpu_now()
        passed_s = now_s - self._last_s
        _add(self.seconds, phase, passed_s)
        _add(self.cpu_seconds, phase, cpu_s - self._last_cpu_s)
        self._last_s, self._last_cpu_s = now_s, cpu_s
        return passed_s

    def split(self, seconds: Mapping[Phase, float], cpu_seconds: Mapping[Phase, float]) -> None:
        """What passed since the last lap was all of these, as somebody else's clock had them on this thread."""
        self._last_s, self._last_cpu_s = self._now(), self._cpu_now()
        for phase, passed_s in seconds.items():
            _add(self.seconds, phase, passed_s)
        for phase, passed_s in cpu_seconds.items():
            _add(self.cpu_seconds, phase, passed_s)


def _add(sums: dict[Phase, float], phase: Phase, seconds: float) -> None:
    sums[phase] = sums.get(phase, 0.0) + seconds
