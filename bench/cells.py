"""A cell: one workload on one endpoint, after a warm-up, so many times; and pairs of cells side by side in time.

Owns the order of runs. Each repeat sends other calls of the same workload (another seed), because a cache that has seen
the calls would otherwise be measured; the two sides of a pair send the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from bench.endpoint import Endpoint, Naming
from bench.load import Load, Run
from bench.measure import Slo, by_adapter, failures, measure, paired_ratio, parity, repeats
from bench.scrape import between, scrape, step_profile
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


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell's runs, and what our server counted during them."""

    endpoint: Endpoint
    traces: tuple[Trace, ...]
    runs: tuple[Run, ...]
    figures: tuple[Mapping[str, float], ...]
    counted: Mapping[str, float]

    def cell(self, workload: Workload, plan: Plan) -> dict[str, object]:
        """What is kept of it."""
        found = repeats(self.figures)
        return {
            "workload": workload.name,
            "about": workload.about,
            "size": plan.size,
            "digests": [trace.digest for trace in self.traces],
            "endpoint": _about(self.endpoint),
            "slo": asdict(plan.slo),
            "num_repeats": found.num_repeats,
            "median": found.median,
            "spread": found.spread,
            "runs": [dict(figures) for figures in self.figures],
            "by_adapter": by_adapter(Run(tuple(s for run in self.runs for s in run.streams), 1.0)),
            "failures": failures(Run(tuple(s for run in self.runs for s in run.streams), 1.0)),
            "counted": dict(self.counted),
            "step_profile": step_profile(self.counted),
        }


def _about(endpoint: Endpoint) -> dict[str, object]:
    """An endpoint without its key."""
    return {
        "label": endpoint.label,
        "base": endpoint.base,
        "naming": str(endpoint.naming),
        "num_adapters": len(endpoint.adapters),
    }


def run_cell(endpoint: Endpoint, workload: Workload, plan: Plan, tell: Tell) -> Measured:
    """Raises NothingMeasured, and ValueError for an endpoint with too few adapters."""
    (measured,) = run_side_by_side([(endpoint, workload)], plan, tell)
    return measured


def run_side_by_side(sides: Sequence[tuple[Endpoint, Workload]], plan: Plan, tell: Tell) -> list[Measured]:
    """Warm all up, then take turns: each repeat runs every side, in an order that alternates."""
    for endpoint, workload in sides:
        if plan.has_warm_up:
            tell(f"{endpoint.label} {workload.name}: warm-up")
            Load(endpoint).send(plan.warm_up(workload))
    traces = [[plan.trace(workload, repeat) for repeat in range(plan.num_repeats)] for _, workload in sides]
    runs: list[list[Run]] = [[] for _ in sides]
    counted: list[dict[str, float]] = [{} for _ in sides]
    for repeat in range(plan.num_repeats):
        order = range(len(sides)) if repeat % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            endpoint, workload = sides[side]
            before = scrape(endpoint.url, endpoint.api_key)
            run = Load(endpoint).send(traces[side][repeat])
            _add(counted[side], between(before, scrape(endpoint.url, endpoint.api_key)))
            runs[side].append(run)
            _check(run, endpoint, workload)
            speed = measure(run, plan.slo)[THROUGHPUT]
            tell(f"{endpoint.label} {workload.name} {repeat + 1}/{plan.num_repeats}: {speed:.1f} tokens/s")
    return [
        Measured(
            endpoint,
            tuple(traces[side]),
            tuple(runs[side]),
            tuple(measure(run, plan.slo) for run in runs[side]),
            counted[side],
        )
        for side, (endpoint, _) in enumerate(sides)
    ]


def _check(run: Run, endpoint: Endpoint, workload: Workload) -> None:
    if all(streamed.failure is not None for streamed in run.streams):
        reasons = "; ".join(failures(run))
        raise NothingMeasured(f"no call of {workload.name} to {endpoint.label} came back whole: {reasons}")


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


# ---- pairs


def ratio(ours: Measured, theirs: Measured, figure: str = THROUGHPUT) -> dict[str, float]:
    """Of ``figure``, run by run."""
    return paired_ratio([f[figure] for f in ours.figures], [f[figure] for f in theirs.figures])


def parity_of(ours: Measured, theirs: Measured) -> dict[str, object]:
    """How many of the same calls gave the same text on both sides, over all repeats."""
    found = [parity(mine, other) for mine, other in zip(ours.runs, theirs.runs, strict=True)]
    return {
        "num_compared": sum(each.num_compared for each in found),
        "num_equal": sum(each.num_equal for each in found),
        "differing": [each.differing for each in found if each.differing],
    }


def base_only(endpoint: Endpoint) -> Endpoint:
    """The same server, asked the same calls without their adapters: what LoRA is compared with."""
    return replace(endpoint, naming=Naming.NONE, label=f"{endpoint.label}, base only")
