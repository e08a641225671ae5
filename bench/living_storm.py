"""The load storm: a cold adapter a second beside 8 streams, and what it does to the gaps between their tokens."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from bench.living_checks import Cell, Check, with_checks
from bench.living_packages import SAMPLE, Variants
from bench.living_rig import Rig, rig_of


async def gaps_beside(rig: Rig, seconds: float, cold: Sequence[str]) -> tuple[list[float], int]:
    """Gaps between tokens of 8 streams for so long, while one of ``cold`` loads each second."""
    names, end_s = [f"hot-{i}" for i in range(4)], time.monotonic() + seconds
    gaps: list[float] = []

    async def keep(name: str) -> None:
        while time.monotonic() < end_s:
            moments = await rig.stream(name, 64)
            gaps.extend(b - a for a, b in itertools.pairwise(moments))

    async def storm() -> int:
        for count, name in enumerate(cold):
            if time.monotonic() >= end_s:
                return count
            begin_s = time.monotonic()
            (await rig.client.post(f"/v1/adapters/{name}/load")).raise_for_status()
            await asyncio.sleep(max(0.0, begin_s + 1 - time.monotonic()))
        return len(cold)

    results = await asyncio.gather(storm(), *(keep(name) for name in (*names, *names)))
    return gaps, int(results[0] or 0)


async def storm(folder: Path) -> Cell:
    seconds, variants = 20.0, Variants(SAMPLE)
    async with rig_of(folder) as rig:
        for i in range(4):
            await rig.register(f"hot-{i}", variants, i)
        for i in range(int(seconds)):
            await rig.register(f"cold-{i}", variants, 100 + i)
        await gaps_beside(rig, 3, [])
        quiet, _ = await gaps_beside(rig, seconds, [])
        stormy, num_loads = await gaps_beside(rig, seconds, [f"cold-{i}" for i in range(int(seconds))])
        after, _ = await gaps_beside(rig, seconds, [])
        stalls = await rig.mean_ms("lorikeet_decode_stall_seconds", "cause")
        stages = await rig.mean_ms("lorikeet_adapter_load_seconds", "stage")
    base = statistics.median([p99(quiet), p99(after)])
    ratio = p99(stormy) / base
    cell: Cell = {
        "figure": "storm", "num_loads": num_loads, "package_bytes": variants.num_bytes,
        "quiet_p99_ms": 1000 * p99(quiet), "quiet_after_p99_ms": 1000 * p99(after),
        "storm_p99_ms": 1000 * p99(stormy), "ratio": ratio,
        "quiet_median_ms": 1000 * statistics.median(quiet), "storm_median_ms": 1000 * statistics.median(stormy),
        "stall_mean_ms": stalls, "load_mean_ms": stages,
    }  # fmt: skip
    return with_checks(
        cell,
        [
            Check("p99 of token gaps, times the quiet one's", ratio, 1.5),
            Check("cold loads in 20 s", num_loads, 15, is_at_least=True),
        ],
    )


def p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]
