"""A cell: one workload on one endpoint, after a warm-up, so many times; and pairs of cells side by side in time.

Owns the order of runs. Each repeat sends other calls of the same workload (another seed), because a cache that has seen
the calls would otherwise be measured; the two sides of a pair send the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from bench.endpoint import Endpoint
from bench.load import Load, Run
from bench.measure import Slo
from bench.scrape import scrape
from bench.trace import Trace
from bench.workloads import SEED, Workload, make_trace

WARM_UP_SEED = SEED - 1
THROUGHPUT = "output_tokens_per_s"
Tell = Callable[[str], None]


class NothingMeasured(RuntimeError):
    """No call of a run came back whole."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a cell is run."""

    size: str = "pocket"
    num_repeats: int = 5
    num_calls: int | None = None
    rate: float | None = None
    slo: Slo = field(default_factory=Slo)
    has_warm_up: bool = True

    def trace(self, workload: Workload, repeat: int) -> Trace:
        return make_trace(workload, self.size, num_calls=self.num_calls, rate=self.rate, seed=SEED + repeat)

    def warm_up(self, workload: Workload) -> Trace:
        """Every adapter that the workload's first calls name, once each at least, without waiting for a clock."""
        trace = make_trace(workload, self.size, num_calls=self.num_calls, seed=WARM_UP_SEED)
        streams = workload.num_streams or 8
        calls = trace.calls[: max(2 * streams, 8)]
        return replace(trace, calls=calls, num_streams=streams)


class Target(Protocol):
    """What traces are sent to: a server by URL, or a peer's worker."""

    @property
    def label(self) -> str: ...

    def about(self) -> dict[str, object]: ...

    def send(self, trace: Trace) -> Run: ...

    def counters(self) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Server:
    """An endpoint as a target."""

    endpoint: Endpoint

    @property
    def label(self) -> str:
        return self.endpoint.label

    def about(self) -> dict[str, object]:
        """Without its key."""
        return {
            "label": self.endpoint.label,
            "base": self.endpoint.base,
            "naming": str(self.endpoint.naming),
            "num_adapters": len(self.endpoint.adapters),
        }

    def send(self, trace: Trace) -> Run:
        return Load(self.endpoint).send(trace)

    def counters(self) -> dict[str, float]:
        return scrape(self.endpoint.url, self.endpoint.api_key)
