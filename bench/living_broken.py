"""Broken adapters registered beside streams: each is refused with its own reason, soon; the streams go on as alone."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from bench.broken_packages import BROKEN
from bench.living_checks import Cell, Check, with_checks
from bench.living_packages import SAMPLE, Variants
from bench.living_rig import Rig, rig_of

NUM_STREAMS = 8


async def broken(folder: Path) -> Cell:
    variants = Variants(SAMPLE)
    told: dict[str, str] = {}
    seconds: dict[str, float] = {}
    accepted: list[str] = []
    async with rig_of(folder) as rig:
        await rig.register("sound", variants, 0)
        alone = await rig.text("sound", 48)
        is_over = asyncio.Event()
        streams = [asyncio.create_task(_keep(rig, alone, is_over)) for _ in range(NUM_STREAMS)]
        for number, (kind, spoil) in enumerate(BROKEN.items()):
            spoil(variants.write(rig.root / f"broken-{number}", number))
            begin_s = time.monotonic()
            body = {"name": f"broken-{number}", "source": f"broken-{number}"}
            reply = await rig.client.post("/v1/adapters", json=body)
            seconds[kind] = time.monotonic() - begin_s
            told[kind] = str(reply.json().get("error", {}).get("message", ""))
            if not 400 <= reply.status_code < 500:
                accepted.append(kind)
        listed = [each["name"] for each in (await rig.client.get("/v1/adapters")).json()["data"]]
        is_over.set()
        outcomes = await asyncio.gather(*streams)
    num_streams, num_different = sum(o[0] for o in outcomes), sum(o[1] for o in outcomes)
    cell: Cell = {
        "figure": "broken",
        "told": told,
        "seconds": seconds,
        "accepted": accepted,
        "listed": listed,
    }
    return with_checks(
        cell,
        [
            Check("kinds of broken adapter", len(BROKEN), 25, is_at_least=True),
            Check("kinds that were not refused by a 4xx, or are listed", len(accepted) + len(listed) - 1, 0),
            Check("reasons in words of their own", len(set(told.values())), 25, is_at_least=True),
            Check("s that the slowest refusal took", max(seconds.values()), 2),
            Check("streams beside them", num_streams, NUM_STREAMS, is_at_least=True),
            Check("streams whose text was not that of one alone", num_different, 0),
        ],
    )


async def _keep(rig: Rig, alone: str, is_over: asyncio.Event) -> tuple[int, int]:
    """Streams until then: how many, and how many said something else than alone."""
    num_streams = num_different = 0
    while not is_over.is_set():
        num_different += await rig.text("sound", 48) != alone
        num_streams += 1
    return num_streams, num_different
