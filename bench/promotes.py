"""Promotes under load: a name moves between two versions again and again while streams run on it.

Every stream must end, and its text must be exactly one version's: the one that the reply names. Speaks HTTP only. Run
it against a server of the embedded base: ``python -m bench.promotes --url http://127.0.0.1:8000``. Ends in one JSON
line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field

import httpx2

PROMPTS = ("What do you see?", "Count to ten.", "Say hello to the world.", "Describe a red circle.")
NAME = "bench-promotes"


@dataclass(slots=True)
class Outcome:
    """What was counted."""

    num_promotes: int = 0
    num_streams: int = 0
    failures: list[str] = field(default_factory=list)
    """Of promotes and of streams, in words."""
    num_mixed: int = 0
    """Streams whose text is not that of the version that served them."""
    by_version: dict[str, int] = field(default_factory=dict)
    promote_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Bench:
    client: httpx2.AsyncClient
    num_tokens: int
    outcome: Outcome = field(default_factory=Outcome)

    async def prepare(self, sources: tuple[str, str]) -> dict[tuple[str, str], str]:
        """Register both versions; what each says to each prompt when nobody else asks."""
        for source in sources:
            body = {"name": NAME, "source": source}
            (await self.client.post("/v1/adapters", json=body)).raise_for_status()
        versions = [f"{NAME}@{number}" for number in (1, 2)]
        pairs = [(version, prompt) for version in versions for prompt in PROMPTS]
        return {pair: (await self.stream(*pair))[1] for pair in pairs}

    async def stream(self, model: str, prompt: str) -> tuple[str, str]:
        """(who served it, what it said). Raises ValueError for a stream that did not end well."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        text, is_done = "", False
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise ValueError(f"{reply.status_code}: {(await reply.aread())[:200]!r}")
            async for line in reply.aiter_lines():
                is_done = is_done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    frame = json.loads(line[6:])
                    if "error" in frame:
                        raise ValueError(str(frame["error"]))
                    text += frame["choices"][0]["delta"].get("content") or ""
            if not is_done:
                raise ValueError("the stream ended without [DONE]")
            return reply.headers["x-adapter"], text

    async def keep_asking(
        self, index: int, expected: dict[tuple[str, str], str], is_over: asyncio.Event
    ) -> None:
        turn = index
        while not is_over.is_set():
            prompt = PROMPTS[turn % len(PROMPTS)]
            turn += 1
            try:
                version, text = await self.stream(NAME, prompt)
            except (ValueError, httpx2.HTTPError) as error:
                self.outcome.failures.append(f"stream: {error}")
                continue
            self.outcome.num_streams += 1
            self.outcome.by_version[version] = self.outcome.by_version.get(version, 0) + 1
            self.outcome.num_mixed += expected[version, prompt] != text

    async def keep_promoting(self, num_promotes: int) -> None:
        for turn in range(num_promotes):
            begin_s = time.monotonic()
            reply = await self.client.post(f"/v1/adapters/{NAME}/promote", json={"version": 1 + turn % 2})
            if reply.status_code != 200 or reply.json()["version"] != 1 + turn % 2:
                self.outcome.failures.append(f"promote: {reply.status_code} {reply.text[:200]}")
            self.outcome.promote_ms.append(1000 * (time.monotonic() - begin_s))
            self.outcome.num_promotes += 1


async def run(
    url: str,
    *,
    sources: tuple[str, str],
    num_promotes: int,
    num_streams: int,
    num_tokens: int = 16,
    api_key: str | None = None,
) -> Outcome:
    """Raises httpx2.HTTPError if the server does not answer, or has no such packages."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx2.Limits(max_connections=num_streams + 4)
    async with httpx2.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=120, trust_env=False
    ) as client:
        bench = Bench(client, num_tokens)
        expected = await bench.prepare(sources)
        is_over = asyncio.Event()
        begin_s = time.monotonic()
        asking = [asyncio.create_task(bench.keep_asking(i, expected, is_over)) for i in range(num_streams)]
        await bench.keep_promoting(num_promotes)
        is_over.set()
        await asyncio.gather(*asking)
        bench.outcome.seconds = time.monotonic() - begin_s
        await client.delete(f"/v1/adapters/{NAME}")
        return bench.outcome


def figures(outcome: Outcome) -> dict[str, object]:
    """The outcome, with what it was measured on."""
    promote_ms = sorted(outcome.promote_ms)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False)
    values = {
        name: value for name, value in asdict(outcome).items() if name not in ("promote_ms", "failures")
    }
    return values | {
        "num_failures": len(outcome.failures),
        "promote_ms_p50": round(statistics.median(promote_ms), 2),
        "promote_ms_p99": round(promote_ms[int(0.99 * (len(promote_ms) - 1))], 2),
        "seconds": round(outcome.seconds, 2),
        "commit": head.stdout.strip(),
        "is_dirty": bool(dirty.stdout.strip()),
        "machine": platform.platform(),
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--sources", nargs=2, default=["french", "patterns"], metavar="FOLDER")
    parser.add_argument("--promotes", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=16)
    options = parser.parse_args()
    try:
        outcome = asyncio.run(
            run(
                options.url,
                sources=(options.sources[0], options.sources[1]),
                num_promotes=options.promotes,
                num_streams=options.streams,
                api_key=options.api_key,
            )
        )
    except httpx2.HTTPError as error:
        sys.stderr.write(f"no figures from {options.url}: {error}\n")
        return 2
    for failure in outcome.failures[:10]:
        sys.stderr.write(f"{failure}\n")
    sys.stdout.write(json.dumps(figures(outcome)) + "\n")
    return 1 if outcome.failures or outcome.num_mixed else 0


if __name__ == "__main__":
    raise SystemExit(main())
