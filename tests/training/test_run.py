"""A whole run, from rows on disk to a package: its phases, its folder, and each of its ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import training.run.bases
import training.run.run
import training.run.workbench
from adapters.profile import read_profile
from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from engine.offline import OfflineEngine
from tests.training.fixed_answers import FixedAnswers
from training.deploy import Deployed, DeployError
from training.loop.observer import TrainOutcome
from training.loop.ranks import Ranks
from training.model.loading import load_training_base
from training.recipe.recipe import Recipe
from training.recipe.sources import resolve_recipe
from training.run.outcome import Broken, Exit, Refused, RunResult
from training.run.progress import SilentProgress
from training.run.run import DeployTo, RunRequest, Surroundings, run
from training.samples.rows import ALL, write_rows

STEPS = 3
FLAGS: dict[str, object] = {
    "name": "tickets", "r": "4", "alpha": "4", "lr": "3e-3", "max_steps": str(STEPS), "micro_batch": "4",
    "accumulation": "2", "dropout": "0.1", "save_steps": "2", "sample_rows": "1", "max_new_tokens": "6",
    "metrics": "exact_match",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def bases() -> Iterator[None]:
    """Loaded once: a run leaves them as they were, which other tests hold to the bit."""
    training_base, serving_base = cache(lambda: load_training_base(Recipe())), cache(load_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run.bases.load_training_base", lambda recipe: training_base())
        patch.setattr("training.run.bases.load_base", serving_base)
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(ALL["tickets"], folder, num_rows=20, num_eval_rows=3)
    return folder


def request(rows: Path, folder: Path, **flags: object) -> RunRequest:
    files = {"data": str(rows / "train.jsonl"), "eval": str(rows / "eval.jsonl")}
    return RunRequest(resolve_recipe(None, {**files, **FLAGS, **flags}), folder)


def go(asked: RunRequest) -> RunResult:
    return run(asked, Surroundings(FixedAnswers, SilentProgress(), Ranks()))


@pytest.fixture(scope="module")
def ran(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRequest, RunResult]:
    """One run through every phase but deploy, judged by the engine that serves."""
    asked = request(rows, tmp_path_factory.mktemp("runs") / "tickets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.evaluation.judge.general_prompts", lambda base_name: ("Who are you?",))
        return asked, run(asked, Surroundings(OfflineEngine, SilentProgress(), Ranks()))


# ---- a run that ends well


def test_a_run_leaves_a_record_of_all_that_it_did(ran: tuple[RunRequest, RunResult]) -> None:
    asked, result = ran
    assert result.status is Exit.DONE
    names = {path.name for path in asked.folder.iterdir()}
    assert names >= {
        "recipe.yaml", "data.json", "plan.json", "gradients.txt", "gradients.json", "log.jsonl", "loss.png",
        "samples.jsonl", "samples.png", "scores.json", "scores.md", "answers.jsonl", "adapter", "package",
        "checkpoints",
    }  # fmt: skip
    assert "package-refused" not in names
    steps = [json.loads(line) for line in (asked.folder / "log.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "step" for line in steps) == STEPS
    assert "flag --lr" in (asked.folder / "recipe.yaml").read_text()


def test_the_recipe_in_the_folder_makes_the_same_run(ran: tuple[RunRequest, RunResult]) -> None:
    asked, _ = ran
    assert resolve_recipe(asked.folder / "recipe.yaml", {}).recipe == asked.recipe


def test_the_package_tells_its_base_scores_and_probes_and_no_path(ran: tuple[RunRequest, RunResult]) -> None:
    asked, result = ran
    assert result.package == asked.folder / "package"
    profile = read_profile(asked.folder / "package")
    assert profile is not None
    assert profile.base.dtype == BaseConfig().dtype
    assert profile.base.fingerprint == load_base(BaseConfig()).spec.fingerprint
    assert len(profile.probes) == 2
    assert profile.gate is not None
    assert profile.gate.passed
    assert profile.scores["loss"] < profile.base_scores["loss"]
    assert profile.data["rows"] == 20
    text = (asked.folder / "package" / "lorikeet.json").read_text()
    assert str(asked.folder.parent) not in text
    assert '"train.jsonl"' in text


def test_the_result_is_one_json_object(ran: tuple[RunRequest, RunResult]) -> None:
    found = json.loads(json.dumps(ran[1].as_json()))
    assert (found["status"], found["outcome"], found["steps"], found["passed"]) == (0, "done", STEPS, True)
    assert found["trainer_difference"] < 0.5
    assert found["scores"]["adapter"]["loss"] > 0


# ---- gates, deploys and going on


def test_the_gate_decides_whether_an_adapter_is_deployed(
    ran: tuple[RunRequest, RunResult], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is over, so only the judging is done again: by a gate that it fails, and by the first one."""
    asked, _ = ran
    calls: list[tuple[object, ...]] = []

    def deploy(*args: object) -> Deployed:
        calls.append(args[:4])
        return Deployed("tickets@2", 0.5, "digest", is_new=True)

    monkeypatch.setattr(training.run.run, "deploy", deploy)
    stern = replace(request(rows, asked.folder, gate="exact_match >= 0.9"), is_resumed=True)
    refused = go(replace(stern, deploy_to=DeployTo("http://server")))
    assert (refused.status, refused.package) == (Exit.GATE, asked.folder / "package-refused")
    assert calls == []
    assert not (asked.folder / "package").exists()
    profile = read_profile(asked.folder / "package-refused")
    assert profile is not None
    assert profile.gate is not None
    assert not profile.gate.passed
    passed = go(replace(asked, is_resumed=True, deploy_to=DeployTo("http://server", "key")))
    assert calls == [(asked.folder / "package", "tickets", "http://server", "key")]
    assert passed.as_json()["ref"] == "tickets@2"
    assert not (asked.folder / "package-refused").exists()


