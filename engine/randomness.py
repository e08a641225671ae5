"""RandomStream: one sequence's random numbers, addressed by token index.

There is no generator that advances: the number for token i is a hash of (seed, i). So a request with a seed gives the
same tokens whatever its neighbours, its chunking, and however often a step had to be retried.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

_WORD = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""Of SplitMix64 (Steele, Lea, Flood 2014), as are the two multipliers below."""


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


@dataclass(frozen=True, slots=True)
class RandomStream:
    """SplitMix64's sequence, read at any index."""

    key: int

    @classmethod
    def from_seed(cls, seed: int | None) -> RandomStream:
        """Any integer is a seed; None takes one from the operating system."""
        chosen = secrets.randbits(64) if seed is None else seed
        return cls(_mix((chosen + _GOLDEN_GAMMA) & _WORD))

    def uniform(self, index: int) -> float:
        """In [0, 1), with 53 random bits."""
        return (_mix((self.key + (index + 1) * _GOLDEN_GAMMA) & _WORD) >> 11) * 2.0**-53
