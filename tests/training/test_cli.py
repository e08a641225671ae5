"""The making's commands: what they hand on, what they print, and the status that each end has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import training.run.run
from tests.training.fixed_answers import FixedAnswers
from training.cli import add_commands
from training.run.outcome import Broken, Exit, Refused, RunResult
from training.run.run import RunRequest, Surroundings
from training.samples.rows import ALL, write_rows

ROOT = Path(__file__).resolve().parents[2]


def invoke(*args: str) -> Result:
    app = typer.Typer()
    add_commands(app, partial(FixedAnswers, text="red"))
    return CliRunner().invoke(app, list(args))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunRequest]:
    """What was handed to ``run``, which does nothing and ends well."""
    requests: list[RunRequest] = []

    def run(request: RunRequest, around: Surroundings) -> RunResult:
        requests.append(request)
        return RunResult(Exit.DONE, request.folder, request.folder / "package", {"ref": "invoice@1"})

    monkeypatch.setattr(training.run.run, "run", run)
    return requests


# ---- train-adapter


def test_flags_become_a_request(asked: list[RunRequest], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("r: 8\nlr: 1.0e-3\n")
    words = "--data rows.jsonl --name invoice --lr 2e-3 --preset language,merger --merger.lr 1e-3 --api-key k"
    result = invoke("train-adapter", *words.split(), "--recipe", str(recipe), "--deploy", "http://server")
    assert result.exit_code == 0, result.output
    [request] = asked
    found = request.recipe
    assert (found.name, found.data, found.r, found.lr) == ("invoice", ("rows.jsonl",), 8, 2e-3)
    assert (found.preset, found.merger.lr) == (("language", "merger"), 1e-3)
    assert request.resolved.origins["lr"] == "flag --lr"
    assert request.folder == Path("runs/invoice")
    assert request.deploy_to is not None
    assert (request.deploy_to.url, request.deploy_to.api_key) == ("http://server", "k")
    assert not (request.is_resumed or request.is_overwritten or request.is_dry)


def test_how_a_run_is_to_be_gone_about_is_handed_on(asked: list[RunRequest], tmp_path: Path) -> None:
    invoke(
        "train-adapter",
        "--data",
        "a.jsonl",
        "--name",
        "a",
        "--out",
        str(tmp_path),
        "--overwrite",
        "--dry-run",
    )
    assert (asked[0].folder, asked[0].is_overwritten, asked[0].is_dry) == (tmp_path, True, True)


def test_a_resumed_run_needs_nothing_but_its_folder(asked: list[RunRequest], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: invoice\ndata: [rows.jsonl]\nr: 4\n")
    invoke("train-adapter", "--out", str(tmp_path), "--resume", "--gate", "exact_match >= 0.5")
    assert (asked[0].recipe.r, asked[0].recipe.gate, asked[0].is_resumed) == (
        4,
        ("exact_match >= 0.5",),
        True,
    )


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    result = invoke("train-adapter", "--out", str(tmp_path), "--resume")
    assert result.exit_code == 2
    assert "holds no run to go on with" in result.stderr


def test_a_bundled_recipe_is_named(asked: list[RunRequest]) -> None:
    from training.recipe.sources import bundled

    name = bundled()[0]
    result = invoke("train-adapter", "--data", "a.jsonl", "--name", "a", "--recipe", name)
    assert result.exit_code == 0, result.output
    assert any(origin.startswith(f"{name}.yaml") for origin in asked[0].resolved.origins.values())


def test_the_end_is_told_in_words_or_as_one_json_line(asked: list[RunRequest]) -> None:
    words = invoke("train-adapter", "--data", "a.jsonl", "--name", "invoice")
    assert "live: invoice@1" in words.stdout
    assert "package: runs/invoice/package" in words.stdout
    line = invoke("train-adapter", "--data", "a.jsonl", "--name", "invoice", "--json")
    found = json.loads(line.stdout)
    assert (found["status"], found["outcome"], found["ref"]) == (0, "done", "invoice@1")


@pytest.mark.parametrize(
    ("error", "status"), [(Refused("why"), 2), (Broken("why"), 1), (KeyboardInterrupt(), 130)]
)
def test_each_end_has_its_status(error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(request: RunRequest, around: Surroundings) -> RunResult:
        raise error

    monkeypatch.setattr(training.run.run, "run", run)
    result = invoke("train-adapter", "--data", "a.jsonl", "--name", "a", "--json")
    assert result.exit_code == status
    assert json.loads(result.stdout)["status"] == status
    assert "lorikeet: " in result.stderr


def test_the_gate_has_a_status_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.run.run, "run", lambda *_: RunResult(Exit.GATE, Path("runs/a")))
    assert invoke("train-adapter", "--data", "a.jsonl", "--name", "a").exit_code == 3


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(request: RunRequest, around: Surroundings) -> RunResult:
        raise ZeroDivisionError

    monkeypatch.setattr(training.run.run, "run", run)
    assert isinstance(invoke("train-adapter", "--data", "a", "--name", "a").exception, ZeroDivisionError)


def test_everything_wrong_with_a_recipe_is_said_at_once() -> None:
    result = invoke("train-adapter", "--data", "a.jsonl", "--lr", "fast", "--r", "-1")
    assert result.exit_code == 2
    assert "lr" in result.stderr
    assert "r is -1" in result.stderr


def test_an_unknown_flag_is_refused_with_near_ones() -> None:
    result = invoke("train-adapter", "--data", "a.jsonl", "--epoch", "2")
    assert result.exit_code == 2
    assert "--epochs" in result.stderr


def test_the_statuses_are_documented() -> None:
    page = (ROOT / "docs" / "cookbook.md").read_text("utf-8")
    table = {
        int(status): meaning for status, meaning in re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)
    }
    assert table == {int(status): status.meaning for status in Exit}


# ---- plan


def test_a_plan_of_a_published_base_needs_no_download() -> None:
    result = invoke(
        "plan", "--base", "Qwen/Qwen2.5-VL-3B-Instruct", "--memory", "24", "--rows-tokens", "2048",
        "--micro-batch", "1", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["fits"]
    assert 4 << 30 < found["total_bytes"] < 24 << 30


def test_a_plan_that_does_not_fit_says_what_to_change() -> None:
    result = invoke(
        "plan", "--base", "Qwen/Qwen2.5-VL-7B-Instruct", "--memory", "10", "--rows-tokens", "2048"
    )
    assert result.exit_code == 2
    assert "micro_batch" in result.stdout
    assert invoke("plan", "--device", "tpu").exit_code == 2


# ---- sweep


def test_a_sweep_ends_in_a_table_and_is_not_run_twice(tmp_path: Path) -> None:
    train, held_out = write_rows(ALL["tickets"], tmp_path, num_rows=6, num_eval_rows=2)
    words = (
        f"sweep --data {train} --eval {held_out} --name a --out {tmp_path}/sweep --max-steps 1 --sample-rows 0"
        " --micro-batch 4 --accumulation 1 --max-new-tokens 4 --grid r=2,4 --gate none"
    )
    first = invoke(*words.split())
    assert first.exit_code == 0, first.output
    head, *rows = first.stdout.splitlines()
    assert head.split() == ["experiment", "r", "alpha", "BLEU", "tokens/s", "peak", "memory", "verdict"]
    assert [row.strip("* ").split()[0] for row in rows[:2]] == ["r2", "r4"]
    assert sum(row.startswith("*") for row in rows) == 1
    assert (tmp_path / "sweep" / "sweep.png").exists()
    again = invoke(*words.split(), "--json")
    assert "attach" not in again.stderr
    assert [row["experiment"] for row in json.loads(again.stdout)["rows"]] == ["r2", "r4"]


@pytest.mark.parametrize(
    ("grid", "words"), [("r=8,x", "r"), ("nothing", "grid"), ("base=a,b", "all experiments of a sweep share")]
)
def test_a_grid_that_cannot_be_run_is_refused(grid: str, words: str, tmp_path: Path) -> None:
    train, _ = write_rows(ALL["tickets"], tmp_path, num_rows=4, num_eval_rows=0)
    result = invoke(
        "sweep", "--data", str(train), "--name", "a", "--out", str(tmp_path / "s"), "--grid", grid
    )
    assert result.exit_code == 2
    assert words in result.stderr


# ---- the door


def test_help_comes_at_once_and_brings_no_torch() -> None:
    code = (
        "import sys, lorikeet; from typer.testing import CliRunner;"
        "r = CliRunner().invoke(lorikeet.command_line(), ['--help']);"
        "print(r.output); print('torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    started = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert time.process_time() - started < 0.3
    assert all(name in done.stdout for name in ("train-adapter", "plan", "sweep", "serve"))
    assert done.stdout.strip().endswith("False False")


@pytest.mark.parametrize("command", ["train-adapter", "plan", "sweep"])
def test_every_key_of_a_recipe_is_a_flag(command: str) -> None:
    from training.recipe.flags import flag_of
    from training.recipe.sources import KEYS

    shown = invoke(command, "--help").stdout
    assert [key for key in KEYS if flag_of(key) not in shown] == []