def test_a_server_that_refuses_leaves_the_package_and_a_status(
    ran: tuple[RunRequest, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deploy(*_: object) -> Deployed:
        raise DeployError("it refused")

    asked, _ = ran
    monkeypatch.setattr(training.run.run, "deploy", deploy)
    result = go(replace(asked, is_resumed=True, deploy_to=DeployTo("http://server")))
    assert result.status is Exit.DEPLOY
    assert result.as_json()["deploy_error"] == "it refused"
    assert (asked.folder / "package" / "lorikeet.json").exists()


def test_another_recipe_does_not_go_on_with_the_run(ran: tuple[RunRequest, RunResult], rows: Path) -> None:
    asked, _ = ran
    with pytest.raises(Refused, match=r"not the run that was stopped:\n  lr: 0\.003 then, 0\.001 now"):
        go(replace(request(rows, asked.folder, lr="1e-3"), is_resumed=True))
    assert resolve_recipe(asked.folder / "recipe.yaml", {}).recipe.lr == 3e-3  # so that it still can go on


def test_a_run_is_not_begun_over_another(ran: tuple[RunRequest, RunResult]) -> None:
    with pytest.raises(Refused, match="--resume"):
        go(ran[0])


def test_an_interrupted_run_says_so_and_packs_nothing(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = TrainOutcome(1, 10, 1.0, 10.0, 1, 0.5, None, "interrupted")
    monkeypatch.setattr(training.run.workbench, "train", lambda *args, **options: stopped)
    result = go(request(rows, tmp_path / "a"))
    assert (result.status, result.package) == (Exit.INTERRUPTED, None)
    assert not (tmp_path / "a" / "package").exists()


# ---- runs that do not begin


def _never(*_: object) -> BaseModel:
    raise AssertionError("a model was loaded")


def test_bad_rows_are_all_reported_before_a_model_is_loaded(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.run.bases.Bases, "training", _never)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "b"}\n{"prompt": "c", "completion": "d"}\n')
    with pytest.raises(Refused, match=r"2 rows cannot be trained on[\s\S]*empty_target[\s\S]*missing_field"):
        go(request(rows, tmp_path / "run", data=str(bad)))
    assert json.loads((tmp_path / "run" / "data.json").read_text())["bad_rows"] == 2
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_bad_rows_in_quarantine_are_written_down(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.run.bases.Bases, "training", _stop)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "c", "completion": "d"}\n')
    with pytest.raises(Stop):
        go(request(rows, tmp_path / "run", data=str(bad), on_bad="quarantine"))
    [fault] = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert fault["fault"] == "empty_target"


class Stop(Exception):
    pass


def _stop(*_: object) -> BaseModel:
    raise Stop


def test_a_dry_run_checks_all_and_writes_nothing(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.run.bases.Bases, "training", _never)
    result = go(replace(request(rows, tmp_path / "runs" / "a"), is_dry=True))
    assert result.status is Exit.DONE
    assert result.facts is not None
    assert result.facts["plan"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_fit_is_refused_with_the_ladder(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.run.foresight.this_device", lambda: ("cpu", 20 << 20))
    with pytest.raises(Refused, match=r"does not fit[\s\S]*micro_batch"):
        go(request(rows, tmp_path / "a"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"data": "none"}, "--data"),
        ({"data": "nowhere.jsonl"}, "does not exist"),
        ({"base": "nowhere/at-all/here"}, "cannot read the base"),
        ({"gate": "vision_dependance > 0.1"}, "vision_dependance"),
        ({"targets": "no_such_linear"}, "no_such_linear"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    rows: Path, tmp_path: Path, flags: dict[str, object], words: str
) -> None:
    with pytest.raises(Refused, match=words):
        go(request(rows, tmp_path / "a", **flags))


def test_an_adapter_needs_a_name(rows: Path, tmp_path: Path) -> None:
    files = {"data": str(rows / "train.jsonl"), "eval": str(rows / "eval.jsonl")}
    with pytest.raises(Refused, match="--name invoice"):
        go(RunRequest(resolve_recipe(None, files), tmp_path / "a"))


def test_without_rows_to_judge_on_nothing_is_deployed_unasked(rows: Path, tmp_path: Path) -> None:
    unjudged = request(rows, tmp_path / "a", eval="none", eval_split="0", metrics="none")
    with pytest.raises(Refused, match="--gate none"):
        go(replace(unjudged, deploy_to=DeployTo("http://server")))


def test_what_is_no_address_of_a_server_is_refused_before_a_run(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="http://host:8000"):
        go(replace(request(rows, tmp_path / "a"), deploy_to=DeployTo("gpu-box:8000")))


def test_an_adapter_without_rows_to_judge_on_is_packed_unjudged(rows: Path, tmp_path: Path) -> None:
    result = go(request(rows, tmp_path / "a", eval="none", eval_split="0", metrics="none", max_steps="1"))
    assert (result.status, result.as_json()["passed"]) == (Exit.DONE, None)
    profile = read_profile(tmp_path / "a" / "package")
    assert profile is not None
    assert profile.gate is None


def test_a_full_disk_breaks_a_run_off_that_can_go_on(
    ran: tuple[RunRequest, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.run.run.write_run_package", _full)
    with pytest.raises(Broken, match="No space left"):
        go(replace(ran[0], is_resumed=True))


def _full(*_: object) -> object:
    raise OSError(28, "No space left on device")
