"""Scenarios: what one caller does to another, and what a second call gains from the first. Ratios within one run.

Two forms. *Beside*: streams decode quietly, then again while guests arrive (a long prompt, a storm of loads, a flood);
their gaps and first tokens are compared. *Pairs*: a call, and then one that shares something with it (a system prompt,
a picture, an adapter that is now on the device); their first tokens are compared.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.cells import NothingMeasured, Plan, Tell
from bench.endpoint import Endpoint
from bench.load import Load, Run
from bench.measure import failures, measure, percentile
from bench.scrape import between, scrape
from bench.sizes import SIZES, Size
from bench.trace import Call, Picture, Trace
from bench.words import prose
from bench.workloads import SEED

NUM_PAIRS = 8
NUM_HOSTS = 8


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    about: str
    num_adapters: int


SCENARIOS: Mapping[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("long-prompt", "a long prompt arrives beside 8 decoding streams", 8),
        Scenario("storm", "32 calls, each to an adapter not yet loaded, beside 8 decoding streams", 40),
        Scenario("flood", "32 streams on one adapter beside one stream on another", 2),
        Scenario("prefix", "a second question behind the same long system prompt", 1),
        Scenario("picture", "a second question on the same picture, through another adapter", 2),
        Scenario("swap", "a call to an adapter that has left the device, and again", 40),
        Scenario("fan-out", "one call answered by 8 adapters, against 8 calls", 8),
    )
}


def run_scenario(endpoint: Endpoint, scenario: Scenario, plan: Plan, tell: Tell) -> dict[str, object]:
    """A cell of ratios: the median over the repeats, and each repeat's. Raises NothingMeasured, ValueError."""
    endpoint.require(scenario.num_adapters)
    size = SIZES[plan.size]
    before = scrape(endpoint.url, endpoint.api_key)
    runs = []
    for repeat in range(plan.num_repeats):
        rng = random.Random(f"{SEED + repeat}/{scenario.name}/{plan.size}")
        if scenario.name in ("long-prompt", "storm", "flood"):
            figures = _beside(endpoint, *_hosts_and_guests(scenario.name, size, rng), plan)
        elif scenario.name == "fan-out":
            figures = _fan_out(endpoint, size, rng)
        else:
            figures = _pairs(endpoint, _pair_calls(scenario.name, size, rng))
        runs.append(figures)
        tell(f"{endpoint.label} {scenario.name} {repeat + 1}/{plan.num_repeats}: {_brief(figures)}")
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return {
        "workload": scenario.name,
        "about": scenario.about,
        "size": plan.size,
        "endpoint": {"label": endpoint.label, "base": endpoint.base},
        "num_repeats": len(runs),
        "median": {name: statistics.median(run[name] for run in runs) for name in names},
        "runs": runs,
        "counted": between(before, scrape(endpoint.url, endpoint.api_key)),
    }


def _brief(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items() if "ratio" in name)


# ---- beside


def _hosts_and_guests(name: str, size: Size, rng: random.Random) -> tuple[Trace, Trace]:
    """The streams that are watched, and those that come upon them."""
    tokens = size.output.high
    if name == "flood":
        hosts = [_call(index, size, rng, adapter=1) for index in range(NUM_HOSTS)]
        guests = [_call(index, size, rng, adapter=0) for index in range(96)]
        return Trace("quiet", "", tuple(hosts), 1), Trace("flood", "", tuple(guests), 32)
    hosts = [
        replace(_call(index, size, rng, adapter=index), num_tokens=4 * tokens) for index in range(NUM_HOSTS)
    ]
    if name == "long-prompt":
        guests = [
            replace(_call(0, size, rng, adapter=0), prompt=prose(size.num_long_words, rng), num_tokens=4)
        ]
        return Trace("decoding", "", tuple(hosts), NUM_HOSTS), Trace("guest", "", tuple(guests), 1)
    guests = [
        replace(_call(index, size, rng, adapter=NUM_HOSTS + index), num_tokens=4) for index in range(32)
    ]
    return Trace("decoding", "", tuple(hosts), NUM_HOSTS), Trace("storm", "", tuple(guests), 4)


def _beside(endpoint: Endpoint, hosts: Trace, guests: Trace, plan: Plan) -> dict[str, float]:
    """The hosts alone, and then with guests that come when all hosts decode."""
    _run(endpoint, hosts)  # adapters are loaded, caches as they will be
    quiet = _run(endpoint, hosts)
    loud, _ = asyncio.run(_together(endpoint, hosts, guests, _begun_s(quiet, hosts)))
    _require(loud, endpoint)
    calm, busy = measure(quiet, plan.slo), measure(loud, plan.slo)
    figures = {
        "quiet_between_tokens_ms_p99": calm["between_tokens_ms_p99"],
        "worst_stall_ms": busy["worst_stall_ms"],
        "worst_stall_ratio": busy["worst_stall_ms"] / calm["between_tokens_ms_p99"],
        "quiet_first_token_ms_p99": calm["first_token_ms_p99"],
        "first_token_ms_p99": busy["first_token_ms_p99"],
        "first_token_ratio": busy["first_token_ms_p99"] / calm["first_token_ms_p99"],
    }
    return figures | {"throughput_ratio": busy["output_tokens_per_s"] / calm["output_tokens_per_s"]}


