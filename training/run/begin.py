"""What was asked of a run, and all that is looked at before a model is loaded.

Owns: the request, the run folder's opening, and every refusal that needs no weights. Does not know: models. Place in a
training run: its first two phases.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from training.durable import write_whole
from training.evaluation import Judging, check_judging
from training.generation import GeneratorFactory
from training.loop.ranks import Ranks
from training.loop.reporters import ReporterMissing, check_reporters
from training.recipe.linter import advise
from training.recipe.recipe import Recipe
from training.recipe.sources import RecipeError, ResolvedRecipe, resolve_recipe
from training.run.data import RunData, gather
from training.run.failures import refusing
from training.run.foresight import foresee
from training.run.outcome import Refused
from training.run.progress import Progress
from training.run.rundir import RunFolder

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


def check_request(request: RunRequest) -> None:
    recipe = request.recipe
    if not recipe.name:
        raise Refused("the adapter has no name: --name invoice")
    if not recipe.data:
        raise Refused("there is no data to train on: --data rows.jsonl")
    if request.deploy_to is not None and not request.deploy_to.url.startswith(("http://", "https://")):
        raise Refused(f"--deploy {request.deploy_to.url} is no address of a server: http://host:8000")
    try:
        check_reporters(recipe.report_to)
    except ReporterMissing as missing:
        raise Refused(str(missing)) from missing
    problems = [advice.text for advice in advise(recipe) if advice.level == "error"]
    if problems:
        raise Refused("\n".join(problems))


@contextmanager
def opened(request: RunRequest, ranks: Ranks) -> Iterator[RunFolder | None]:
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
        before = folder.recipe.read_text("utf-8") if request.is_resumed else None
        if not (request.is_resumed and _is_of(request.recipe, folder.recipe)):
            write_whole(folder.recipe, request.resolved.as_yaml())
        ranks.wait()
        try:
            yield folder
        except Refused:
            if before is not None:  # what could not go on as it was asked to still can as it was begun
                write_whole(folder.recipe, before)
            raise


def _is_of(recipe: Recipe, file: Path) -> bool:
    """Whether ``file`` says the same already, with the first origin of each value."""
    try:
        return resolve_recipe(file, {}).recipe == recipe
    except RecipeError:
        return False


def prepare(
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


def judgeable(request: RunRequest, data: RunData) -> Recipe:
    """The recipe, its gate read; without rows to judge on there is no gate, and nothing is deployed unasked."""
    recipe = request.recipe
    if not data.held_out:
        if recipe.gate and request.resolved.origins.get("gate") != "default":
            raise Refused("the gate has no held-out rows to be held on: give --eval FILE, or --gate none")
        if request.deploy_to is not None and recipe.gate:
            raise Refused(
                "no rows are held out, so nothing can be judged before it is deployed: give --eval FILE, or --gate none"
                " to deploy it unjudged"
            )
        return replace(recipe, gate=())
    check_judging(Judging.of(recipe, ""), data.held_out, has_loss=True)
    return recipe
