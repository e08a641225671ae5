"""run_sweep: experiments over one loaded base, one after another, ending in a table.

    experiments = experiments_of([parse_axis("r=8,16"), parse_axis("alpha=16,32")])
    table = run_sweep(experiments, resolve, run_one, folder, best_by="bleu", context=data_digest)

``resolve`` makes a recipe of one experiment's changes; all are resolved before the first trains, so that a slip in the
last is not found in the morning. ``run_one`` trains and judges one recipe in the folder that it is given (and puts the
base back as it was, also when it fails). What it raises becomes a row with the reason, and the sweep goes on; only an
interruption (KeyboardInterrupt) ends it. A finished experiment leaves ``result.json`` in its folder and is read from
there when the sweep is run again, failed and interrupted ones are tried anew. After each experiment the table so far is
in ``sweep.txt``, ``sweep.md`` and ``sweep.json``; at the end the plot in ``sweep.png``.

Owns: that order, and the results' files. Does not know: how anything is trained. Place: above training runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from training.durable import write_whole
from training.evaluation.catalogue import measure
from training.recipe.recipe import Recipe
from training.sweep.grid import Experiment, SweepError, experiments_of, parse_axis, read_axes
from training.sweep.plot import draw_sweep
from training.sweep.table import ExperimentResult, SweepRow, SweepTable

__all__ = [
    "Experiment",
    "ExperimentResult",
    "SweepError",
    "SweepRow",
    "SweepTable",
    "draw_sweep",
    "experiments_of",
    "parse_axis",
    "read_axes",
    "run_sweep",
]

logger = logging.getLogger("lorikeet.training")
RESULT: Final = "result.json"
Resolve = Callable[[Mapping[str, object]], Recipe]
RunOne = Callable[[Recipe, Path], ExperimentResult]


def run_sweep(
    experiments: Sequence[Experiment],
    resolve: Resolve,
    run_one: RunOne,
    folder: Path,
    *,
    best_by: str = "bleu",
    context: str = "",
    on_begin: Callable[[Experiment, int], None] | None = None,
    on_row: Callable[[SweepRow], None] | None = None,
) -> SweepTable:
    """Run what has not been run. ``context`` stands for all that decides a result beside the recipe (the data's digest,
    the base's fingerprint). ``on_begin`` hears each experiment that is run and its number from 1, ``on_row`` every row.

    Raises MetricError for an unknown ``best_by``, SweepError for an experiment whose recipe does not resolve, or whose
    folder holds the result of something else.
    """
    measure(best_by)
    folder.mkdir(parents=True, exist_ok=True)
    recipes = [_resolved(experiment, resolve) for experiment in experiments]
    known = [
        _known(folder / experiment.name, _fingerprint(recipe, context))
        for experiment, recipe in zip(experiments, recipes, strict=True)
    ]
    table = SweepTable((), best_by)
    for number, (experiment, recipe) in enumerate(zip(experiments, recipes, strict=True), start=1):
        outcome: ExperimentResult | str | None = known[number - 1]
        if outcome is None:
            if on_begin is not None:
                on_begin(experiment, number)
            outcome = _run(experiment, recipe, run_one, folder / experiment.name, context)
        row = SweepRow(experiment, recipe.r, recipe.alpha, outcome)
        table = SweepTable((*table.rows, row), best_by)
        table.write(folder)
        if on_row is not None:
            on_row(row)
    draw_sweep(table, folder / "sweep.png")
    return table


def _resolved(experiment: Experiment, resolve: Resolve) -> Recipe:
    try:
        return resolve(experiment.changes)
    except Exception as error:  # whatever is wrong with a recipe, it is this experiment's
        raise SweepError(f"experiment {experiment.name}: {error}") from error


def _run(
    experiment: Experiment, recipe: Recipe, run_one: RunOne, folder: Path, context: str
) -> ExperimentResult | str:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = run_one(recipe, folder)
    except Exception as error:  # one experiment's end is not the sweep's
        logger.exception("sweep.failed experiment=%s", experiment.name)
        return f"{type(error).__name__}: {error}"
    content = {"fingerprint": _fingerprint(recipe, context), **result.as_json()}
    write_whole(folder / RESULT, json.dumps(content, indent=1) + "\n")
    logger.info("sweep.finished experiment=%s seconds=%.1f", experiment.name, result.seconds)
    return result


def _fingerprint(recipe: Recipe, context: str) -> str:
    return hashlib.sha256(f"{recipe!r}\n{context}".encode()).hexdigest()


def _known(folder: Path, fingerprint: str) -> ExperimentResult | None:
    """The result that is there already."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        is_same = content.pop("fingerprint") == fingerprint
        result = ExperimentResult(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SweepError(f"{path} is no result of a sweep ({error}): remove it to run it again") from error
    if not is_same:
        raise SweepError(
            f"{path} is the result of another recipe, other data or another base: "
            "choose another folder for this sweep, or remove that one"
        )
    return result
