"""TokenBudget: so many tokens a minute, and whoever spends more waits until it is made good.

A bucket that holds one minute's tokens and fills at that rate. What a request comes to is known only when it has ended,
so a request may go ahead while anything is left and is charged as it goes; what it overdraws, later ones wait for. So
the long-run rate is the budget exactly, whatever the sizes. Knows no callers and no clock but the one that it is given.
"""

from __future__ import annotations

from collections.abc import Callable

MINUTE_S = 60.0


class TokenBudget:
    def __init__(self, tokens_per_minute: int, clock: Callable[[], float]) -> None:
        self.tokens_per_minute = tokens_per_minute
        self._clock = clock
        self._left = float(tokens_per_minute)
        self._seen_s = clock()

    def wait_s(self) -> float:
        """Seconds until something is left; 0 now."""
        self._fill()
        missing = 1.0 - self._left
        return max(0.0, missing * MINUTE_S / self.tokens_per_minute)

    def spend(self, num_tokens: int) -> None:
        """May overdraw."""
        self._fill()
        self._left -= num_tokens

    def _fill(self) -> None:
        now_s = self._clock()
        gained = (now_s - self._seen_s) * self.tokens_per_minute / MINUTE_S
        self._left = min(float(self.tokens_per_minute), self._left + gained)
        self._seen_s = now_s
