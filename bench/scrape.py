"""What our server counted during a run, from /metrics: loads, cache hits, and where each step's time went."""

from __future__ import annotations

import re
from collections.abc import Mapping

import httpx2

Counts = Mapping[str, float]

_SAMPLE = re.compile(r"^(lorikeet_\w+?(?:_total|_sum|_count))(?:\{(.*)\})? (\S+)(?: \d+)?$")
_PHASE = re.compile(r'phase="([^"]*)"')


def scrape(url: str, api_key: str | None = None) -> dict[str, float]:
    """Every counter, summed over its labels but for a step's phases. Empty for a server that is not ours."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        reply = httpx2.get(url + "/metrics", headers=headers, timeout=30.0, trust_env=False)
    except httpx2.HTTPError:
        return {}
    return read_counters(reply.text) if reply.status_code == 200 else {}


def read_counters(text: str) -> dict[str, float]:
    counters: dict[str, float] = {}
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            name, labels, value = match.groups()
            phase = _PHASE.search(labels or "")
            key = f"{name}/{phase.group(1)}" if phase else name
            counters[key] = counters.get(key, 0.0) + float(value)
    return counters


def between(before: Counts, after: Counts) -> dict[str, float]:
    """What was counted between two scrapes; what did not move is left out."""
    return {
        name.removeprefix("lorikeet_"): round(moved, 6)
        for name, value in after.items()
        if (moved := value - before.get(name, 0.0))
    }


def step_profile(counted: Counts) -> dict[str, float]:
    """Milliseconds of each phase of a step, on average, and its share of all phases."""
    phases = {name.split("/", 1)[1] for name in counted if name.startswith("step_seconds_sum/")}
    sums = {phase: counted[f"step_seconds_sum/{phase}"] for phase in phases}
    whole = sum(sums.values())
    profile: dict[str, float] = {}
    for phase in sorted(phases, key=lambda phase: -sums[phase]):
        num = counted.get(f"step_seconds_count/{phase}", 0.0)
        if num and whole:
            profile[f"{phase}_ms"] = round(1000 * sums[phase] / num, 4)
            profile[f"{phase}_share"] = round(sums[phase] / whole, 4)
    return profile
