"""Trace: the calls of one workload, frozen, and their digest. Values only.

Owns what a call is. Knows neither how it is sent nor what answers; an adapter is a number, which whoever sends turns
into a name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture by what draws it; the same values give the same bytes."""

    width: int
    height: int
    seed: int


@dataclass(frozen=True, slots=True)
class Call:
    """One request. Output lengths are exact: the end token is ignored."""

    index: int
    prompt: str
    num_tokens: int
    adapter: int | None = None
    """None is the base."""
    at_s: float = 0.0
    """When it is sent, from the start; a closed loop sends it when a stream is free."""
    system: str | None = None
    picture: Picture | None = None
    fan_out: int = 1
    """So many adapters answer it at once, from ``adapter`` on."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The calls of a workload in order."""

    name: str
    size: str
    calls: tuple[Call, ...]
    num_streams: int | None = None
    """How many calls are under way at once; None is an open loop, which sends by the clock."""

    @property
    def digest(self) -> str:
        """sha256 over everything that is sent and when."""
        content = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def num_adapters(self) -> int:
        """How many names the sender needs: one more than the highest number."""
        return max(
            (call.adapter + call.fan_out for call in self.calls if call.adapter is not None), default=0
        )

    def with_calls(self, calls: Sequence[Call]) -> Trace:
        return Trace(self.name, self.size, tuple(calls), self.num_streams)
