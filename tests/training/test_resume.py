"""A run that is killed goes on as if it had not been, and a checkpoint is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.loops import Listener, run, tiny_recipe, words
from training.loop.checkpoints import Checkpoints, Identity, ResumeRefused, RunState
from training.loop.runlog import RunLog, read_log

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_thirty_kills_at_random_moments_leave_the_adapter_of_a_run_that_was_never_killed(
    tmp_path: Path,
) -> None:
    program = [sys.executable, "-m", "tests.training.nursery", str(tmp_path), "30"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    whole, *killed = json.loads(done.stdout)
    assert sum(chain["num_kills"] for chain in killed) >= 30
    for chain in killed:
        assert chain["adapter"] == whole["adapter"]
        assert chain["steps"] == whole["steps"] == list(range(1, 7))
        assert chain["losses"] == whole["losses"]


# ---- checkpoints


class Crash(BaseException):
    """The machine stops here."""


IDENTITY = Identity({"train": "rows"}, {"lr": 1e-3})


def fill(text: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / "a").write_text(text)
        (folder / "b").write_text(2 * text)

    return put


def write(folder: Path, step: int) -> None:
    Checkpoints(folder, 1).write(RunState(step=step), IDENTITY, fill(str(step)))


@pytest.mark.parametrize("num_calls", range(11))
def test_a_crash_at_any_call_of_writing_leaves_the_old_checkpoint_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_calls: int
) -> None:
    write(tmp_path, 1)
    left = [num_calls]

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def maybe(*args: object, **kwargs: object) -> object:
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return call(*args, **kwargs)

        return maybe

    crashed = True
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "write_text", counted(Path.write_text))
        try:
            write(tmp_path, 2)
            crashed = False
        except Crash:
            pass
    assert crashed == (num_calls < 10)
    newest = Checkpoints(tmp_path, 1).newest()
    assert newest is not None
    assert (newest.folder / "b").read_text() == 2 * str(newest.state.step)
    assert newest.state.step == (1 if num_calls < 8 else 2)
    Checkpoints(tmp_path, 1).remove_broken()
    assert all(path.name.startswith("step-") for path in tmp_path.iterdir())


def test_a_checkpoint_with_a_file_cut_short_is_passed_over_and_removed(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, 3)
    for step in (10, 20, 30):
        kept.write(RunState(step=step), IDENTITY, fill("words"))
    os.truncate(tmp_path / "step-000030" / "b", 3)
    (tmp_path / "step-000020" / "run.json").unlink()
    newest = kept.newest()
    assert newest is not None and newest.state.step == 10
    kept.remove_broken()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_only_so_many_are_kept_and_the_best_as_long_as_it_is_needed(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, 2)
    kept.write_best(1, fill("one"))
    kept.write(RunState(step=2, best_step=1), IDENTITY, fill("x"))
    kept.write_best(3, fill("three"))
    for step in (4, 6):
        kept.write(RunState(step=step, best_step=3), IDENTITY, fill("x"))
        names = sorted(path.name for path in tmp_path.iterdir())
        best = ["best-000001", "best-000003"] if step == 4 else ["best-000003"]
        assert names == [*best, f"step-{step - 2:06d}", f"step-{step:06d}"]


# ---- the same run


def test_another_recipe_or_other_rows_are_refused_by_key(tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=2)
    run(tmp_path, recipe)
    with pytest.raises(
        ResumeRefused, match=r"(?s)language\.lr: not there then, 0\.002 now.*\n  lr: 0\.01 then, 0\.02 now"
    ):
        run(tmp_path, replace(recipe, lr=0.02, language=replace(recipe.language, lr=0.002)), resume=True)
    with pytest.raises(ResumeRefused, match=r"data\.train: \"\w{12}\" then"):
        run(tmp_path, recipe, words(11), resume=True)
    with pytest.raises(ResumeRefused, match="name another folder"):
        run(tmp_path, recipe)
    again = run(tmp_path, replace(recipe, keep_checkpoints=5, name="else"), resume=True)
    assert again.outcome.num_steps == 2 and again.heard.steps == []


def test_a_run_without_a_checkpoint_goes_on_from_its_beginning(tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=2)
    (tmp_path / "checkpoints" / ".step-000001.draft").mkdir(parents=True)
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1}\n')
    made = run(tmp_path, recipe, listener=Listener(), resume=True)
    assert made.outcome.num_steps == 2
    assert [event["step"] for event in read_log(tmp_path / "log.jsonl")] == [1, 2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


# ---- the log


def test_a_log_goes_on_behind_what_a_checkpoint_remembers(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.write("step", {"step": 1})
    remembered = log.sync()
    log.write("step", {"step": 2})
    log.close()
    with log.path.open("ab") as file:
        file.write(b'{"event": "st')  # cut short by a kill
    assert [event["step"] for event in read_log(log.path)] == [1, 2]
    again = RunLog(log.path, remembered)
    again.write("step", {"step": 2, "é": "ü"})
    again.close()
    assert [event["step"] for event in read_log(log.path)] == [1, 2]
    assert log.path.read_text(encoding="utf-8").endswith('"é": "ü"}\n')
