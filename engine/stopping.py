"""StopMatcher: ends a text at the first stop string, and never shows the beginning of one that may still come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    stop: str


class StopMatcher:
    """The match that is completed first wins; of those completed by the same character, the longest. So the result does
    not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], is_included: bool = False) -> None:
        """``is_included`` leaves the stop string itself in the text. Raises ValueError for an empty one."""
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._is_included = is_included
        self._held = ""

    def feed(self, text: str) -> tuple[str, StopMatch | None]:
        """Text that may be shown, and the match that ended it. Nothing may be fed after a match."""
        self._held += text
        match = self._find()
        if match is not None:
            return match
        num_held = max((self._overlap(stop) for stop in self._stops), default=0)
        end = len(self._held) - num_held
        shown, self._held = self._held[:end], self._held[end:]
        return shown, None

    def flush(self) -> str:
        """At the end: what was held back."""
        shown, self._held = self._held, ""
        return shown

    def _find(self) -> tuple[str, StopMatch] | None:
        found = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if not ends:
            return None
        end, start, stop = min(ends)
        shown = self._held[: end if self._is_included else start]
        self._held = ""
        return shown, StopMatch(stop)

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
