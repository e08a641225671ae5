"""A sweep runs each experiment once, survives those that fail, goes on where it stopped, and says which is best."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from training.evaluation.errors import MetricError
from training.recipe.recipe import Recipe
from training.sweep.sweep import (
    Experiment,
    ExperimentResult,
    SweepError,
    SweepRow,
    SweepTable,
    draw_sweep,
    experiments_of,
    parse_axis,
    read_axes,
    run_sweep,
)

# ---- grids


@pytest.mark.parametrize(
    ("option", "key", "values"),
    [
        ("r=8,16,32", "r", [8, 16, 32]),
        ("lr=2e-4, 1e-4", "lr", [2e-4, 1e-4]),
        ("merger.lr=0.001", "merger.lr", [0.001]),
        ("--max-steps=10", "max_steps", [10]),
        ("rslora=true,false", "rslora", [True, False]),
        ("lora_plus=none,16", "lora_plus", [None, 16]),
        ("preset=language,qv", "preset", ["language", "qv"]),
        ('preset=[["language", "merger"], "qv"]', "preset", [["language", "merger"], "qv"]),
        ('targets=["a=b,c"]', "targets", ["a=b,c"]),
        ("revision=1.2.3", "revision", ["1.2.3"]),
    ],
)
def test_an_axis_is_a_key_with_values(option: str, key: str, values: list[object]) -> None:
    axis = parse_axis(option)
    assert axis == tuple({key: value} for value in values)
    assert [type(value) for changes in axis for value in changes.values()] == [
        type(value) for value in values
    ]


@pytest.mark.parametrize("option", ["r", "r=", "=8", "r=8,,16", "r=[8", "r=[]", "r=,"])
def test_what_is_no_axis_is_refused(option: str) -> None:
    with pytest.raises(SweepError, match="grid"):
        parse_axis(option)


def test_axes_multiply() -> None:
    experiments = experiments_of([parse_axis("r=8,16"), parse_axis("alpha=16,32")])
    assert [experiment.name for experiment in experiments] == [
        "r8-alpha16",
        "r8-alpha32",
        "r16-alpha16",
        "r16-alpha32",
    ]
    assert experiments[1].changes == {"r": 8, "alpha": 32}


def test_a_yaml_file_is_axes_or_experiments(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("r: [8, 16]\nlr: [2e-4]\n")
    assert [experiment.changes for experiment in experiments_of(read_axes(path))] == [
        {"r": 8, "lr": 2e-4}, {"r": 16, "lr": 2e-4},
    ]  # fmt: skip
    path.write_text("- {r: 8, alpha: 16}\n- {r: 16, alpha: 32, merger.lr: 1e-3}\n")
    experiments = experiments_of([*read_axes(path), parse_axis("seed=0,1")])
    assert len(experiments) == 4
    assert experiments[-1].changes == {"r": 16, "alpha": 32, "merger.lr": 1e-3, "seed": 1}


@pytest.mark.parametrize("content", ["", "r: 8\n", "[]", "- 8\n", "r: []\n", "r: [\n", "- {}\n"])
def test_yaml_that_is_no_grid_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(content)
    with pytest.raises(SweepError, match=r"grid\.yaml"):
        read_axes(path)
    with pytest.raises(SweepError, match="cannot be read"):
        read_axes(tmp_path / "none.yaml")


def test_grids_that_repeat_themselves_are_refused() -> None:
    with pytest.raises(SweepError, match="r8 twice"):
        experiments_of([parse_axis("r=8,8")])
    with pytest.raises(SweepError, match="r on two axes"):
        experiments_of([parse_axis("r=8"), parse_axis("r=16")])
    with pytest.raises(SweepError, match="needs a grid"):
        experiments_of([])
    many = ",".join(map(str, range(100)))
    with pytest.raises(SweepError, match="more than 1000"):
        experiments_of([parse_axis(f"r={many}"), parse_axis(f"seed={many}")])


def test_names_are_fit_for_folders_and_differ() -> None:
    axis = parse_axis('targets=[".*/q_proj|../x", ".*(q|v)_proj", "' + "long" * 50 + '"]')
    names = [experiment.name for experiment in experiments_of([axis, parse_axis("lr=0.0002,2e-5")])]
    assert len(set(names)) == 6
    assert all(name.replace("-", "").replace("_", "").replace(".", "").isalnum() for name in names)
    assert all(len(name) < 100 and not name.startswith(".") for name in names)


# ---- running


class Lab:
    """Runs experiments by a table of what comes of them."""

    def __init__(self, outcomes: Mapping[int, ExperimentResult | Exception | type[BaseException]]) -> None:
        self.outcomes = dict(outcomes)
        self.ran: list[tuple[int, Path]] = []

    def run_one(self, recipe: Recipe, folder: Path) -> ExperimentResult:
        self.ran.append((recipe.r, folder))
        outcome = self.outcomes[recipe.r]
        if isinstance(outcome, ExperimentResult):
            return outcome
        raise outcome


def resolve(changes: Mapping[str, object]) -> Recipe:
    unknown = set(changes) - {"r", "alpha", "lr", "seed"}
    if unknown:
        raise ValueError(f"no recipe key {sorted(unknown)[0]!r}")
    return replace(Recipe(), **changes)  # type: ignore[arg-type]


def result(bleu: float, *, loss: float = 1.0, passed: bool = True) -> ExperimentResult:
    return ExperimentResult(
        {"bleu": bleu, "loss": loss}, {"bleu": 1.0, "loss": 2.0}, passed, 1234.5, 300 * 2**20, 9.0
    )


GRID = experiments_of([parse_axis("r=8,16,32")])


def test_a_failed_experiment_is_a_row_and_the_sweep_goes_on(tmp_path: Path) -> None:
    lab = Lab({8: result(40), 16: RuntimeError("out of\nmemory"), 32: result(50)})
    rows: list[SweepRow] = []
    table = run_sweep(GRID, resolve, lab.run_one, tmp_path, on_row=rows.append)
    assert [row.verdict() for row in table.rows] == [
        "passes",
        "failed: RuntimeError: out of memory",
        "passes",
    ]
    assert table.rows == tuple(rows)
    assert table.best is table.rows[2]
    assert [folder for _, folder in lab.ran] == [tmp_path / "r8", tmp_path / "r16", tmp_path / "r32"]


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    lab = Lab({8: result(40), 16: ValueError("no"), 32: KeyboardInterrupt})
    with pytest.raises(KeyboardInterrupt):
        run_sweep(GRID, resolve, lab.run_one, tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text())["best"] == "r8"  # the table so far is there
    again = Lab({16: result(30), 32: result(20)})
    begun: list[tuple[str, int]] = []
    table = run_sweep(
        GRID,
        resolve,
        again.run_one,
        tmp_path,
        on_begin=lambda experiment, number: begun.append((experiment.name, number)),
    )
    assert [r for r, _ in again.ran] == [16, 32]  # 8 is read, not run
    assert begun == [("r16", 2), ("r32", 3)]
    assert table.rows[0].outcome == result(40)
    assert table.best is table.rows[0]


@pytest.mark.parametrize("spoil", ["recipe", "context", "file"])
def test_a_result_of_something_else_is_never_taken_for_this_one(tmp_path: Path, spoil: str) -> None:
    lab = Lab({8: result(40), 16: result(41), 32: result(42)})
    run_sweep(GRID, resolve, lab.run_one, tmp_path, context="data 1")
    lab.ran.clear()
    other: Callable[[Mapping[str, object]], Recipe] = (
        (lambda changes: replace(resolve(changes), lr=1.0)) if spoil == "recipe" else resolve
    )
    if spoil == "file":
        (tmp_path / "r16" / "result.json").write_text("{}")
    with pytest.raises(SweepError, match="no result of a sweep" if spoil == "file" else "another recipe"):
        run_sweep(GRID, other, lab.run_one, tmp_path, context="data 2" if spoil == "context" else "data 1")
    assert lab.ran == []


def test_a_slip_in_the_last_experiment_is_found_before_the_first_trains(tmp_path: Path) -> None:
    lab = Lab({8: result(1)})
    experiments = [*GRID, Experiment("slip", {"rank": 8})]
    with pytest.raises(SweepError, match="experiment slip: no recipe key 'rank'"):
        run_sweep(experiments, resolve, lab.run_one, tmp_path)
    with pytest.raises(MetricError, match="no metric 'blue'"):
        run_sweep(GRID, resolve, lab.run_one, tmp_path, best_by="blue")
    assert lab.ran == []


# ---- the table


def table_of(*outcomes: ExperimentResult | str, best_by: str = "bleu") -> SweepTable:
    rows = [
        SweepRow(
            Experiment(f"e{number}", {"r": 8 * (number + 1), "lr": 1e-4}), 8 * (number + 1), 32.0, outcome
        )
        for number, outcome in enumerate(outcomes)
    ]
    return SweepTable(tuple(rows), best_by)


@pytest.mark.parametrize(
    ("outcomes", "best_by", "best"),
    [
        ((result(1), result(3), result(2)), "bleu", "e1"),
        ((result(3, loss=2.0), result(3, loss=1.0)), "bleu", "e1"),
        ((result(3), result(3)), "bleu", "e0"),
        ((result(9, passed=False), result(2)), "bleu", "e1"),
        ((result(1, passed=False), result(2, passed=False)), "bleu", "e1"),
        ((result(float("nan")), result(1)), "bleu", "e1"),
        ((result(9, loss=2.0), result(1, loss=1.0)), "loss", "e1"),
        (("broken", "broken"), "bleu", None),
        ((result(1),), "exact_match", None),
    ],
)
def test_the_best_is_marked(
    outcomes: tuple[ExperimentResult | str, ...], best_by: str, best: str | None
) -> None:
    table = table_of(*outcomes, best_by=best_by)
    found = table.best
    assert (found.experiment.name if found else None) == best
    starred = [line.split()[1] for line in table.text().splitlines() if line.startswith("*")]
    assert starred == ([best] if best else [])
    assert table.markdown().count("**best**") == len(starred)
    assert table.as_json()["best"] == best


def test_the_table_as_text_markdown_and_json(tmp_path: Path) -> None:
    table = table_of(result(41.26), "OutOfMemory: a|b", result(30, passed=False))
    assert table.text() == (
        "   experiment  r   alpha  lr      BLEU  tokens/s  peak memory  verdict\n"
        "*  e0          8   32     0.0001  41.3  1,234     300 MiB      passes\n"
        "   e1          16  32     0.0001  -     -         -            failed: OutOfMemory: a|b\n"
        "   e2          24  32     0.0001  30.0  1,234     300 MiB      below the gate\n"
        "best: e0, by highest BLEU of those that pass the gate; ties by held-out loss"
    )
    assert table.markdown().splitlines()[:4] == [
        "| experiment | r | alpha | lr | BLEU | tokens/s | peak memory | verdict |",
        "|---|---|---|---|---|---|---|---|",
        "| **e0** | 8 | 32 | 0.0001 | 41.3 | 1,234 | 300 MiB | **best**, passes |",
        "| e1 | 16 | 32 | 0.0001 | - | - | - | failed: OutOfMemory: a\\|b |",
    ]
    table.write(tmp_path)
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["rows"][0]["result"]["peak_bytes"] == 300 * 2**20
    assert content["rows"][1]["error"] == "OutOfMemory: a|b" and content["rows"][1]["result"] is None


def test_another_number_to_choose_by_has_its_column() -> None:
    scored = replace(result(41.0), scores={"bleu": 41.0, "exact_match": 0.5})
    assert "BLEU  exact match  tokens/s" in table_of(scored, best_by="exact_match").text()


@pytest.mark.parametrize("outcomes", [(result(1), "broken", result(3)), ("broken",), (result(1),)])
def test_the_plot_is_drawn(tmp_path: Path, outcomes: tuple[ExperimentResult | str, ...]) -> None:
    path = tmp_path / "sweep.png"
    draw_sweep(table_of(*outcomes), path)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 500
        has_lines = len([one for one in outcomes if not isinstance(one, str)]) > 1
        assert (image.width > 1000) == has_lines
    assert list(tmp_path.iterdir()) == [path]
