"""Asking: a call drawn for a scenario, and traces of which every call must be whole."""

from __future__ import annotations

import random

from bench.cells import NothingMeasured
from bench.endpoint import Endpoint
from bench.load import Load, Run
from bench.measure import failures
from bench.sizes import Size
from bench.trace import Call, Trace
from bench.words import prose


def a_call(index: int, size: Size, rng: random.Random, *, adapter: int) -> Call:
    words = rng.randint(size.prompt.low, size.prompt.high)
    return Call(index, prose(words, rng), size.output.high, adapter)


def run_whole(endpoint: Endpoint, trace: Trace) -> Run:
    run = Load(endpoint).send(trace)
    require_whole(run, endpoint)
    return run


def require_whole(run: Run, endpoint: Endpoint) -> None:
    """In a scenario every call counts: one that failed changes what the others met."""
    if failed := failures(run):
        raise NothingMeasured(f"calls to {endpoint.label} failed: {'; '.join(failed)}")
