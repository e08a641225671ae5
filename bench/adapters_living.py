"""Adapters as living things, measured: ``python -m bench.adapters_living [--only promotes,storm,tiers,...]``.

Starts servers of the embedded base as processes of their own and speaks HTTP to them. The figures:
promotes  1,000 promotes beside 16 streams: failures, and texts that are not one version's
storm     a cold adapter loads each second beside 8 streams: the 99th percentile of token gaps, against quiet
tiers     requests over four times as many adapters as slots, against requests over as many as slots
crowd     the throughput of a hot set with 1,000 adapters registered, against the hot set alone
registry  10,000 registered: memory, the time of /v1/models, and of a start
cycles    1,000 loads and unloads: memory, and the bytes that were reported against those that the gauges fell by
broken    30 kinds of broken adapter registered beside 8 streams: refusals, how soon, and the streams' texts

Each figure's line says what it must be and whether it is; the exit status is 1 if one is not. Writes
bench/results/adapters-living-*.json and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench.promotes
from bench.living_broken import broken
from bench.living_checks import Cell, Check, checks_of, with_checks
from bench.living_packages import SAMPLE, Variants
from bench.living_rig import NUM_SLOTS, Rig, rig_of, throughput
from bench.living_storm import storm
from bench.provenance import provenance
from bench.results import last_line, make_result, save


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
    cell: Cell = {"figure": "tiers", "num_slots": NUM_SLOTS, "num_adapters": len(names), "resident_tok_s": resident,
            "resident_again_tok_s": again, "wide_tok_s": wide, "ratio": wide / best}  # fmt: skip
    return with_checks(
        cell,
        [
            Check(
                "throughput of four times the slots, times a resident set's",
                wide / best,
                0.5,
                is_at_least=True,
            )
        ],
    )


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
    cell: Cell = {"figure": "crowd", "num_registered": num_registered, "few_tok_s": few, "many_tok_s": many,
            "lost": 1 - ratio}  # fmt: skip
    return with_checks(
        cell, [Check(f"part of a hot set's throughput lost to {num_registered} registered", 1 - ratio, 0.05)]
    )


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
        scrape_kib = len((await rig.client.get("/metrics")).content) / 1024
        chat = await throughput(rig, ["first"], 32)
    async with rig_of(folder) as rig:
        full_start_s, restarted = rig.start_s, rig.rss_bytes()
        num_listed = len((await rig.client.get("/v1/models")).json()["data"])
    added_mib, more_s = (after - before) / (1 << 20), full_start_s - empty_start_s
    models_ms, metrics_ms = 1000 * statistics.median(listing), 1000 * statistics.median(scrape)
    cell: Cell = {"figure": "registry", "num_registered": num_registered, "num_listed_after_restart": num_listed,
            "register_ms": 1000 * register_s / (num_registered - 1), "added_mib": added_mib,
            "models_ms": models_ms, "metrics_ms": metrics_ms, "metrics_kib": scrape_kib,
            "empty_start_s": empty_start_s, "full_start_s": full_start_s, "rss_restarted_mib": restarted / (1 << 20),
            "chat_tok_s": chat}  # fmt: skip
    return with_checks(
        cell,
        [
            Check(f"MiB that {num_registered} registered add", added_mib, 100),
            Check("ms of /v1/models", models_ms, 300),
            Check("ms of /metrics", metrics_ms, 50),
            Check("KiB of /metrics", scrape_kib, 512),
            Check("s that a start takes longer than with none registered", more_s, 2),
            Check(
                "registered that are there after the restart", num_listed, num_registered, is_at_least=True
            ),
        ],
    )


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
    grown = rss[1] / rss[0] - 1
    cell: Cell = {"figure": "cycles", "num_cycles": num_cycles, "num_wrong_reports": num_wrong, "rss_before": rss[0],
            "rss_after": rss[1], "grown": grown, "reloads_by_request": bool(reload),
            "reported_bytes": reported}  # fmt: skip
    return with_checks(
        cell,
        [
            Check(f"memory grown by {num_cycles} loads and unloads", grown, 0.01),
            Check("unloads that reported other bytes than the gauges fell by", num_wrong, 0),
            Check("a later request loads it again", float(bool(reload)), 1, is_at_least=True),
        ],
    )


async def promotes(folder: Path) -> Cell:
    sources = (
        "french",
        "patterns",
    )  # they answer otherwise, so that a mixed text cannot pass for one of them
    async with rig_of(folder) as rig:
        for source in sources:
            Variants(SAMPLE.parent / source).write(rig.root / source, 0)
        outcome = await bench.promotes.run(
            str(rig.client.base_url), sources=sources, num_promotes=1000, num_streams=16
        )
    for failure in outcome.failures[:10]:
        sys.stderr.write(f"{failure}\n")
    cell: Cell = {"figure": "promotes", "num_streams": outcome.num_streams, "seconds": outcome.seconds,
                  "by_version": outcome.by_version,
                  "promote_p50_ms": statistics.median(outcome.promote_ms)}  # fmt: skip
    return with_checks(
        cell,
        [
            Check("promotes beside 16 streams", outcome.num_promotes, 1000, is_at_least=True),
            Check("promotes and streams that failed", len(outcome.failures), 0),
            Check("streams whose text is not one version's", outcome.num_mixed, 0),
            Check("streams that were compared", outcome.num_streams, 500, is_at_least=True),
        ],
    )


FIGURES = ("promotes", "storm", "tiers", "crowd", "registry", "cycles", "broken")


async def measure(name: str, folder: Path, num_registered: int) -> Cell:
    if name == "registry":
        return await registry(folder, num_registered)
    figures = {
        "promotes": promotes, "storm": storm, "tiers": tiers, "crowd": crowd, "cycles": cycles, "broken": broken,
    }  # fmt: skip
    return await figures[name](folder)


def main() -> int:
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
        for check in checks_of(cells[-1]):
            print(check.line(name), flush=True)  # noqa: T201
    result = make_result("adapters-living", origin, cells)
    save(result)
    print(last_line(result))  # noqa: T201  the one line that a run ends in
    return 0 if all(check.is_met for cell in cells for check in checks_of(cell)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
