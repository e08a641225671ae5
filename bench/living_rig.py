"""A server of the embedded base for the figures of ``adapters_living``, its packages, and a client of it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from bench.living_packages import Variants
from bench.serving import free_port, lorikeet_command, serve

NUM_SLOTS = 8
PROMPT = "Describe a red circle."


@dataclass(frozen=True, slots=True)
class Rig:
    """One server, its packages, and a client of it."""

    client: httpx2.AsyncClient
    root: Path
    pid: int
    start_s: float

    async def register(self, name: str, variants: Variants, number: int, **more: object) -> None:
        variants.write(self.root / "next", number)
        body = {"name": name, "source": "next", "load": False, **more}
        (await self.client.post("/v1/adapters", json=body)).raise_for_status()

    async def stream(self, model: str, num_tokens: int) -> list[float]:
        """The moments at which tokens came, monotonic seconds."""
        body = {
            "model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": num_tokens,
            "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        moments = []
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if '"error"' in line:
                    raise ValueError(f"{model}: {line[:300]}")
                if line.startswith("data: {"):
                    moments.append(time.monotonic())
        return moments[1:]  # the first frame names the role

    async def text(self, model: str, num_tokens: int) -> str:
        """What a stream says. Raises ValueError for one that ends in an error."""
        body = {
            "model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": num_tokens,
            "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        text = ""
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if '"error"' in line:
                    raise ValueError(f"{model}: {line[:300]}")
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        return text

    async def tier_bytes(self) -> list[float]:
        """What the gauges say of the device and the host."""
        text = (await self.client.get("/metrics")).text
        found = dict(re.findall(r'^lorikeet_adapter_bytes\{tier="(\w+)"\} (\S+)$', text, re.MULTILINE))
        return [float(found["device"]), float(found["host"])]

    async def mean_ms(self, metric: str, label: str) -> dict[str, float]:
        """Mean of a histogram of seconds, by the values of one label, in milliseconds."""
        text = (await self.client.get("/metrics")).text
        pattern = rf'^{metric}_(sum|count)\{{{label}="(\w+)"\}} (\S+)$'
        found = {(kind, value): float(n) for kind, value, n in re.findall(pattern, text, re.MULTILINE)}
        return {
            value: 1000 * total / found["count", value]
            for (kind, value), total in found.items()
            if kind == "sum" and found["count", value]
        }

    def rss_bytes(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text("utf-8")
        match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        return 1024 * int(match[1]) if match else 0


@asynccontextmanager
async def rig_of(folder: Path, *more: str) -> AsyncIterator[Rig]:
    """A fresh server over ``folder``, or one that finds what an earlier one left there."""
    root, port = folder / "root", free_port()
    root.mkdir(parents=True, exist_ok=True)
    command = lorikeet_command("pocket", root, folder / "state", port, "--num-slots", str(NUM_SLOTS), *more)
    with serve(command, f"http://127.0.0.1:{port}", folder / "log") as served:
        async with httpx2.AsyncClient(base_url=served.url, timeout=300, trust_env=False) as client:
            yield Rig(client, root, served.pid, served.start_s)


async def throughput(rig: Rig, models: Sequence[str], num_requests: int, num_tokens: int = 32) -> float:
    """Tokens a second over requests to ``models`` in a random order, 16 at a time."""
    order = [models[i % len(models)] for i in range(num_requests)]
    random.Random(0).shuffle(order)
    places = asyncio.Semaphore(16)

    async def ask(model: str) -> None:
        async with places:
            await rig.stream(model, num_tokens)

    begin_s = time.monotonic()
    await asyncio.gather(*(ask(model) for model in order))
    return num_requests * num_tokens / (time.monotonic() - begin_s)
