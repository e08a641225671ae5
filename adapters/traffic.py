"""Traffic: how an alias is split between versions of its adapter, and which version gets a copy to be compared.

Owns the choice of a side, which is pure: the same alias, salt and key always come to the same version, on every server
and after every restart, and a changed weight moves as few keys as can be. Knows no request and no registry.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

MAX_SIDES = 16
MAX_WEIGHT = 1e6


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version that answers copies of requests; nobody is sent what it says."""

    version: int
    share: float
    """Of the alias's requests, above 0 to 1."""
    tokens_per_minute: int | None = None
    """Prompt and answer together; None is what idle time gives."""


@dataclass(frozen=True, slots=True)
class Traffic:
    weights: Mapping[int, float]
    """By version; shares are these over their sum."""
    sticky: str = "user"
    """Where a request's key is: ``user``, ``header:<name>`` or ``metadata:<key>``."""
    salt: str = ""
    """Another salt deals all keys anew."""
    shadow: Shadow | None = None

    def side(self, alias: str, key: str, live: Collection[int]) -> int | None:
        """The version of one key, among those that are there; None when none of them has weight.

        Rendezvous hashing with weights (Thaler and Ravishankar 1998; Schindelhauer and Schomaker 2005): each version
        draws from the key's hash, and the best draw wins. So a version whose weight grows only gains keys, and keys
        never move between the others.
        """
        sides = [number for number, weight in self.weights.items() if weight > 0 and number in live]
        if not sides:
            return None
        return max(sides, key=lambda number: (self._draw(alias, number, key), -number))

    def _draw(self, alias: str, number: int, key: str) -> float:
        return -self.weights[number] / math.log(_uniform(alias, self.salt, str(number), key))


def _uniform(*words: str) -> float:
    """Above 0 and below 1, from SHA-256. Each word comes with its length, so that no two lists are one text."""
    text = "".join(f"{len(word)}:{word}" for word in words)
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])
    return ((number >> 11) + 0.5) / 2**53
