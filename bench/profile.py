"""Profile: where each millisecond of a decode step goes, at N rows that all decode.

Owns the window: it opens when every stream decodes and closes before any ends, and the server's own counters at both
ends say what a step cost in between. A window in which anything but N decoding rows ran is refused. What LoRA costs is
the difference of ``forward`` to the same window on the base alone, taken in turns.

Phases are the server's (``lorikeet_step_seconds``): on a GPU ``sample`` waits for what ``forward`` started.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from bench.cells import NothingMeasured
from bench.endpoint import Endpoint, Naming
from bench.eventloop import run_async
from bench.load import Load, Run
from bench.scrape import between, scrape
from bench.serving import Served
from bench.trace import Call, Trace
from bench.words import prose

PHASES = ("receive", "adapters", "plan", "encode", "batch", "forward", "sample", "commit", "send")
MODEL_PHASES = frozenset({"encode", "forward"})
"""The model's own; all others are what a step costs around it."""
OPENS_AT, CLOSES_AT = 0.25, 0.75
"""Of the tokens that the streams will give: at first prompts are computed, at last streams end."""
POLL_S = 0.05
LONGEST_SLEEP_S = 0.25
"""A rate that was measured beside scrapes is too low, and the window must not outlast the streams."""
NUM_WORDS = 12
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Edge:
    """The server's counters at one end of a window."""

    at_s: float
    counters: Mapping[str, float]
    loop_s: float
    """Processor time so far of its main thread, where HTTP is served; 0 for a server that others started."""
    other_s: float
    """Of all its other threads: the engine's, torch's, and those that prepare prompts."""

    @property
    def num_tokens(self) -> float:
        return self.counters.get("lorikeet_generation_tokens_total", 0.0)


@dataclass(frozen=True, slots=True)
class Asked:
    """How many rows decode, for how many tokens each, and how often."""

    num_rows: int
    num_tokens: int
    num_repeats: int

    def trace(self, num_adapters: int, seed: int) -> Trace:
        """A call a stream, over the adapters in turn; no two prompts alike."""
        rng = random.Random(seed)
        calls = [
            Call(i, prose(NUM_WORDS, rng), self.num_tokens, i % num_adapters if num_adapters else None)
            for i in range(self.num_rows)
        ]
        return Trace(f"profile-{self.num_rows}", "profile", tuple(calls), self.num_rows)


def profile(endpoint: Endpoint, served: Served, asked: Asked, tell: Tell) -> list[dict[str, object]]:
    """A cell for the adapters (if there are any) and one for the base alone, medians over the repeats.

    Raises NothingMeasured where no window held N decoding rows and nothing else.
    """
    base = replace(endpoint, naming=Naming.NONE, label=f"{endpoint.label}, base only")
    sides = [endpoint, base] if endpoint.adapters else [base]
    runs: list[list[dict[str, float]]] = [[] for _ in sides]
    for repeat in range(asked.num_repeats + 1):  # the first warms up
        for place, side in enumerate(sides):
            figures = run_async(_window(side, served, asked, repeat))
            tell(f"{side.label} {repeat}/{asked.num_repeats}: {figures['step_ms']:.3f} ms a step")
            if repeat:
                runs[place].append(figures)
    if len(sides) == 2:
        for own, without in zip(*runs, strict=True):
            own["lora_ms"] = own["forward_ms"] - without["forward_ms"]
    return [_cell(side, asked, found) for side, found in zip(sides, runs, strict=True)]


def _cell(endpoint: Endpoint, asked: Asked, runs: Sequence[Mapping[str, float]]) -> dict[str, object]:
    names = list(dict.fromkeys(name for run in runs for name in run))
    medians = {name: round(statistics.median(run[name] for run in runs), 4) for name in names}
    return {
        "workload": f"profile-{asked.num_rows}",
        "about": f"{asked.num_rows} rows that decode, {asked.num_tokens} tokens each",
        "endpoint": {"label": endpoint.label, "base": endpoint.base, "num_adapters": len(endpoint.adapters)},
        "num_repeats": len(runs),
        "profile": medians,
        "runs": [dict(run) for run in runs],
    }


