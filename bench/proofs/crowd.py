"""Item 3: many adapters. A thousand registered beside a hot set in the slots; a working set of four times the slots."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from bench.cells import THROUGHPUT, Server, Target
from bench.claims import Claim, Proof, quotients
from bench.draws import zipf_choices
from bench.measure import failures, measure, repeats
from bench.proofs.bed import Bed
from bench.trace import Trace
from bench.workloads import SEED, workload_named

NUM_REGISTERED = 1000
NUM_SLOTS = 8
"""The default of `lorikeet serve`."""
ITEM = 3


def prove_crowd(bed: Bed) -> Proof:
    """Every repeat sends the same prompts and lengths four times; only who answers differs."""
    with bed.pocket(NUM_SLOTS) as few, bed.pocket(NUM_REGISTERED) as many:
        small, large = Server(few), Server(many)
        speeds: dict[str, list[dict[str, float]]] = {}
        for repeat in range(-1, bed.num_pairs):  # the first is a warm-up
            ways = _ways(bed, repeat, small, large)
            for name, target, trace in ways if repeat % 2 == 0 else ways[::-1]:
                figures = _figures(bed, name, target, trace)
                if repeat >= 0:
                    speeds.setdefault(name, []).append(figures)
    eight = [run[THROUGHPUT] for run in speeds["eight"]]
    targets = {"hot": 0.95, "four": 0.5, "all": None}
    names = {
        "hot": "hot set of 8 in 8 slots, 1,000 registered, Zipf 1, to 8 registered",
        "four": "working set of four times the slots, to 8 adapters",
        "all": "Zipf 1 over all 1,000 with 8 slots, to 8 adapters",
    }
    claims = [
        Claim(ITEM, names[key], quotients([run[THROUGHPUT] for run in speeds[key]], eight), targets[key])
        for key in names
    ]
    return Proof(tuple(claims), tuple(_cell(name, runs) for name, runs in speeds.items()))


def _ways(bed: Bed, repeat: int, small: Server, large: Server) -> list[tuple[str, Target, Trace]]:
    trace = bed.plan("pocket").trace(workload_named("adapters-8-zipf1"), repeat)
    num, rng = len(trace.calls), random.Random(f"{SEED + repeat}/crowd")
    hot = zipf_choices(NUM_SLOTS, 1.0, num, rng)
    return [
        ("eight", small, _answered(trace, hot)),
        ("hot", large, _answered(trace, hot)),
        ("four", large, _answered(trace, [place % (4 * NUM_SLOTS) for place in range(num)])),
        ("all", large, _answered(trace, zipf_choices(NUM_REGISTERED, 1.0, num, rng))),
    ]


def _answered(trace: Trace, adapters: Sequence[int]) -> Trace:
    """The same calls, to these adapters."""
    return trace.with_calls(
        [replace(call, adapter=adapter) for call, adapter in zip(trace.calls, adapters, strict=True)]
    )


def _figures(bed: Bed, name: str, target: Target, trace: Trace) -> dict[str, float]:
    run = target.send(trace)
    figures = measure(run, bed.plan("pocket").slo)
    if failed := failures(run):
        bed.tell(f"{name}: {figures['num_failed']:.0f} calls failed: {'; '.join(failed)}")
    bed.tell(f"{name}: {figures[THROUGHPUT]:.1f} tokens/s")
    return figures


def _cell(name: str, runs: Sequence[dict[str, float]]) -> dict[str, object]:
    found = repeats(runs)
    return {
        "workload": f"crowd-{name}",
        "size": "pocket",
        "endpoint": {"label": "lorikeet"},
        "num_repeats": found.num_repeats,
        "median": found.median,
        "spread": found.spread,
        "runs": list(runs),
    }
