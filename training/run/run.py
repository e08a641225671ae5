"""run: the phases of `lorikeet train-adapter`, one after another, each with its file in the run folder.

    check data -> plan memory -> load base -> attach -> check gradients -> train -> probe -> judge -> gate -> package
    -> deploy

Owns: that order, and what an adapter's failing its gate leads to: a package to look at, and no deploy. Does not know:
how any phase does its work, flags, engines (a GeneratorFactory is given).
"""

from __future__ import annotations

from dataclasses import replace

from training.deploy import DeployError, deploy
from training.durable import write_whole
from training.evaluation import Verdict
from training.loop.observer import TrainOutcome
from training.model.model import AdaptedBase
from training.recipe.recipe import Recipe
from training.run.bases import Bases
from training.run.begin import (
    DeployTo,
    RunRequest,
    Surroundings,
    check_request,
    judgeable,
    opened,
    prepare,
)
from training.run.failures import breaking, refusing
from training.run.outcome import Exit, RunResult
from training.run.packaging import prove, write_run_package
from training.run.progress import Progress
from training.run.rundir import RunFolder
from training.run.workbench import Trained, Workbench

__all__ = ["DeployTo", "RunRequest", "Surroundings", "run"]


def run(request: RunRequest, around: Surroundings) -> RunResult:
    """All phases. Raises Refused while nothing has been trained, Broken later."""
    with refusing():
        check_request(request)
        if request.is_dry:
            data, plan = prepare(request, around, None)
            judgeable(request, data)
            return RunResult(Exit.DONE, None, facts=plan)
    with opened(request, around.ranks) as folder:
        with refusing():
            data, _ = prepare(request, around, folder)
            recipe = judgeable(request, data)
            bench = Workbench(
                data, Bases(recipe, around.progress), around.make_generator, around.progress, around.ranks
            )
            model = bench.attach(recipe)
            _check_gradients(bench, model, recipe, folder, around.progress)
        with breaking():
            trained = _train(bench, model, recipe, request, folder)
            del model  # with it goes the last hold on the training base
            if not isinstance(trained, Trained) or folder is None:
                return _unfinished(trained, request)
            return _conclude(bench, trained, recipe, request, folder, around)


def _check_gradients(
    bench: Workbench, model: AdaptedBase, recipe: Recipe, folder: RunFolder | None, progress: Progress
) -> None:
    table = bench.gradients(model, recipe)
    if folder is not None:
        write_whole(folder.gradients, table.text() + "\n")
        folder.write_json(folder.gradients.with_suffix(".json"), table.as_json())
    progress.note(table.text())
    table.check()


def _train(
    bench: Workbench, model: AdaptedBase, recipe: Recipe, request: RunRequest, folder: RunFolder | None
) -> Trained | TrainOutcome:
    """What was trained; or how far it came, where nothing is left to do for this process."""
    try:
        outcome = bench.train(model, recipe, request.folder, is_resumed=request.is_resumed)
        if outcome.ended == "interrupted" or folder is None:
            return outcome
        return bench.finish(model, recipe, outcome, folder.adapter)
    finally:
        model.detach()


def _unfinished(outcome: TrainOutcome | Trained, request: RunRequest) -> RunResult:
    """Of a run that was interrupted, and of all processes but the first."""
    outcome = outcome.outcome if isinstance(outcome, Trained) else outcome
    status = Exit.INTERRUPTED if outcome.ended == "interrupted" else Exit.DONE
    return RunResult(status, request.folder, facts={"steps": outcome.num_steps, "ended": outcome.ended})


def _conclude(
    bench: Workbench,
    trained: Trained,
    recipe: Recipe,
    request: RunRequest,
    folder: RunFolder,
    around: Surroundings,
) -> RunResult:
    """Probe, judge, package, deploy: nothing slow stands between the gate and the server."""
    with around.progress.phase("probe"):
        proof = prove(bench, trained)
    verdict = bench.judge(trained, recipe) if bench.data.held_out else None
    if verdict is not None:
        verdict.write(folder.root)
        around.progress.note(verdict.text())
    with around.progress.phase("package"):
        package = write_run_package(folder, recipe, bench, trained, proof, verdict)
    result = RunResult(Exit.DONE, folder.root, package, _facts(trained, verdict, proof.agreed.max_difference))
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