# ---- one window


async def _window(endpoint: Endpoint, served: Served, asked: Asked, seed: int) -> dict[str, float]:
    num_adapters = 0 if endpoint.naming is Naming.NONE else min(len(endpoint.adapters), asked.num_rows)
    begin = await _edge(endpoint, served)
    load = asyncio.create_task(Load(endpoint).send_async(asked.trace(num_adapters, seed)))
    whole = asked.num_rows * asked.num_tokens
    try:
        opened = await _reach(endpoint, served, begin.num_tokens + OPENS_AT * whole, load)
        closed = await _reach(endpoint, served, begin.num_tokens + CLOSES_AT * whole, load, opened)
        run = await load
    finally:
        load.cancel()
        with suppress(asyncio.CancelledError):
            await load
    failed = [streamed.failure for streamed in run.streams if streamed.failure]
    if failed:
        raise NothingMeasured(f"a stream failed: {failed[0]}")
    return figures(opened, closed, asked.num_rows)


async def _reach(
    endpoint: Endpoint,
    served: Served,
    num_tokens: float,
    load: asyncio.Task[Run],
    since: Edge | None = None,
) -> Edge:
    """The first edge at which so many tokens were given. Sleeps for as long as that should take: scrapes cost steps."""
    while True:
        edge = await _edge(endpoint, served)
        if edge.num_tokens >= num_tokens:
            return edge
        if load.done():
            raise NothingMeasured(
                "the streams ended before the window: ask for more --tokens, and a server that is ours"
            )
        expected_s = _expected_s(edge, since, num_tokens)
        await asyncio.sleep(max(POLL_S, min(0.5 * expected_s, LONGEST_SLEEP_S)))


def _expected_s(edge: Edge, since: Edge | None, num_tokens: float) -> float:
    if since is None or edge.num_tokens <= since.num_tokens:
        return 0.0
    rate = (edge.num_tokens - since.num_tokens) / (edge.at_s - since.at_s)
    return (num_tokens - edge.num_tokens) / rate


async def _edge(endpoint: Endpoint, served: Served) -> Edge:
    counters = await asyncio.to_thread(scrape, endpoint.url, endpoint.api_key)
    return Edge(time.monotonic(), counters, *served.cpu_seconds())


def figures(opened: Edge, closed: Edge, num_rows: int) -> dict[str, float]:
    """Milliseconds a step. Raises NothingMeasured unless every step of the window decoded ``num_rows`` rows alone."""
    counted = between(opened.counters, closed.counters)
    num_steps = counted.get("batch_rows_count", 0.0)
    if not num_steps:
        raise NothingMeasured("the window held no step: ask for more --tokens, and a server that is ours")
    if counted.get("batch_rows_sum") != num_rows * num_steps or "prompt_tokens_total" in counted:
        raise NothingMeasured(
            f"not every step of the window decoded {num_rows} rows: ask for more --tokens, on a server with no others"
        )
    per_step = 1000 / num_steps
    found = {f"{phase}_ms": per_step * counted.get(f"step_seconds_sum/{phase}", 0.0) for phase in PHASES}
    step_ms = per_step * (closed.at_s - opened.at_s)
    found["between_ms"] = step_ms - sum(found.values())
    found["around_ms"] = step_ms - sum(found[f"{phase}_ms"] for phase in MODEL_PHASES)
    cpu = {phase: counted.get(f"step_cpu_seconds_total/{phase}", 0.0) for phase in PHASES}
    if any(cpu.values()):
        found["around_cpu_ms"] = per_step * sum(cpu[phase] for phase in PHASES if phase not in MODEL_PHASES)
    if closed.other_s:
        found["http_cpu_ms"] = per_step * (closed.loop_s - opened.loop_s)
        found["engine_cpu_ms"] = per_step * (closed.other_s - opened.other_s)
    return {"step_ms": step_ms, **found, "num_steps": num_steps}
