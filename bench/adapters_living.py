"""Adapters as living things, measured: ``python -m bench.adapters_living [--only storm,tiers,crowd,registry,cycles]``.

Starts servers of the embedded base as processes of their own and speaks HTTP to them. The figures:
storm     a cold adapter loads each second beside 8 streams: the 99th percentile of token gaps, against quiet
tiers     requests over four times as many adapters as slots, against requests over as many as slots
crowd     the throughput of a hot set with 1,000 adapters registered, against the hot set alone
registry  10,000 registered: memory, the time of /v1/models, and of a start
cycles    1,000 loads and unloads: memory, and the bytes that were reported against those that the gauges fell by

Writes bench/results/adapters-living-*.json and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.living_packages import Variants
from bench.living_rig import NUM_SLOTS, Rig, rig_of, throughput
from bench.provenance import provenance
from bench.results import last_line, make_result, save

SAMPLE = Path(__file__).resolve().parent.parent / "adapters" / "samples" / "french"
Cell = dict[str, object]


# ---- the figures -----------------------------------------------------------------------------------------------


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
    base = statistics.median([p99(quiet), p99(after)])
    return {
        "figure": "storm", "num_loads": num_loads, "package_bytes": variants.num_bytes,
        "quiet_p99_ms": 1000 * p99(quiet), "quiet_after_p99_ms": 1000 * p99(after),
        "storm_p99_ms": 1000 * p99(stormy), "ratio": p99(stormy) / base, "target": 1.5,
        "quiet_median_ms": 1000 * statistics.median(quiet), "storm_median_ms": 1000 * statistics.median(stormy),
    }  # fmt: skip


def p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


async def tiers(folder: Path) -> Cell:
    variants = Variants(SAMPLE)
    names = [f"a-{i}" for i in range(4 * NUM_SLOTS)]
    async with rig_of(folder) as rig:
        for i, name in enumerate(names):
            await rig.register(name, variants, i)
        await throughput(rig, names, 2 * len(names), 4)
        resident = await throughput(rig, names[:NUM_SLOTS], 128)
        wide = await throughput(rig, names, 128)
        again = await throughput(rig, names[:NUM_SLOTS], 128)
    best = max(resident, again)
    return {"figure": "tiers", "num_slots": NUM_SLOTS, "num_adapters": len(names), "resident_tok_s": resident,
            "resident_again_tok_s": again, "wide_tok_s": wide, "ratio": wide / best, "target": 0.5}  # fmt: skip


async def crowd(folder: Path, num_registered: int = 1000) -> Cell:
    variants, small = Variants(SAMPLE), Variants(SAMPLE, small=True)
    hot = [f"hot-{i}" for i in range(NUM_SLOTS)]
    async with rig_of(folder) as rig:
        for i, name in enumerate(hot):
            await rig.register(name, variants, i)
        await throughput(rig, hot, 64)
        few = [await throughput(rig, hot, 128) for _ in range(3)]
        for i in range(num_registered - len(hot)):
            await rig.register(f"cold-{i}", small, i)
        many = [await throughput(rig, hot, 128) for _ in range(3)]
    ratio = statistics.median(many) / statistics.median(few)
    return {"figure": "crowd", "num_registered": num_registered, "few_tok_s": few, "many_tok_s": many,
            "lost": 1 - ratio, "target": 0.05}  # fmt: skip


async def registry(folder: Path, num_registered: int) -> Cell:
    small = Variants(SAMPLE, small=True)
    async with rig_of(folder) as rig:
        empty_start_s = rig.start_s
        await rig.register("first", small, 0)
        await rig.stream("first", 4)
        before = rig.rss_bytes()
        begin_s = time.monotonic()
        for i in range(1, num_registered):
            await rig.register(f"a-{i}", small, i)
        register_s = time.monotonic() - begin_s
        after = rig.rss_bytes()
        listing = [await timed(rig, "/v1/models") for _ in range(5)]
        scrape = [await timed(rig, "/metrics") for _ in range(5)]
        chat = await throughput(rig, ["first"], 32)
    async with rig_of(folder) as rig:
        full_start_s, restarted = rig.start_s, rig.rss_bytes()
        num_listed = len((await rig.client.get("/v1/models")).json()["data"])
    return {"figure": "registry", "num_registered": num_registered, "num_listed_after_restart": num_listed,
            "register_ms": 1000 * register_s / (num_registered - 1), "added_mib": (after - before) / (1 << 20),
            "models_ms": 1000 * statistics.median(listing), "metrics_ms": 1000 * statistics.median(scrape),
            "empty_start_s": empty_start_s, "full_start_s": full_start_s, "rss_restarted_mib": restarted / (1 << 20),
            "chat_tok_s": chat, "targets": {"added_mib": 100, "models_ms": 300, "start_s": 2}}  # fmt: skip


async def timed(rig: Rig, path: str) -> float:
    begin_s = time.monotonic()
    (await rig.client.get(path)).raise_for_status()
    return time.monotonic() - begin_s


async def cycles(folder: Path, num_cycles: int = 1000) -> Cell:
    num_wrong, rss = 0, [0, 0]
    async with rig_of(folder) as rig:
        await rig.register("a", Variants(SAMPLE), 0)
        for i in range(50 + num_cycles):
            if i == 50:
                rss[0] = rig.rss_bytes()
            (await rig.client.post("/v1/adapters/a/load")).raise_for_status()
            held = await rig.tier_bytes()
            freed = (await rig.client.post("/v1/adapters/a/unload")).raise_for_status().json()
            left = await rig.tier_bytes()
            reported = [freed["freed_device_bytes"], freed["freed_host_bytes"]]
            num_wrong += reported != [a - b for a, b in zip(held, left, strict=True)] or not all(reported)
        rss[1] = rig.rss_bytes()
        reload = await rig.stream("a", 4)
    return {"figure": "cycles", "num_cycles": num_cycles, "num_wrong_reports": num_wrong, "rss_before": rss[0],
            "rss_after": rss[1], "grown": rss[1] / rss[0] - 1, "target": 0.01, "reloads_by_request": bool(reload),
            "reported_bytes": reported}  # fmt: skip


FIGURES = ("storm", "tiers", "crowd", "registry", "cycles")


async def measure(name: str, folder: Path, num_registered: int) -> Cell:
    if name == "registry":
        return await registry(folder, num_registered)
    return await {"storm": storm, "tiers": tiers, "crowd": crowd, "cycles": cycles}[name](folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(FIGURES), help="figures, comma between")
    parser.add_argument("--registered", type=int, default=10_000, help="adapters of the figure registry")
    wanted = parser.parse_args()
    origin, cells = provenance(), []
    for name in wanted.only.split(","):
        with tempfile.TemporaryDirectory(prefix="lorikeet-bench-") as folder:
            cells.append(asyncio.run(measure(name, Path(folder), wanted.registered)))
    result = make_result("adapters-living", origin, cells)
    save(result)
    print(last_line(result))  # noqa: T201  the one line that a run ends in


if __name__ == "__main__":
    main()
