"""sweep: the same rows through a grid of recipes: data checked once, base loaded once, each adapter judged alike.

Owns: what experiments share and may therefore not differ in, and how one is run in its folder. Does not know: grids,
tables (`sweep.py`). Place: above training runs; all of `lorikeet sweep`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from training.durable import write_whole
from training.evaluation import Judging, check_judging
from training.recipe.linter import advise
from training.recipe.recipe import Recipe
from training.recipe.sources import RecipeError, ResolvedRecipe
from training.run.bases import Bases
from training.run.begin import HUB, Surroundings
from training.run.data import RunData, gather
from training.run.failures import breaking, refusing
from training.run.foresight import foresee
from training.run.outcome import Refused
from training.run.rundir import RECIPE, RunFolder
from training.run.workbench import Workbench
from training.sweep.sweep import Experiment, ExperimentResult, SweepRow, SweepTable, run_sweep

SHARED: Final = (
    "data", "eval", "eval_split", "data_root", "format", "columns", "on_bad", "base", "revision", "precision",
    "max_length", "min_pixels", "max_pixels",
)  # fmt: skip
"""Keys that decide the rows or the base."""


@dataclass(frozen=True, slots=True)
class SweepRequest:
    """What was asked."""

    resolve: Callable[[Mapping[str, object]], ResolvedRecipe]
    """The recipe with other values for some keys. Raises RecipeError."""
    resolved: ResolvedRecipe
    """The recipe without changes."""
    experiments: Sequence[Experiment]
    folder: Path
    best_by: str = "bleu"


def sweep(request: SweepRequest, around: Surroundings) -> SweepTable:
    """Run what has not been run. Raises Refused before the first experiment, Broken if none can be run."""
    with refusing():
        _check(request, around)
        folder = RunFolder(request.folder, is_resumed=(request.folder / RECIPE).exists())
    with folder, refusing():
        write_whole(folder.recipe, request.resolved.as_yaml())
        recipe = request.resolved.recipe
        data = gather(recipe, request.folder.parent / HUB, folder, around.progress, around.ranks)
        around.progress.note(data.text())
        _check_judged(recipe, data)
        foresee(recipe, data).check()
        bases = Bases(recipe, around.progress, keeps_both=True)
        bench = Workbench(data, bases, around.make_generator, around.progress, around.ranks)
        return run_sweep(
            request.experiments,
            lambda changes: request.resolve(changes).recipe,
            lambda changed, place: _one(bench, changed, place),
            request.folder,
            best_by=request.best_by,
            context=f"{data.report.train.digest} {len(data.held_out)} {bases.training().spec.fingerprint}",
            on_begin=lambda experiment, number: around.progress.note(
                f"\n{experiment.name} ({number} of {len(request.experiments)})"
            ),
            on_row=lambda row: around.progress.note(_line(row)),
        )


def _check(request: SweepRequest, around: Surroundings) -> None:
    if around.ranks.count > 1:
        raise Refused("a sweep runs on one process: start it without accelerate launch")
    if not request.resolved.recipe.data:
        raise Refused("there is no data to train on: --data rows.jsonl")
    for key in sorted({key for experiment in request.experiments for key in experiment.changes}):
        if key in SHARED:
            raise Refused(
                f"the grid changes {key}, which all experiments of a sweep share: run one sweep for each"
            )
    for experiment in request.experiments:
        try:
            request.resolve(experiment.changes)
        except RecipeError as error:
            raise Refused(f"experiment {experiment.name}: {error}") from error


def _check_judged(recipe: Recipe, data: RunData) -> None:
    if not data.held_out:
        raise Refused(
            "a sweep compares on held-out rows, and there are none: --eval FILE, or --eval-split 0.1"
        )
    check_judging(Judging.of(recipe, ""), data.held_out, has_loss=True)
    problems = [advice.text for advice in advise(recipe, len(data.train)) if advice.level == "error"]
    if problems:
        raise Refused("\n".join(problems))


def _one(bench: Workbench, recipe: Recipe, folder: Path) -> ExperimentResult:
    """Train and judge one recipe; one that was stopped goes on."""
    started = time.monotonic()
    model = bench.attach(recipe)
    try:
        bench.gradients(model, recipe).check()
        with breaking():
            outcome = bench.train(model, recipe, folder, is_resumed=True)
            if outcome.ended == "interrupted":
                raise KeyboardInterrupt
            trained = bench.finish(model, recipe, outcome, folder / "adapter")
    finally:
        model.detach()
    with breaking():
        verdict = bench.judge(trained, recipe)
    verdict.write(folder)
    return ExperimentResult(
        verdict.adapter, verdict.base, verdict.passed, outcome.tokens_per_s, outcome.peak_bytes,
        time.monotonic() - started,
    )  # fmt: skip


def _line(row: SweepRow) -> str:
    return f"{row.experiment.name}: {row.verdict()}"
