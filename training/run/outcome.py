"""How a run ends: its exit statuses, and the value that says what came of it.

Owns: both. docs/cookbook.md repeats the table of statuses, and a test compares them. Place in a training run: its last
word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path


class Exit(IntEnum):
    """The status of the process."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    GATE = 3
    DEPLOY = 4
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        return _MEANINGS[self]


_MEANINGS = {
    Exit.DONE: "all was done that was asked",
    Exit.FAILED: "training or judging broke off: a loss that is no number, modules that learn nothing, a full disk",
    Exit.REFUSED: "nothing was trained: a fault in recipe, data, base or run folder, or too little memory",
    Exit.GATE: "the adapter did not pass its gate: its package lies in package-refused, nothing was deployed",
    Exit.DEPLOY: "the package is written, and the server did not take it",
    Exit.INTERRUPTED: "stopped by Ctrl-C or SIGTERM with a checkpoint: --resume goes on",
}


class Refused(Exception):
    """What was asked cannot be done; nothing was trained. ``str()`` says what, the limit, and what to do."""


class Broken(Exception):
    """Training or judging could not go on."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came of a run."""

    status: Exit
    folder: Path | None
    """None for a dry run."""
    package: Path | None = None
    facts: Mapping[str, object] | None = None
    """Steps, seconds, scores and the like, as JSON values."""

    def as_json(self) -> dict[str, object]:
        return {
            "status": int(self.status),
            "outcome": self.status.name.lower(),
            "folder": None if self.folder is None else str(self.folder),
            "package": None if self.package is None else str(self.package),
            **(self.facts or {}),
        }
