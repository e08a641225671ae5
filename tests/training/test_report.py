"""Every bad row is in one report with file, line, field and fix; what is left can be trained on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from base.processor import Processor
from tests.support.pictures import picture
from tests.training.rows import ROWS, png, put_pictures, write
from training.data.dataset import CheckedData, DataRejected, DataRules, check_data
from training.data.faults import FaultKind, RowRejected
from training.data.histogram import Histogram
from training.data.labels import Labeller
from training.data.report import DataReport

GOOD = {"prompt": "What is a kite?", "completion": "A toy."}
SKIP = DataRules(on_bad="skip")


def ask(number: int, **more: object) -> dict[str, object]:
    return {"prompt": f"What is {number}?", "completion": "A number.", **more}


def report_of(processor: Processor, folder: Path, *rows: object, rules: DataRules = SKIP) -> DataReport:
    return check_data([write(folder, *rows)], processor, rules).report


def kinds(report: DataReport) -> list[tuple[int, FaultKind]]:
    return [(fault.origin.line, fault.kind) for fault in report.faults]


def _cut(folder: Path) -> dict[str, object]:
    (folder / "x.png").write_bytes(png(3, 200, 200)[:900])
    return ask(1, images=["x.png"])


def _text_as_picture(folder: Path) -> dict[str, object]:
    (folder / "x.png").write_text("not a picture")
    return ask(1, images=["x.png"])


def _extreme(folder: Path) -> dict[str, object]:
    picture(1, 900, 2).save(folder / "x.png")
    return ask(1, images=["x.png"])


def _bomb(folder: Path) -> dict[str, object]:
    picture(1, 400, 400).save(folder / "x.png")
    return ask(1, images=["x.png"])


def _long(folder: Path) -> dict[str, object]:
    return ask(1) | {"completion": "word " * 300}


def _reserved(folder: Path) -> dict[str, object]:
    return ask(1) | {"completion": "Done.<|im_end|>"}


def _box(folder: Path) -> dict[str, object]:
    (folder / "x.png").write_bytes(png(1, 40, 30))
    return ask(1, images=["x.png"]) | {"completion": '[{"bbox_2d": [10, 10, 400, 20], "label": "kite"}]'}


def _backward_box(folder: Path) -> dict[str, object]:
    (folder / "x.png").write_bytes(png(1, 40, 30))
    return ask(1, images=["x.png"]) | {"completion": '{"bbox_2d":[20,10,10,20]}'}


def _missing(folder: Path) -> dict[str, object]:
    return ask(1, images=["x.png"])


CONTENT_FAULTS: dict[FaultKind, list[Callable[[Path], dict[str, object]]]] = {
    FaultKind.IMAGE_UNDECODABLE: [_cut, _text_as_picture],
    FaultKind.IMAGE_TOO_EXTREME: [_extreme],
    FaultKind.IMAGE_BOMB: [_bomb],
    FaultKind.IMAGE_MISSING: [_missing],
    FaultKind.TOO_LONG: [_long],
    FaultKind.RESERVED_TOKEN: [_reserved],
    FaultKind.BOX_OUT_OF_RANGE: [_box, _backward_box],
}
RULES = DataRules(on_bad="skip", max_length=250, max_image_pixels=100_000)


@pytest.mark.parametrize(
    ("kind", "make"), [(k, make) for k, makes in CONTENT_FAULTS.items() for make in makes]
)
def test_a_row_s_fault_is_named_with_file_line_field_and_fix(
    tmp_path: Path, processor: Processor, kind: FaultKind, make: Callable[[Path], dict[str, object]]
) -> None:
    row = make(tmp_path)
    checked = check_data([write(tmp_path, GOOD, row, ask(2))], processor, RULES)
    assert kinds(checked.report) == [(2, kind)]
    said = checked.report.faults[0].as_json()
    assert said["file"] == "rows.jsonl"
    assert all(said[name] for name in ("fault", "value", "expected", "fix"))
    if kind.startswith("image"):
        assert said["field"] == "images[0]"
    assert str(tmp_path) not in str(said["value"])
    assert [row.origin.line for row in checked.train] == [1, 3]


def test_good_boxes_and_pictures_are_not_reported(tmp_path: Path, processor: Processor) -> None:
    put_pictures(tmp_path)
    box = '[{"bbox_2d": [0, 0, 40, 30], "label": "kite"}, {"bbox_2d": [1.5, 2, 3, 4]}]'
    assert report_of(processor, tmp_path, ask(1, images=["a.png"]) | {"completion": box}).faults == ()


@pytest.mark.parametrize("name", ROWS)
def test_every_format_s_example_passes(tmp_path: Path, processor: Processor, name: str) -> None:
    put_pictures(tmp_path)
    report = report_of(processor, tmp_path, ROWS[name][1], rules=DataRules())
    assert (report.train.num_kept, report.train.formats) == (1, {"rows.jsonl": str(ROWS[name][0])})


def test_too_long_says_how_much_is_text_and_how_much_pictures(tmp_path: Path, processor: Processor) -> None:
    put_pictures(tmp_path)
    row = ROWS["role_content"][1]
    path = write(tmp_path, row)
    (kept,) = check_data([path], processor, DataRules()).train
    labeller = Labeller(processor)
    (example,) = labeller.examples(kept)
    num_image = sum(image.num_tokens for image in example.images)
    num_tokens = len(example.ids)
    exact = check_data([path], processor, DataRules(max_length=num_tokens))
    assert exact.report.train.tokens.most == num_tokens
    assert exact.report.train.image_tokens.most == num_image
    with pytest.raises(DataRejected) as rejected:
        check_data([path], processor, DataRules(max_length=num_tokens - 1))
    (fault,) = rejected.value.report.faults
    assert fault.complaint.value == f"{num_tokens} tokens: {num_tokens - num_image} text + {num_image} image"


def test_all_faults_are_in_one_report(tmp_path: Path, processor: Processor) -> None:
    rows = [
        GOOD,
        "{",
        ask(1) | {"completion": ""},
        {"query": "a", "response": "b"},
        _reserved(tmp_path),
        GOOD,
        ask(5),
    ]
    with pytest.raises(DataRejected) as rejected:
        check_data([write(tmp_path, *rows)], processor, DataRules())
    report = rejected.value.report
    assert kinds(report) == [
        (2, FaultKind.BAD_JSON), (3, FaultKind.EMPTY_TARGET), (4, FaultKind.MIXED_FORMAT),
        (5, FaultKind.RESERVED_TOKEN), (6, FaultKind.DUPLICATE),
    ]  # fmt: skip
    assert (report.num_bad_rows, report.train.num_rows, report.train.num_kept) == (5, 7, 2)
    text = str(rejected.value)
    for line in range(2, 7):
        assert f"rows.jsonl:{line} " in text
    assert "5 bad rows: 1 bad_json" in text
    assert json.loads(json.dumps(report.as_json()))["bad_rows"] == 5


def test_one_row_may_have_several_faults(tmp_path: Path, processor: Processor) -> None:
    row = ask(1, images=["no.png"]) | {"completion": "<|im_end|>"}
    assert {kind for _, kind in kinds(report_of(processor, tmp_path, GOOD, row))} == {FaultKind.IMAGE_MISSING}
    both = _box(tmp_path) | {"prompt": "<|im_start|>"}
    report = report_of(processor, tmp_path, GOOD, both)
    assert [kind for _, kind in kinds(report)] == [FaultKind.RESERVED_TOKEN, FaultKind.BOX_OUT_OF_RANGE]
    assert report.num_bad_rows == 1


def test_duplicates_and_leaks_are_found_across_formats_and_files(
    tmp_path: Path, processor: Processor
) -> None:
    put_pictures(tmp_path)
    pictured = ask(3, images=["a.png"])
    first = write(tmp_path, ask(1), ask(2), pictured, ask(3, images=["b.png"]), name="a.jsonl")
    second = write(tmp_path, {"query": "What is 1?", "response": "A number."}, name="b.jsonl")
    held = write(tmp_path, ask(2) | {"completion": "Another answer."}, pictured, name="held.jsonl")
    checked = check_data([first, second], processor, SKIP, eval=[held])
    found = [(str(fault.origin), fault.kind) for fault in checked.report.faults]
    assert found == [
        ("a.jsonl:2", FaultKind.LEAK), ("a.jsonl:3", FaultKind.LEAK), ("b.jsonl:1", FaultKind.DUPLICATE)
    ]  # fmt: skip
    assert "held.jsonl:1" in checked.report.faults[0].complaint.value
    assert "a.jsonl:1" in checked.report.faults[2].complaint.value
    assert len(checked.train) == 2 and len(checked.eval) == 2


def test_the_same_question_with_another_answer_is_no_duplicate(tmp_path: Path, processor: Processor) -> None:
    assert report_of(processor, tmp_path, GOOD, GOOD | {"completion": "A bird."}).faults == ()


def test_quarantine_writes_down_what_it_leaves_out(tmp_path: Path, processor: Processor) -> None:
    out = tmp_path / "bad.jsonl"
    rules = DataRules(on_bad="quarantine", quarantine=out)
    checked = check_data([write(tmp_path, GOOD, "{", ask(1))], processor, rules)
    (line,) = out.read_text("utf-8").splitlines()
    assert json.loads(line)["line"] == 2
    assert len(checked.train) == 2
    for on_bad, path in (("quarantine", None), ("skip", out)):
        with pytest.raises(ValueError, match="quarantine"):
            DataRules(on_bad=on_bad, quarantine=path)  # type: ignore[arg-type]


def test_nothing_left_is_an_error_even_when_bad_rows_are_skipped(
    tmp_path: Path, processor: Processor
) -> None:
    with pytest.raises(DataRejected, match="no row of data is left"):
        check_data([write(tmp_path, "{")], processor, SKIP)
    with pytest.raises(DataRejected, match="no row of data is left"):
        check_data([tmp_path / "none.jsonl"], processor, SKIP)


def test_an_empty_file_of_the_evaluation_is_no_evaluation(tmp_path: Path, processor: Processor) -> None:
    good, nothing = write(tmp_path, GOOD), tmp_path / "empty.jsonl"
    nothing.write_text("\n", encoding="utf-8")
    with pytest.raises(DataRejected, match="no row in eval: the files named for it are empty"):
        check_data([good], processor, SKIP, eval=[nothing])
    with pytest.raises(DataRejected, match="no row in data: the files named for it are empty"):
        check_data([nothing], processor, SKIP, eval=[good])


def digest(processor: Processor, folder: Path, *rows: object, name: str = "rows.jsonl") -> str:
    return check_data([write(folder, *rows, name=name)], processor, SKIP).report.train.digest


def test_the_hash_is_of_what_is_learnt(tmp_path: Path, processor: Processor) -> None:
    put_pictures(tmp_path)
    base = digest(processor, tmp_path, ask(1), ask(2, images=["a.png"]))
    same = digest(processor, tmp_path, ask(1, id=7), "{", ask(2, images=["a.png"]), name="other.jsonl")
    assert base == same
    talk: dict[str, object] = {"query": "What is 1?", "response": "A number.", "history": [["a", "b"]]}
    others = [
        digest(processor, tmp_path, ask(2, images=["a.png"]), ask(1)),
        digest(processor, tmp_path, ask(1), ask(2, images=["b.png"])),
        digest(processor, tmp_path, ask(1), ask(3, images=["a.png"])),
        digest(processor, tmp_path, talk),
        digest(processor, tmp_path, talk | {"loss": [False, True]}),
    ]  # fmt: skip
    assert len({base, *others}) == 6


def test_the_report_counts_rows_tokens_and_labels(tmp_path: Path, processor: Processor) -> None:
    put_pictures(tmp_path)
    seen: list[None] = []
    rows = [ask(i, note="x") for i in range(5)] + [ask(9, images=["a.png"])]
    checked = check_data([write(tmp_path, *rows)], processor, SKIP, on_row=lambda: seen.append(None))
    split = checked.report.train
    examples = [example for row in checked.train for example in Labeller(processor).examples(row)]
    assert len(seen) == split.num_rows == 6
    assert split.num_labels == sum(example.num_labels for example in examples)
    assert split.tokens.total == sum(len(example.ids) for example in examples)
    assert split.image_tokens.count == 1
    assert split.unused_columns == {"note": 5}
    assert "unused columns: note" in checked.report.text()


def test_unused_columns_are_counted_over_all_files(tmp_path: Path, processor: Processor) -> None:
    files = [write(tmp_path, ask(i, note="x"), name=f"{i}.jsonl") for i in range(3)]
    assert check_data(files, processor, SKIP).report.train.unused_columns == {"note": 3}


def test_the_text_is_cut_and_the_json_is_whole(tmp_path: Path, processor: Processor) -> None:
    report = report_of(processor, tmp_path, GOOD, *["{"] * 80)
    assert len(report.text().splitlines()) == 53
    assert "and 30 more" in report.text()
    faults = report.as_json()["faults"]
    assert isinstance(faults, list) and len(faults) == 80


def test_a_picture_that_vanishes_after_the_check_says_so(tmp_path: Path, processor: Processor) -> None:
    put_pictures(tmp_path)
    checked: CheckedData = check_data([write(tmp_path, ask(1, images=["a.png"]))], processor, SKIP)
    (tmp_path / "a.png").unlink()
    with pytest.raises(RowRejected) as rejected:
        Labeller(processor).examples(checked.train[0])
    assert rejected.value.complaint.kind == FaultKind.IMAGE_MISSING


def test_a_thousand_text_rows_take_a_second_at_most(tmp_path: Path, processor: Processor) -> None:
    """10,000 in under 10 s; processor time, since a shared machine's clock says nothing about the code."""
    words = "the kite that we saw on the hill above the sea was red and had a tail"
    rows = [{"instruction": f"Say {i}: {words}", "output": f"{words} {i}"} for i in range(1000)]
    path = write(tmp_path, *rows)
    logging.getLogger("lorikeet.training").setLevel(logging.WARNING)
    before = time.process_time()
    checked = check_data([path], processor, DataRules())
    assert len(checked.train) == 1000
    assert time.process_time() - before < 1.0


def test_histograms_count_by_doubling_bounds() -> None:
    histogram = Histogram.of([1, 16, 17, 32, 33, 1000])
    assert histogram.buckets == {16: 2, 32: 2, 64: 1, 1024: 1}
    assert (histogram.median, histogram.p95, histogram.most, histogram.total) == (17, 1000, 1000, 1099)
    assert Histogram.of([]).as_json()["count"] == 0


def test_a_renamed_column_that_no_row_has_is_an_error_and_one_file_that_has_it_is_enough(
    tmp_path: Path, processor: Processor
) -> None:
    (tmp_path / "a").mkdir()
    files = [write(tmp_path / "a", {"q": "What is 1?", "completion": "One."}), write(tmp_path, ask(2))]
    assert check_data(files, processor, DataRules(columns={"q": "prompt"})).report.train.num_kept == 2
    with pytest.raises(DataRejected, match="'zzz', which no row has"):
        check_data(files, processor, DataRules(on_bad="skip", columns={"q": "prompt", "zzz": "images"}))
