"""run: the phases of `lorikeet train-adapter`, one after another, each with its file in the run folder.

    check data -> plan memory -> load base -> attach -> check gradients -> train -> judge -> gate -> package -> deploy

Owns: that order, and what an adapter's failing its gate leads to: a package to look at, and no deploy. Does not know:
how any phase does its work, flags, engines (a GeneratorFactory is given).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from training.bases import Bases
from training.deploy import DeployError, deploy
from training.evaluation import Judging, Verdict, check_judging
from training.failures import breaking, refusing
from training.generation import GeneratorFactory
from training.linter import advise
from training.model import AdaptedBase
from training.outcome import Exit, Refused, RunResult
from training.progress import Progress
from training.ranks import Ranks
from training.recipe import Recipe
from training.recipe_sources import RecipeError, ResolvedRecipe, resolve_recipe
from training.run_data import RunData, gather
from training.run_package import write_run_package
from training.run_plan import foresee
from training.rundir import RunFolder
from training.workbench import Trained, Workbench

logger = logging.getLogger("lorikeet.training")
HUB: Final = ".hub"
"""Beside the run folders: data sets of the hub, which runs share."""


@dataclass(frozen=True, slots=True)
class DeployTo:
    """A running server."""

    url: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What was asked."""

    resolved: ResolvedRecipe
    folder: Path
    is_resumed: bool = False
    is_overwritten: bool = False
    is_dry: bool = False
    """Check the data and the plan; write and train nothing."""
    deploy_to: DeployTo | None = None

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run works with, besides what was asked."""

    make_generator: GeneratorFactory
    progress: Progress
    ranks: Ranks


def run(request: RunRequest, around: Surroundings) -> RunResult:
    """All phases. Raises Refused while nothing has been trained, Broken later."""
    with refusing():
        _check(request)
        if request.is_dry:
            _, plan = _prepare(request, around, None)
            return RunResult(Exit.DONE, None, facts=plan)
    with _opened(request, around.ranks) as folder:
        with refusing():
            data, _ = _prepare(request, around, folder)
            recipe = _judgeable(request, data)
            bench = Workbench(
                data, Bases(recipe, around.progress), around.make_generator, around.progress, around.ranks
            )
            model = bench.attach(recipe)
            _check_gradients(bench, model, recipe, folder, around.progress)
        with breaking():
            trained = _train(bench, model, recipe, request, folder)
            del model  # with it goes the last hold on the training base
            if not isinstance(trained, Trained) or folder is None:
                return RunResult(Exit.INTERRUPTED if trained == "interrupted" else Exit.DONE, request.folder)
            return _conclude(bench, trained, recipe, request, folder, around)


# ---- before anything is trained


def _check(request: RunRequest) -> None:
    recipe = request.recipe
    if not recipe.name:
        raise Refused("the adapter has no name: --name invoice")
    if not recipe.data:
        raise Refused("there is no data to train on: --data rows.jsonl")
    problems = [advice.text for advice in advise(recipe) if advice.level == "error"]
    if problems:
        raise Refused("\n".join(problems))


@contextmanager
def _opened(request: RunRequest, ranks: Ranks) -> Iterator[RunFolder | None]:
    """The run folder, on the first process."""
    if not ranks.is_first:
        ranks.wait()
        yield None
        return
    with refusing():
        folder = RunFolder(
            request.folder, is_resumed=request.is_resumed, is_overwritten=request.is_overwritten
        )
    with folder:
        if not (request.is_resumed and _is_of(request.recipe, folder.recipe)):
            folder.write_text(folder.recipe, request.resolved.as_yaml())
        ranks.wait()
        yield folder


def _is_of(recipe: Recipe, file: Path) -> bool:
    """Whether ``file`` says the same already, with the first origin of each value."""
    try:
        return resolve_recipe(file, {}).recipe == recipe
    except RecipeError:
        return False


def _prepare(
    request: RunRequest, around: Surroundings, folder: RunFolder | None
) -> tuple[RunData, dict[str, object]]:
    """Check the data and foresee memory and time; the plan as JSON. Raises Refused and what ``refusing`` knows."""
    recipe, progress = request.recipe, around.progress
    for note in request.resolved.notes:
        progress.note(f"note: {note}")
    data = gather(recipe, request.folder.parent / HUB, folder, progress, around.ranks)
    progress.note(data.text())
    for advice in advise(recipe, len(data.train)):
        progress.note(str(advice))
    plan = foresee(recipe, data)
    progress.note(plan.text())
    if folder is not None:
        folder.write_json(folder.plan, plan.as_json())
    plan.check()
    return data, {"data": data.as_json(), "plan": plan.as_json()}


def _judgeable(request: RunRequest, data: RunData) -> Recipe:
    """The recipe, its gate read; without rows to judge on there is no gate, and nothing is deployed unasked."""
    recipe = request.recipe
    if not data.held_out:
        if "gate" in request.resolved.origins and request.resolved.origins["gate"] != "default":
            raise Refused("the gate has no held-out rows to be held on: give --eval FILE, or --gate none")
        if request.deploy_to is not None and recipe.gate:
            raise Refused(
                "no rows are held out, so nothing can be judged before it is deployed: give --eval FILE, or --gate none"
                " to deploy it unjudged"
            )
        return replace(recipe, gate=())
    check_judging(Judging.of(recipe, ""), data.held_out, has_loss=True)
    return recipe


def _check_gradients(
    bench: Workbench, model: AdaptedBase, recipe: Recipe, folder: RunFolder | None, progress: Progress
) -> None:
    table = bench.gradients(model, recipe)
    if folder is not None:
        folder.write_text(folder.gradients, table.text() + "\n")
        folder.write_json(folder.gradients.with_suffix(".json"), table.as_json())
    progress.note(table.text())
    table.check()


# ---- training and after


def _train(
    bench: Workbench, model: AdaptedBase, recipe: Recipe, request: RunRequest, folder: RunFolder | None
) -> Trained | str:
    """What was trained; how it ended, where nothing is left to do for this process."""
    try:
        outcome = bench.train(model, recipe, request.folder, is_resumed=request.is_resumed)
        if outcome.ended == "interrupted" or folder is None:
            return outcome.ended
        return bench.finish(model, recipe, outcome, folder.adapter)
    finally:
        model.detach()


def _conclude(
    bench: Workbench,
    trained: Trained,
    recipe: Recipe,
    request: RunRequest,
    folder: RunFolder,
    around: Surroundings,
) -> RunResult:
    """Judge, package, deploy."""
    verdict = bench.judge(trained, recipe) if bench.data.held_out else None
    if verdict is not None:
        verdict.write(folder.root)
        around.progress.note(verdict.text())
    with around.progress.phase("package"):
        package, agreed = write_run_package(folder, recipe, bench, trained, verdict)
    result = RunResult(Exit.DONE, folder.root, package, _facts(trained, verdict, agreed.max_difference))
    if verdict is not None and not verdict.passed:
        around.progress.note(f"below its gate: nothing is deployed; the package to look at is {package}")
        return replace(result, status=Exit.GATE)
    return (
        result if request.deploy_to is None else _deploy(result, recipe, request.deploy_to, around.progress)
    )


def _facts(trained: Trained, verdict: Verdict | None, difference: float) -> dict[str, object]:
    outcome = trained.outcome
    judged = verdict.as_json() if verdict is not None else {"passed": None}
    return {
        "steps": outcome.num_steps,
        "ended": outcome.ended,
        "train_seconds": round(outcome.seconds, 2),
        "tokens_per_s": round(outcome.tokens_per_s, 1),
        "peak_bytes": outcome.peak_bytes,
        "trainer_difference": difference,
        **{key: judged[key] for key in ("passed", "scores", "gate") if key in judged},
    }


def _deploy(result: RunResult, recipe: Recipe, where: DeployTo, progress: Progress) -> RunResult:
    if result.package is None:
        return result
    facts = dict(result.facts or {})
    try:
        with progress.phase("deploy"):
            live = deploy(result.package, recipe.name, where.url, where.api_key, progress.note)
    except DeployError as error:
        progress.note(f"not deployed: {error}\nthe package is {result.package}")
        return replace(result, status=Exit.DEPLOY, facts={**facts, "deploy_error": str(error)})
    return replace(result, facts={**facts, "ref": live.ref, "deploy_seconds": round(live.seconds, 3)})
