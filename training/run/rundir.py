"""RunFolder: where one training run keeps all that it was asked, did and found.

Owns: the names of its files, who may write there (one process at a time, by a lock that dies with it), and that each
file is whole or absent. Does not know: what the files say. Place in a training run: opened before the first phase,
closed after the last.

RunFolderError, a folder that cannot be used, is the only error.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Final

from training.durable import write_whole

RECIPE: Final = "recipe.yaml"
LOG: Final = "log.jsonl"
LOCK: Final = ".lock"


class RunFolderError(Exception):
    """The folder holds something else, a run already, no run to go on with, or somebody else's."""


class RunFolder:
    """One run's folder, held by this process until ``close``. Use as a context."""

    def __init__(self, root: Path, *, is_resumed: bool = False, is_overwritten: bool = False) -> None:
        """Take ``root``, which is made if need be. Raises RunFolderError."""
        self.root: Final = root
        self._lock: int | None = None
        if is_resumed and is_overwritten:
            raise RunFolderError(
                "a run is either resumed or overwritten: give one of --resume and --overwrite"
            )
        self._make()
        self._lock = _locked(root)
        try:
            self._settle(is_resumed, is_overwritten)
        except RunFolderError:
            self.close()
            raise

    # ---- what lies where

    @property
    def recipe(self) -> Path:
        """The recipe as resolved, each value with its origin."""
        return self.root / RECIPE

    @property
    def data(self) -> Path:
        """The report on the data, as JSON."""
        return self.root / "data.json"

    @property
    def quarantine(self) -> Path:
        """The faults of rows that were left out, as JSON lines."""
        return self.root / "quarantine.jsonl"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def gradients(self) -> Path:
        """The gradient table of one real batch; beside it the same as JSON."""
        return self.root / "gradients.txt"

    @property
    def scores(self) -> Path:
        """Adapter beside base, the gate and the verdict; beside it the same as Markdown."""
        return self.root / "scores.json"

    @property
    def samples(self) -> Path:
        """Held-out questions answered at each evaluation, beside the base, as JSON lines."""
        return self.root / "samples.jsonl"

    @property
    def samples_sheet(self) -> Path:
        """The last of them, drawn."""
        return self.root / "samples.png"

    @property
    def adapter(self) -> Path:
        """The trained weights as a plain PEFT folder, before they are judged."""
        return self.root / "adapter"

    @property
    def package(self) -> Path:
        """The package of an adapter that passed the gate."""
        return self.root / "package"

    @property
    def refused_package(self) -> Path:
        """The package of one that did not: to look at, never deployed."""
        return self.root / "package-refused"

    # ---- writing

    def write_json(self, path: Path, value: object) -> None:
        write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    # ---- holding it

    def close(self) -> None:
        """Let others have it. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"cannot make the run folder {self.root}: {error.strerror}; name another with --out"
            ) from error

    def _settle(self, is_resumed: bool, is_overwritten: bool) -> None:
        """A run that ended before its first step (bad data, say) is begun again without being asked."""
        has_run, has_trained = self.recipe.exists(), (self.root / LOG).exists()
        others = [entry.name for entry in self.root.iterdir() if entry.name != LOCK]
        if is_resumed and not has_run:
            raise RunFolderError(f"{self.root} holds no run to go on with: leave out --resume")
        if others and not has_run:
            raise RunFolderError(
                f"{self.root} holds other things than a run ({', '.join(sorted(others)[:3])}): name an empty folder"
                " with --out"
            )
        if has_trained and not (is_resumed or is_overwritten):
            raise RunFolderError(
                f"{self.root} holds a run already: --resume goes on with it, --overwrite deletes it and begins again,"
                " --out names another folder"
            )
        if not is_resumed:
            self._empty()

    def _empty(self) -> None:
        """The recipe last: what is half deleted is still known for a run."""
        for entry in self.root.iterdir():
            if entry.name not in (LOCK, RECIPE):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.recipe.unlink(missing_ok=True)


def _locked(root: Path) -> int:
    try:
        descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFolderError(f"cannot write in {root}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunFolderError(
            f"another process is at work in {root}: wait for it, or name another folder with --out"
        ) from error
    return descriptor
