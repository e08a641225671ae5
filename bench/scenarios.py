"""Scenarios: what one caller does to another, and what a second call gains from the first. Ratios within one run.

Two forms. *Beside*: streams decode quietly, then again while guests arrive (a long prompt, a storm of loads, a flood);
their gaps and first tokens are compared. *Pairs*: a call, and then one that shares something with it (a system prompt,
a picture, an adapter that is now on the device); their first tokens are compared.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.asking import a_call, require_whole, run_whole
from bench.cells import Plan, Tell
from bench.endpoint import Endpoint
from bench.eventloop import run_async
from bench.load import Load, Run
from bench.measure import measure
from bench.pairs import NUM_SWAPPED, ask_pairs, pair_calls
from bench.scrape import between, scrape
from bench.sizes import SIZES, Size
from bench.trace import Call, Picture, Trace
from bench.words import prose

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
        Scenario("picture", "a second question on the same picture", 1),
        Scenario("picture-apart", "a second question on the same picture, through another adapter", 2),
        Scenario("swap", "a call to an adapter that has left the device, and again", NUM_SWAPPED),
        Scenario("cold-swap", "a call to an adapter that is on disk alone, and again", 8),
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
        rng = random.Random(f"{plan.seed + repeat}/{scenario.name}/{plan.size}")
        if scenario.name in ("long-prompt", "storm", "flood"):
            hosts, guests = _hosts_and_guests(scenario.name, size, rng)
            figures = _beside(
                endpoint, hosts, guests, plan, is_warm=repeat > 0 and scenario.name == "long-prompt"
            )
        elif scenario.name == "fan-out":
            figures = _fan_out(endpoint, size, rng)
        else:
            calls = pair_calls(scenario.name, size, plan.pairs_per_repeat, rng)
            figures = ask_pairs(endpoint, calls, scenario.name)
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
        hosts = [a_call(index, size, rng, adapter=1) for index in range(NUM_HOSTS)]
        guests = [a_call(index, size, rng, adapter=0) for index in range(96)]
        return Trace("quiet", "", tuple(hosts), 1), Trace("flood", "", tuple(guests), 32)
    hosts = [
        replace(a_call(index, size, rng, adapter=index), num_tokens=4 * tokens) for index in range(NUM_HOSTS)
    ]
    if name == "long-prompt":
        guests = [
            replace(a_call(0, size, rng, adapter=0), prompt=prose(size.num_long_words, rng), num_tokens=4)
        ]
        return Trace("decoding", "", tuple(hosts), NUM_HOSTS), Trace("guest", "", tuple(guests), 1)
    guests = [
        replace(a_call(index, size, rng, adapter=NUM_HOSTS + index), num_tokens=4) for index in range(32)
    ]
    return Trace("decoding", "", tuple(hosts), NUM_HOSTS), Trace("storm", "", tuple(guests), 4)


def _beside(
    endpoint: Endpoint, hosts: Trace, guests: Trace, plan: Plan, *, is_warm: bool
) -> dict[str, float]:
    """The hosts alone, and then with guests that come when all hosts decode.

    ``is_warm``: the hosts' adapters are loaded, and only gaps will be looked at, which cached prompts do not change.
    """
    if not is_warm:
        run_whole(endpoint, hosts)
    quiet = run_whole(endpoint, hosts)
    loud, _ = run_async(_together(endpoint, hosts, guests, _begun_s(quiet, hosts)))
    require_whole(loud, endpoint)
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


# ---- fan-out


def _fan_out(endpoint: Endpoint, size: Size, rng: random.Random) -> dict[str, float]:
    """One call for eight adapters, eight calls at once, and eight in turn, each on a picture of its own."""
    num = SCENARIOS["fan-out"].num_adapters

    def asked(tag: str) -> Call:
        picture = Picture(*size.pictures[0], seed=rng.randrange(2**32))
        return replace(
            a_call(0, size, rng, adapter=0), picture=picture, num_tokens=size.output.low, prompt=f"{tag} we"
        )

    def apart(call: Call) -> tuple[Call, ...]:
        return tuple(replace(call, index=number, adapter=number) for number in range(num))

    run_whole(endpoint, Trace("warm", "", apart(asked("in")), num))
    at_once = run_whole(endpoint, Trace("fan-out", "", (replace(asked("the"), fan_out=num),), 1)).seconds
    together = run_whole(endpoint, Trace("apart", "", apart(asked("and")), num)).seconds
    in_turn = run_whole(endpoint, Trace("in turn", "", apart(asked("was")), 1)).seconds
    return {
        "fan_out_ms": 1000 * at_once,
        "apart_at_once_ms": 1000 * together,
        "apart_in_turn_ms": 1000 * in_turn,
        "to_at_once_ratio": at_once / together,
        "to_in_turn_ratio": at_once / in_turn,
    }
