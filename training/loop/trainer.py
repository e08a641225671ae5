"""train: from an attached adapter to a trained one.

    feed -> gradient of one step (all micro-batches, all processes) -> optimizer -> log, observer
                                                                    -> evaluation -> checkpoint

transformers' Trainer turns the wheel (`loop.py`). Several processes hold the same adapter and add their gradients;
nothing is sharded, since the base is frozen and in 4 bits and the adapter is small.

What lies in the run's folder afterwards: ``log.jsonl``, ``loss.png``, ``checkpoints/``, and ``runs/`` with
tensorboard's files if it was asked for. The trained weights are in the model; whoever called writes them.

Owns: how a run begins, goes on and ends. Does not know: files of data, packages, engines. Place in a training run: the
phase "train".
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from training.data.labels import Labeller
from training.loop.checkpoints import (
    ADAPTER,
    FOLDER,
    Checkpoint,
    Checkpoints,
    Identity,
    ResumeRefused,
    RunState,
)
from training.loop.course import Course, outcome_of
from training.loop.feed import RowLost, StepFeed, UnevenProcesses, step_sampler
from training.loop.identity import identity_of
from training.loop.interrupt import StopRequest
from training.loop.loop import Loop
from training.loop.observer import (
    Ended,
    EvalHook,
    EvalReport,
    NonFiniteLoss,
    StepReport,
    TrainObserver,
    TrainOutcome,
)
from training.loop.optimizers import OptimizerUnavailable
from training.loop.parts import LoopParts
from training.loop.plots import PLOT, plot_loss
from training.loop.ranks import Ranks, ranks_now
from training.loop.reporters import ReporterMissing, check_reporters
from training.loop.runlog import LOG, RunLog
from training.loop.stages import StageError, plan_stages
from training.loop.validation import Validation
from training.model.augment import augmentation
from training.model.collator import Collator

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.model.collator import Examples
    from training.model.model import AdaptedBase
    from training.recipe.recipe import Recipe

__all__ = [
    "Ended", "EvalHook", "EvalReport", "LaunchRefused", "NonFiniteLoss", "OptimizerUnavailable", "ReporterMissing",
    "ResumeRefused", "RowLost", "StageError", "StepReport", "TrainObserver", "TrainOutcome", "UnevenProcesses",
    "train",
]  # fmt: skip

PATIENCE: Final = timedelta(hours=12)
"""How long processes wait for one another: the first may be writing answers in an evaluation."""


class LaunchRefused(Exception):
    """``accelerate`` was set up for what this run does not do."""


def train(
    model: AdaptedBase,
    train_rows: Examples,
    eval_rows: Examples | None,
    recipe: Recipe,
    folder: Path,
    observer: TrainObserver,
    *,
    eval_hook: EvalHook | None = None,
    resume: bool = False,
) -> TrainOutcome:
    """Train the adapter of ``model`` in place, on one process or on each of several.

    With ``resume`` a run that stopped in ``folder`` goes on, from its beginning if it left no checkpoint; without, the
    folder may hold none. Ctrl-C and SIGTERM end the run at the next step boundary with a checkpoint.

    Raises NonFiniteLoss; and before the first step ReporterMissing, OptimizerUnavailable, StageError, UnevenProcesses,
    ResumeRefused and LaunchRefused; RowLost when a picture has gone since it was checked.
    """
    check_reporters(recipe.report_to)
    arguments = _arguments(model, recipe, folder)
    ranks = ranks_now()
    sampler = step_sampler(train_rows, recipe, ranks)
    timeline = plan_stages(recipe, model.targets.parts, sampler.num_steps)
    arguments.max_steps = timeline.num_steps
    identity = identity_of(recipe, model.base, train_rows, eval_rows)
    checkpoints = Checkpoints(folder / FOLDER, recipe.keep_checkpoints)
    found = _beginning(checkpoints, identity, ranks, resume=resume)
    if found is not None and found.state.ended is not None:
        return _ended_before(model, checkpoints, found, recipe)
    log = RunLog(folder / LOG, found.state.log_bytes if found else 0) if ranks.is_first else None
    course = Course(recipe, timeline, observer, _memory(model), found.state if found else RunState(), log)
    if found is not None:
        course.note(f"goes on after step {found.state.step} of {timeline.num_steps}")
    labeller = Labeller(model.base.processor)
    collate = Collator(labeller, augmentation(recipe.augment), recipe.seed)
    validation = (
        None if eval_rows is None else Validation(eval_rows, Collator(labeller), recipe.micro_batch, ranks)
    )
    with StopRequest() as stop:
        parts = LoopParts(
            model, recipe, timeline, StepFeed(train_rows, collate, sampler, timeline, ranks), course, checkpoints,
            identity, ranks, stop, validation, eval_hook,
        )  # fmt: skip
        ended = _run(parts, arguments, found, log)
    if ended != "interrupted":
        _take_best(model, checkpoints, course.state, recipe)
    return course.outcome(ended)


def _run(
    parts: LoopParts, arguments: TrainingArguments, found: Checkpoint | None, log: RunLog | None
) -> Ended:
    try:
        loop = Loop(parts, arguments)
        _check_launch(loop)
        loop.train(resume_from_checkpoint=None if found is None else str(found.folder))
    except NonFiniteLoss as error:
        parts.course.broke(error)
        raise
    finally:
        parts.model.zero_grad(set_to_none=True)
        parts.model.eval()
        if log is not None:
            log.close()
            plot_loss(log.path, log.path.with_name(PLOT))
    return loop.ended


def _arguments(model: AdaptedBase, recipe: Recipe, folder: Path) -> TrainingArguments:
    """Trainer's, with all of its own habits off. Joins the processes of the run."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=1,  # a step's micro-batches are one batch to Trainer
        max_steps=1,
        max_grad_norm=0.0,  # `step.py` clips
        seed=recipe.seed,
        report_to=list(recipe.report_to) or ["none"],
        disable_tqdm=True,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        ignore_data_skip=True,  # the feed begins where the run does
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=model.base.device.type == "cpu",
        ddp_timeout=int(PATIENCE.total_seconds()),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # more GPUs are used by more processes, not by threads
    return arguments


