"""What the tools for finished adapters answer instead of working.

ToolRefused                the root; ``str()`` says what, why, and what to do
├── BaseNotAtHand          the base's weights are needed and are not on this machine
├── ImportRefused          a foreign adapter that cannot be served (``reasons``: every one that was found)
├── ExportRefused          a merge that would not be the base with its adapter
└── FolderRefused          the folder to write to holds something

Owns the tree and nothing else. Place in a training run: none; export, import, shrink and inspect come after it.
"""

from __future__ import annotations

from pathlib import Path


class ToolRefused(Exception):
    """Root of the tree."""


class BaseNotAtHand(ToolRefused):
    pass


class ImportRefused(ToolRefused):
    """``reasons`` holds each thing that is wrong, as one line that says what to do."""

    def __init__(self, *reasons: str) -> None:
        self.reasons = reasons
        listed = reasons[0] if len(reasons) == 1 else "\n  - ".join(("", *reasons))
        super().__init__(f"the adapter cannot be imported: {listed}")


class ExportRefused(ToolRefused):
    pass


class FolderRefused(ToolRefused):
    def __init__(self, folder: Path, why: str) -> None:
        self.folder = folder
        super().__init__(f"cannot write {folder}: {why}")