async def _together(endpoint: Endpoint, hosts: Trace, guests: Trace, after_s: float) -> tuple[Run, Run]:
    async def come_later() -> Run:
        await asyncio.sleep(after_s)
        return await Load(endpoint).send_async(guests)

    loud, other = await asyncio.gather(Load(endpoint).send_async(hosts), come_later())
    return loud, other


def _begun_s(quiet: Run, hosts: Trace) -> float:
    """When all hosts decode, from how it was when nobody else was there."""
    begin_s = min(streamed.sent_s for streamed in quiet.streams)
    return max(streamed.token_times[0] for streamed in quiet.streams[: hosts.num_streams]) - begin_s


# ---- pairs


def _pair_calls(name: str, size: Size, rng: random.Random) -> list[tuple[Call, Call]]:
    return [_pair(name, size, number, rng) for number in range(NUM_PAIRS)]


def _pair(name: str, size: Size, number: int, rng: random.Random) -> tuple[Call, Call]:
    """A call, and one that finds something of it."""
    first, second = (replace(_call(index, size, rng, adapter=0), num_tokens=4) for index in range(2))
    if name == "prefix":
        system = prose(size.num_system_words, rng)
        return replace(first, system=system), replace(second, system=system)
    if name == "picture":
        picture = Picture(*size.pictures[number % len(size.pictures)], seed=rng.randrange(2**32))
        return replace(first, picture=picture), replace(second, picture=picture, adapter=1)
    adapter = number * 5 % 40  # with five others between, and 40 in all, eight slots never keep it
    return replace(first, adapter=adapter), replace(second, adapter=adapter)


def _pairs(endpoint: Endpoint, calls: Sequence[tuple[Call, Call]]) -> dict[str, float]:
    """First tokens of firsts and of seconds, one call at a time."""
    if any(first.adapter != 0 for first, _ in calls):
        _evict(endpoint, calls)
    firsts, seconds = [], []
    for first, second in calls:
        run = _run(endpoint, Trace("pair", "", (first, second), 1))
        firsts.append(1000 * run.streams[0].first_token_s)
        seconds.append(1000 * run.streams[1].first_token_s)
    ratios = [second / first for first, second in zip(firsts, seconds, strict=True)]
    return {
        "first_ms": statistics.median(firsts),
        "second_ms": statistics.median(seconds),
        "second_to_first_ratio": statistics.median(ratios),
        "saved_ms": statistics.median(a - b for a, b in zip(firsts, seconds, strict=True)),
        "first_ms_p99": percentile(firsts, 0.99),
    }


def _evict(endpoint: Endpoint, calls: Sequence[tuple[Call, Call]]) -> None:
    """Ask every other adapter once, so that those of the pairs have left the device for the host's memory."""
    own = {first.adapter for first, _ in calls}
    others = [number for number in range(SCENARIOS["swap"].num_adapters) if number not in own]
    model = calls[0][0]
    _run(
        endpoint,
        Trace("others", "", tuple(replace(model, index=i, adapter=n) for i, n in enumerate(others)), 4),
    )


# ---- fan-out


def _fan_out(endpoint: Endpoint, size: Size, rng: random.Random) -> dict[str, float]:
    """One call for eight adapters, eight calls at once, and eight in turn, each on a picture of its own."""
    num = SCENARIOS["fan-out"].num_adapters

    def asked(tag: str) -> Call:
        picture = Picture(*size.pictures[0], seed=rng.randrange(2**32))
        return replace(
            _call(0, size, rng, adapter=0), picture=picture, num_tokens=size.output.low, prompt=f"{tag} we"
        )

    def apart(call: Call) -> tuple[Call, ...]:
        return tuple(replace(call, index=number, adapter=number) for number in range(num))

    _run(endpoint, Trace("warm", "", apart(asked("in")), num))
    at_once = _run(endpoint, Trace("fan-out", "", (replace(asked("the"), fan_out=num),), 1)).seconds
    together = _run(endpoint, Trace("apart", "", apart(asked("and")), num)).seconds
    in_turn = _run(endpoint, Trace("in turn", "", apart(asked("was")), 1)).seconds
    return {
        "fan_out_ms": 1000 * at_once,
        "apart_at_once_ms": 1000 * together,
        "apart_in_turn_ms": 1000 * in_turn,
        "to_at_once_ratio": at_once / together,
        "to_in_turn_ratio": at_once / in_turn,
    }


# ---- both


def _call(index: int, size: Size, rng: random.Random, *, adapter: int) -> Call:
    words = rng.randint(size.prompt.low, size.prompt.high)
    return Call(index, prose(words, rng), size.output.high, adapter)


def _run(endpoint: Endpoint, trace: Trace) -> Run:
    run = Load(endpoint).send(trace)
    _require(run, endpoint)
    return run


def _require(run: Run, endpoint: Endpoint) -> None:
    """In a scenario every call counts: one that failed changes what the others met."""
    if failed := failures(run):
        raise NothingMeasured(f"calls to {endpoint.label} failed: {'; '.join(failed)}")
