"""Phases: a tool's counts, shown as the bars of a run are.

Owns: which bar is open. Tools say (phase, done, total), judging says begin and advance; both come to the same bars.
Place in a training run: none; beside the tools for finished adapters.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.run.progress import Bar, Progress


class Phases:
    """One bar at a time. Use as a context."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stack = ExitStack()
        self._name = ""
        self._bar: Bar | None = None

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` pieces of a phase; a phase that is done closes its bar."""
        if phase != self._name or self._bar is None:
            self.begin(phase, total)
        if self._bar is not None:
            self._bar.reach(done)
        if done >= total:
            self._close()

    def begin(self, phase: str, total: int) -> None:
        self._close()
        self._name = phase
        self._bar = self._stack.enter_context(self._progress.phase(phase, total))

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance()

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Bar]:
        """A bar of somebody else's, after ours is closed: two cannot be shown at once."""
        self._close()
        return self._progress.phase(name, total)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def _close(self) -> None:
        self._bar = None
        self._stack.close()