def _check_launch(loop: Loop) -> None:
    if loop.is_deepspeed_enabled or loop.is_fsdp_enabled:
        raise LaunchRefused(
            "the launcher asks for DeepSpeed or FSDP, and there is nothing to shard: the base is frozen and in 4 bits,"
            " only the small adapter has gradients; launch with --multi_gpu (or --cpu) alone"
        )
    precision = loop.accelerator.mixed_precision
    if precision not in ("no", None):
        raise LaunchRefused(
            f"the launcher asks for mixed precision {precision}; the recipe's precision decides that, layer by layer:"
            " launch with --mixed_precision no"
        )


def _beginning(
    checkpoints: Checkpoints, identity: Identity, ranks: Ranks, *, resume: bool
) -> Checkpoint | None:
    """The checkpoint to go on from; None to begin at the first step. Raises ResumeRefused."""
    found = checkpoints.resumable(identity) if resume and checkpoints.newest() is not None else None
    if not resume and checkpoints.newest() is not None:
        raise ResumeRefused(
            f"{checkpoints.folder} holds checkpoints of a run: go on with it (resume), or name another folder"
        )
    ranks.wait()
    if ranks.is_first:
        checkpoints.remove_broken()
    ranks.wait()
    return found


def _ended_before(
    model: AdaptedBase, checkpoints: Checkpoints, found: Checkpoint, recipe: Recipe
) -> TrainOutcome:
    """Nothing is left to do but to have its weights."""
    model.load_state(load_file(found.adapter))
    _take_best(model, checkpoints, found.state, recipe)
    return outcome_of(found.state, "early_stopping" if found.state.ended == "early_stopping" else "finished")


def _take_best(model: AdaptedBase, checkpoints: Checkpoints, state: RunState, recipe: Recipe) -> None:
    """With early stopping, a run ends with its best adapter."""
    if recipe.early_stopping is not None and state.best_step is not None:
        model.load_state(load_file(checkpoints.best(state.best_step) / ADAPTER))


def _memory(model: AdaptedBase) -> Callable[[], int]:
    """CUDA: the peak since now. Otherwise what the process holds."""
    device = model.base.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    process = psutil.Process()
    return lambda: int(process.memory_info().rss)
