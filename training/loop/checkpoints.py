"""Checkpoints: what a run needs to go on as if it had never stopped, each one complete or absent.

A checkpoint is written under a hidden name, every file of it forced to the disk, a list of its files and their sizes
last of all; then it is renamed. Whatever a kill leaves behind bears the hidden name, or lacks a file: it is passed over
and removed. An older checkpoint is removed only once a newer one stands.

No weight of the base is in one: the adapter (safetensors), the optimizer's memory of it (safetensors and JSON), and the
run's own state (JSON). Random streams need no file: each micro-batch draws from a stream of its own, made of the
recipe's seed and its place in the run (`step.py`).

Owns: the folder's layout and the order of writing. Does not know: models, optimizers, what is in the files beyond their
sizes. Place in a training run: between steps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from training.durable import sync

FOLDER: Final = "checkpoints"
ADAPTER: Final = "adapter.safetensors"
_STATE: Final = "run.json"
_STEP: Final = "step-"
_BEST: Final = "best-"
_DRAFT: Final = "."


class ResumeRefused(Exception):
    """There is nothing to go on with, or it belongs to another run."""


@dataclass(frozen=True, slots=True)
class RunState:
    """What is known of a run between two steps, beside tensors."""

    step: int = 0
    """Optimizer steps done."""
    num_tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    last_loss: float = 0.0
    log_bytes: int = 0
    """How long the log was."""
    line_total: float = 0.0
    """Loss over the labels of the steps since the log's last line."""
    line_labels: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    num_worse: int = 0
    """Evaluations since the best one."""
    ended: str | None = None
    """Why no step follows; None while some do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Of which run a checkpoint is: all that decides what its adapter becomes."""

    data: Mapping[str, str] = field(default_factory=dict)
    """``train`` and ``eval``, and the digest of each one's rows."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """Dotted key -> JSON value."""

    def differences(self, other: Identity) -> tuple[str, ...]:
        """What is not the same in ``other``, a line each."""
        then, now = self._flat(), other._flat()
        return tuple(
            f"{key}: {_shown(then, key)} then, {_shown(now, key)} now"
            for key in sorted({*then, *now})
            if then.get(key) != now.get(key)
        )

    def _flat(self) -> dict[str, object]:
        return {**self.recipe, **{f"data.{split}": digest[:12] for split, digest in self.data.items()}}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that is complete."""

    folder: Path
    state: RunState
    identity: Identity

    @property
    def adapter(self) -> Path:
        return self.folder / ADAPTER


class Checkpoints:
    """Those of one run. Only the first process writes."""

    def __init__(self, folder: Path, num_kept: int) -> None:
        self.folder: Final = folder
        self._num_kept = num_kept

    def newest(self) -> Checkpoint | None:
        return next(reversed(self.complete()), None)

    def complete(self) -> list[Checkpoint]:
        """Oldest first."""
        if not self.folder.is_dir():
            return []
        found = [_opened(path) for path in self.folder.iterdir() if path.name.startswith(_STEP)]
        return sorted((one for one in found if one is not None), key=lambda one: one.state.step)

    def resumable(self, identity: Identity) -> Checkpoint:
        """The newest complete one. Raises ResumeRefused."""
        newest = self.newest()
        if newest is None:
            raise ResumeRefused(
                f"{self.folder} holds no complete checkpoint to go on from: start without resume"
            )
        different = newest.identity.differences(identity)
        if different:
            raise ResumeRefused(
                "this is not the run that was stopped:\n  " + "\n  ".join(different)
                + "\nrestore these, or start another run"
            )  # fmt: skip
        return newest

    def write(self, state: RunState, identity: Identity, fill: Callable[[Path], None]) -> Path:
        """A checkpoint of ``state``; ``fill`` puts everything else into the folder that it is given."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"{_STEP}{state.step:06d}"
        draft = self._draft(final.name)
        fill(draft)
        sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
        record = {
            "state": asdict(state),
            "data": dict(identity.data),
            "recipe": dict(identity.recipe),
            "files": sizes,
        }
        (draft / _STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self._settle(draft, final)
        self._remove_old(state)
        return final

    def write_best(self, step: int, fill: Callable[[Path], None]) -> None:
        """The adapter after ``step``, by itself; earlier ones go with the checkpoints that name them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.best(step)
        draft = self._draft(final.name)
        fill(draft)
        self._settle(draft, final)

    def best(self, step: int) -> Path:
        """Where the best adapter of ``step`` lies."""
        return self.folder / f"{_BEST}{step:06d}"

    def remove_broken(self) -> None:
        """What a kill left half written."""
        if not self.folder.is_dir():
            return
        whole = {one.folder for one in self.complete()}
        for path in self.folder.iterdir():
            if path.name.startswith(_DRAFT) or (path.name.startswith(_STEP) and path not in whole):
                shutil.rmtree(path)

    def clear(self) -> None:
        """Remove all, for a run that begins anew."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _draft(self, name: str) -> Path:
        draft = self.folder / f"{_DRAFT}{name}.draft"
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir()
        return draft

    def _settle(self, draft: Path, final: Path) -> None:
        for path in draft.iterdir():
            sync(path)
        sync(draft)
        if final.exists():  # of the same step, broken or from a run that was resumed before it
            shutil.rmtree(final)
        draft.rename(final)
        sync(self.folder)

    def _remove_old(self, state: RunState) -> None:
        complete = self.complete()
        for old in complete[: -self._num_kept]:
            shutil.rmtree(old.folder)
        needed = {one.state.best_step for one in complete[-self._num_kept :]} | {state.best_step}
        kept = {self.best(step) for step in needed if step is not None}
        for path in self.folder.glob(f"{_BEST}*"):
            if path not in kept:
                shutil.rmtree(path)


def _opened(folder: Path) -> Checkpoint | None:
    """None for one that is not complete."""
    try:
        record = json.loads((folder / _STATE).read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
        identity = Identity(record["data"], record["recipe"])
        checkpoint = Checkpoint(folder, RunState(**record["state"]), identity)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return checkpoint if sizes == record["files"] else None


def _shown(recipe: Mapping[str, object], key: str) -> str:
    return json.dumps(recipe[key], ensure_ascii=False) if key in recipe else "not there"
