"""Which errors of the phases mean that nothing was trained, and which that training broke off.

Owns: those two lists. Each known error says itself what is wrong and what to do; what is not listed is a fault of ours
and keeps its traceback. Place in a training run: around its halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from adapters.errors import AdapterError
from base.errors import BaseNotFound, UnsupportedBase
from training.data.dataset import DataRejected
from training.data.faults import RowRejected
from training.data.hub import DataSourceError
from training.evaluation import EvaluationError
from training.loop.checkpoints import ResumeRefused
from training.loop.feed import RowLost, UnevenProcesses
from training.loop.observer import NonFiniteLoss
from training.loop.optimizers import OptimizerUnavailable
from training.loop.reporters import ReporterMissing
from training.loop.stages import StageError
from training.loop.trainer import LaunchRefused
from training.model.gradients import DeadModules
from training.recipe.file import RecipeError
from training.run.outcome import Broken, Refused
from training.run.rundir import RunFolderError
from training.sweep.grid import SweepError
from training.targets.targets import TargetsError
from training.tools.refusals import FolderRefused

NEVER_BEGAN: Final = (
    RecipeError, DataRejected, DataSourceError, RunFolderError, BaseNotFound, UnsupportedBase, TargetsError,
    StageError, EvaluationError, DeadModules, SweepError,
)  # fmt: skip
NOT_STARTED: Final = (
    ResumeRefused, UnevenProcesses, OptimizerUnavailable, StageError, ReporterMissing, LaunchRefused,
)  # fmt: skip
"""What training itself says before its first step."""
BROKE_OFF: Final = (
    NonFiniteLoss,
    RowLost,
    AdapterError,
    EvaluationError,
    FolderRefused,
    OSError,
    torch.OutOfMemoryError,
)


@contextmanager
def refusing() -> Iterator[None]:
    """Raises Refused for what the phases before training say."""
    try:
        yield
    except NEVER_BEGAN as error:
        raise Refused(str(error)) from error


@contextmanager
def breaking() -> Iterator[None]:
    """Raises Broken for what training and the phases after it say, Refused where training never began."""
    try:
        yield
    except NOT_STARTED as error:
        raise Refused(str(error)) from error
    except RowRejected as error:
        raise Broken(f"a picture cannot be opened any more: {error.complaint.value}") from error
    except BROKE_OFF as error:
        raise Broken(f"{error}") from error
