"""The run folder: one run, one process, nothing lost by accident; and what is held out stays out."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from base.prompt import TextPart
from training.data.faults import Origin
from training.data.formats import Conversation, Turn
from training.data.heldout import hold_out
from training.durable import write_whole
from training.run.rundir import RunFolder, RunFolderError


def _ran(root: Path) -> Path:
    """A folder in which a run has begun to train."""
    with RunFolder(root) as folder:
        write_whole(folder.recipe, "name: a\n")
        (root / "log.jsonl").write_text("{}\n")
        (root / "checkpoints").mkdir()
    return root


def test_a_folder_is_made_and_files_are_whole(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "runs" / "a") as folder:
        folder.write_json(folder.data, {"rows": 1})
        assert json.loads(folder.data.read_text()) == {"rows": 1}
    assert sorted(path.name for path in folder.root.iterdir()) == [".lock", "data.json"]


def test_a_run_is_not_begun_over_another_unless_asked(tmp_path: Path) -> None:
    root = _ran(tmp_path / "a")
    with pytest.raises(RunFolderError, match=r"--resume .* --overwrite .* --out"):
        RunFolder(root)
    assert (root / "log.jsonl").exists()
    with RunFolder(root, is_resumed=True) as folder:
        assert (root / "checkpoints").is_dir()
        assert folder.recipe.read_text() == "name: a\n"
    with RunFolder(root, is_overwritten=True):
        assert [path.name for path in root.iterdir()] == [".lock"]


def test_a_run_that_never_trained_is_begun_again_without_being_asked(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a") as folder:
        write_whole(folder.recipe, "name: a\n")
        folder.write_json(folder.data, {})
    with RunFolder(tmp_path / "a") as folder:
        assert not folder.data.exists()


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run to go on with"):
        RunFolder(tmp_path / "a", is_resumed=True)


@pytest.mark.parametrize("is_overwritten", [False, True])
def test_a_folder_of_other_things_is_never_touched(tmp_path: Path, is_overwritten: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="other things than a run"):
        RunFolder(tmp_path, is_overwritten=is_overwritten)
    assert (tmp_path / "thesis.tex").exists()


def test_resume_and_overwrite_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="one of"):
        RunFolder(tmp_path / "a", is_resumed=True, is_overwritten=True)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a"), pytest.raises(RunFolderError, match="another process"):
        RunFolder(tmp_path / "a")
    RunFolder(tmp_path / "a").close()


def _hold_and_die(root: Path, taken: object) -> None:
    RunFolder(root)
    taken.set()  # type: ignore[attr-defined]
    raise SystemExit(1)


def test_a_process_that_dies_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    process = context.Process(target=_hold_and_die, args=(tmp_path / "a", taken))
    process.start()
    process.join(20)
    assert taken.is_set()
    RunFolder(tmp_path / "a").close()


# ---- held out


def _row(question: str, answer: str, number: int) -> Conversation:
    turns = (Turn("user", (TextPart(question),)), Turn("assistant", (TextPart(answer),), is_trained=True))
    return Conversation(turns, (), Origin("rows.jsonl", number))


ROWS = [_row(f"question {number // 2}", f"answer {number}", number) for number in range(100)]


def test_what_is_held_out_is_never_asked_in_training() -> None:
    train, held = hold_out(ROWS, 0.1)
    assert len(held) == 10
    assert len(train) == 90
    assert not {row.question_digest() for row in train} & {row.question_digest() for row in held}


def test_the_same_questions_are_held_out_in_any_order_and_with_other_answers() -> None:
    _, held = hold_out(ROWS, 0.1)
    others = [_row(row.turns[0].text, "other", row.origin.line) for row in reversed(ROWS)]
    _, again = hold_out(others, 0.1)
    assert {row.turns[0].text for row in again} == {row.turns[0].text for row in held}


@pytest.mark.parametrize(("share", "num_held"), [(0.0, 0), (0.01, 2), (0.5, 50), (1.0, 98)])
def test_as_many_are_held_out_as_asked_and_one_question_stays(share: float, num_held: int) -> None:
    train, held = hold_out(ROWS, share)
    assert (len(train), len(held)) == (100 - num_held, num_held)


def test_rows_that_all_ask_the_same_leave_nothing_to_hold_out() -> None:
    train, held = hold_out([_row("why?", f"answer {n}", n) for n in range(5)], 0.2)
    assert (len(train), len(held)) == (5, 0)
