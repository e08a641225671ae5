"""A cell: one workload on one endpoint, after a warm-up, so many times; and pairs of cells side by side in time.

Owns the order of runs. Each repeat sends other calls of the same workload (another seed), because a cache that has seen
the calls would otherwise be measured; the two sides of a pair send the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

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
    warm_up_tokens: int | None = None
    """Answers of the warm-up are cut to so many; None leaves them whole."""
    pairs_per_repeat: int = 8
    """Of the scenarios that ask twice."""
    seed: int = SEED
    """Of the first repeat's calls; each repeat has the next one."""

    def trace(self, workload: Workload, repeat: int) -> Trace:
        return make_trace(
            workload, self.size, num_calls=self.num_calls, rate=self.rate, seed=self.seed + repeat
        )

    def warm_up(self, workload: Workload) -> Trace:
        """Every adapter that the workload's first calls name, once each at least, without waiting for a clock."""
        trace = make_trace(workload, self.size, num_calls=self.num_calls, seed=WARM_UP_SEED)
        streams = workload.num_streams or 8
        most = self.warm_up_tokens or max(call.num_tokens for call in trace.calls)
        calls = [
            replace(call, num_tokens=min(call.num_tokens, most))
            for call in trace.calls[: max(2 * streams, 8)]
        ]
        return replace(trace, calls=tuple(calls), num_streams=streams)


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

    def base_only(self) -> Server:
        """The same server, asked the same calls without their adapters: what LoRA is compared with."""
        label = f"{self.endpoint.label}, base only"
        return Server(replace(self.endpoint, naming=Naming.NONE, label=label))


@dataclass(frozen=True, slots=True)
class FirstCalls:
    """A target that is sent the first few calls of each trace.

    For peers that take one call after another: how many wait does not change their tokens a second, only the time of
    the bench.
    """

    target: Target
    num: int

    @property
    def label(self) -> str:
        return self.target.label

    def about(self) -> dict[str, object]:
        return self.target.about() | {"first_calls": self.num}

    def send(self, trace: Trace) -> Run:
        return self.target.send(trace.with_calls(trace.calls[: self.num]))

    def counters(self) -> dict[str, float]:
        return self.target.counters()


@dataclass(frozen=True, slots=True)
class Measured:
    """A target's runs of one workload, and what it counted during them."""

    target: Target
    traces: tuple[Trace, ...]
    runs: tuple[Run, ...]
    figures: tuple[Mapping[str, float], ...]
    counted: Mapping[str, float]

    def values(self, figure: str = THROUGHPUT) -> tuple[float, ...]:
        """A figure, run by run."""
        return tuple(figures[figure] for figures in self.figures)

    def cell(self, workload: Workload, plan: Plan) -> dict[str, object]:
        """What is kept of it."""
        found = repeats(self.figures)
        every = Run(tuple(streamed for run in self.runs for streamed in run.streams), 1.0)
        return {
            "workload": workload.name,
            "about": workload.about,
            "size": plan.size,
            "digests": [trace.digest for trace in self.traces],
            "endpoint": self.target.about(),
            "slo": asdict(plan.slo),
            "num_repeats": found.num_repeats,
            "median": found.median,
            "spread": found.spread,
            "runs": [dict(figures) for figures in self.figures],
            "by_adapter": by_adapter(every),
            "failures": failures(every),
            "counted": dict(self.counted),
            "step_profile": step_profile(self.counted),
        }


def run_side_by_side(targets: Sequence[Target], workload: Workload, plan: Plan, tell: Tell) -> list[Measured]:
    """Warm all up, then take turns: each repeat sends the same calls to every target, in an order that alternates.

    Raises NothingMeasured, and ValueError for an endpoint with too few adapters.
    """
    if plan.has_warm_up:
        for target in targets:
            tell(f"{target.label} {workload.name}: warm-up")
            target.send(plan.warm_up(workload))
    traces = tuple(plan.trace(workload, repeat) for repeat in range(plan.num_repeats))
    runs: list[list[Run]] = [[] for _ in targets]
    counted: list[dict[str, float]] = [{} for _ in targets]
    for repeat, trace in enumerate(traces):
        for place in _turns(len(targets), repeat):
            target = targets[place]
            before = target.counters()
            run = target.send(trace)
            _add(counted[place], between(before, target.counters()))
            _check(run, target, workload)
            runs[place].append(run)
            speed = measure(run, plan.slo)[THROUGHPUT]
            tell(f"{target.label} {workload.name} {repeat + 1}/{plan.num_repeats}: {speed:.1f} tokens/s")
    return [
        Measured(target, traces, tuple(own), tuple(measure(run, plan.slo) for run in own), counts)
        for target, own, counts in zip(targets, runs, counted, strict=True)
    ]


def _turns(num: int, repeat: int) -> Sequence[int]:
    """Forwards and backwards in turn, so that nobody always goes first."""
    order = range(num)
    return order if repeat % 2 == 0 else order[::-1]


def _check(run: Run, target: Target, workload: Workload) -> None:
    if all(streamed.failure is not None for streamed in run.streams):
        reasons = "; ".join(failures(run))
        raise NothingMeasured(f"no call of {workload.name} to {target.label} came back whole: {reasons}")


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


# ---- pairs


def ratio(ours: Measured, theirs: Measured, figure: str = THROUGHPUT) -> dict[str, float]:
    """Of ``figure``, run by run."""
    return paired_ratio(ours.values(figure), theirs.values(figure))


def parity_of(ours: Measured, theirs: Measured) -> dict[str, object]:
    """How many of the same calls gave the same text on both sides, over all repeats."""
    found = [parity(mine, other) for mine, other in zip(ours.runs, theirs.runs, strict=True)]
    return {
        "num_compared": sum(each.num_compared for each in found),
        "num_equal": sum(each.num_equal for each in found),
        "differing": [each.differing for each in found if each.differing],
    }
