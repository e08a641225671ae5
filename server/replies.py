"""What a finished request answers: ids, usage, timings and the bodies of whole responses.

Pure, but for ids and the clock. Place in a request's way: step 11.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from adapters.ref import AdapterRef
from engine.messages import Timings, TokenLogprob
from engine.stream import Delta, Finish
from server.generation import Event
from server.state import ServerState


@dataclass(frozen=True, slots=True)
class Head:
    """What every body and every frame of one response begins with."""

    id: str
    created: int
    """Unix seconds."""
    model: str
    system_fingerprint: str

    @classmethod
    def make(cls, prefix: str, model: str, base_fingerprint: str) -> Head:
        response_id = f"{prefix}-{secrets.token_hex(16)}"
        return cls(response_id, int(time.time()), model, f"fp_{base_fingerprint[:12]}")

    def fields(self, kind: str) -> dict[str, object]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


MAX_ADAPTER_HEADER = 2048
"""Characters: a proxy commonly takes 4 KiB of headers in all. One composition of the longest names fits."""


def headers_of(adapters: Sequence[AdapterRef], state: ServerState) -> dict[str, str]:
    """Who served it; ``x-request-id`` comes from the middleware. Each choice of several names its own, too."""
    names = ", ".join(map(str, adapters))
    if len(names) > MAX_ADAPTER_HEADER:
        names = names[: MAX_ADAPTER_HEADER - 3] + "..."
    return {"x-adapter": names, "x-base": state.base.name}


# ---- collecting ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Collected:
    """One choice, as far as it has come."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None

    def take(self, item: Delta | Finish) -> None:
        if isinstance(item, Finish):
            self.finish = item
            return
        self.text.append(item.text)
        self.token_ids += item.token_ids
        self.logprobs += item.logprobs
        if item.prompt_logprobs is not None:
            self.prompt_logprobs = item.prompt_logprobs

    @property
    def end(self) -> Finish:
        if self.finish is None:
            raise RuntimeError("a choice was read before it was finished")
        return self.finish


async def collect(events: AsyncIterator[Event], num_choices: int) -> list[Collected]:
    """Every choice, finished. Raises EngineError."""
    choices = [Collected() for _ in range(num_choices)]
    async for index, item in events:
        choices[index].take(item)
    return choices


# ---- usage and timings -----------------------------------------------------------------------------------------


def usage_of(finishes: Sequence[Finish], n: int) -> dict[str, object]:
    """OpenAI's ``usage``: each prompt counts once, however many of its ``n`` choices were made."""
    firsts = [finish.usage for finish in finishes[::n]]
    return usage(
        prompt_tokens=sum(first.prompt_tokens for first in firsts),
        completion_tokens=sum(finish.usage.completion_tokens for finish in finishes),
        cached_tokens=sum(first.cached_tokens for first in firsts),
        image_tokens=sum(first.image_tokens for first in firsts),
    )


def usage(
    *, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, image_tokens: int = 0
) -> dict[str, object]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": cached_tokens,
            "image_tokens": image_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def server_timing(timings: Sequence[Timings]) -> str:
    """The Server-Timing header, milliseconds; of several choices the longest of each phase."""
    phases = {
        "queue": max(t.queue_s for t in timings),
        "swap": max(t.swap_s for t in timings),
        "prefill": max(t.prefill_s for t in timings),
        "decode": max(t.decode_s for t in timings),
    }
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in phases.items())
