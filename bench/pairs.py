"""Pairs: a call, and one that finds something of it (a prompt's start, a picture, an adapter on the device)."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import httpx2

from bench.asking import a_call, run_whole
from bench.cells import NothingMeasured
from bench.endpoint import Endpoint
from bench.measure import percentile
from bench.sizes import Size
from bench.trace import Call, Picture, Trace
from bench.words import prose

NUM_SWAPPED = 40
"""Adapters that take turns in ``swap``: five times the slots of a server's default."""


def pair_calls(name: str, size: Size, num: int, rng: random.Random) -> list[tuple[Call, Call]]:
    return [_pair(name, size, number, rng) for number in range(num)]


def _pair(name: str, size: Size, number: int, rng: random.Random) -> tuple[Call, Call]:
    """A call, and one that finds something of it."""
    first, second = (replace(a_call(index, size, rng, adapter=0), num_tokens=4) for index in range(2))
    if name == "prefix":
        system = prose(size.num_system_words, rng)
        return replace(first, system=system), replace(second, system=system)
    if name in ("picture", "picture-apart"):
        picture = Picture(*size.pictures[number % len(size.pictures)], seed=rng.randrange(2**32))
        other = 1 if name == "picture-apart" else 0
        return replace(first, picture=picture), replace(second, picture=picture, adapter=other)
    if name == "cold-swap":
        return replace(first, adapter=number % 8), replace(second, adapter=number % 8)
    adapter = number * 5 % 40  # with five others between, and 40 in all, eight slots never keep it
    return replace(first, adapter=adapter), replace(second, adapter=adapter)


def ask_pairs(endpoint: Endpoint, calls: Sequence[tuple[Call, Call]], name: str) -> dict[str, float]:
    """First tokens of firsts and of seconds, one call at a time."""
    if name == "swap":
        _evict(endpoint, calls)
    firsts, seconds = [], []
    for first, second in calls:
        if name == "cold-swap":
            _unload(endpoint, first)
        run = run_whole(endpoint, Trace("pair", "", (first, second), 1))
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
    others = [number for number in range(NUM_SWAPPED) if number not in own]
    model = calls[0][0]
    run_whole(
        endpoint,
        Trace("others", "", tuple(replace(model, index=i, adapter=n) for i, n in enumerate(others)), 4),
    )


def _unload(endpoint: Endpoint, call: Call) -> None:
    """Our server lets go of the call's adapter, on the device and in the host's memory; it stays registered.

    Raises NothingMeasured for a server that cannot.
    """
    name = endpoint.name_of(call.adapter)
    url = f"{endpoint.url}/v1/adapters/{name}/unload"
    reply = httpx2.post(url, headers=endpoint.headers(), timeout=endpoint.timeout_s, trust_env=False)
    if reply.status_code != 200:
        raise NothingMeasured(
            f"{endpoint.label} does not unload {name}: {reply.status_code} {reply.text[:200]}"
        )
