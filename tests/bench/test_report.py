"""The report: what a table shows, what it warns of, and that unlike devices are never compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.provenance import Device, Provenance
from bench.report import UnlikeDevices, plot, render
from bench.results import Result, last_line, load, make_result, save

HERE = Provenance("0123456789abcdef", False, Device("cpu", "Some CPU", 2, ("avx2",)), {"torch": "2.13"}, 0.1)
CELL: dict[str, object] = {
    "workload": "closed-8",
    "endpoint": {"label": "lorikeet"},
    "median": {
        "output_tokens_per_s": 123.45,
        "first_token_ms_p50": 40.0,
        "first_token_ms_p99": 90.0,
        "num_failed": 1,
    },
    "spread": {"output_tokens_per_s": 0.1},
    "runs": [{"output_tokens_per_s": 120.0}, {"output_tokens_per_s": 130.0}],
    "by_adapter": {"french": {"num_calls": 3}},
    "ratios": {"lorikeet, base only": {"median": 0.87, "lowest": 0.81, "highest": 0.93, "num_pairs": 5}},
    "parity": {"lorikeet, base only": {"num_equal": 3, "num_compared": 4}},
    "server_peak_bytes": 3 * 2**30,
    "efficiency": {"efficiency": 0.955, "possible_ratio": 0.911},
}
SCENARIO: dict[str, object] = {
    "workload": "prefix",
    "endpoint": {"label": "lorikeet"},
    "median": {"second_to_first_ratio": 0.25},
}
SWEEP: dict[str, object] = {
    "workload": "open-cv1",
    "endpoint": {"label": "lorikeet"},
    "sweep": [
        {"rate": 1.0, "figures": {"goodput_share": 1.0, "calls_per_s": 0.98}},
        {"rate": 1.5, "figures": {"goodput_share": 0.4, "calls_per_s": 1.1}},
    ],
    "knee": 1.0,
}
KERNELS: dict[str, object] = {
    "workload": "kernels",
    "endpoint": {"label": "0.5b"},
    "timings": [
        {
            "kernel": "lora",
            "variant": "ours",
            "site": "q",
            "rows": 8,
            "us": 50.0,
            "floor_us": 40.0,
            "share": 0.8,
        }
    ],
}


def result(origin: Provenance = HERE) -> Result:
    return make_result("run", origin, [CELL, SCENARIO, SWEEP, KERNELS])


def test_the_tables_hold_every_kind_of_figure() -> None:
    text = render([result()], is_markdown=False)
    for words in (
        "123.5",
        "±5%",
        "0.87",
        "0.81 to 0.93",
        "0.91",
        "0.95",
        "3 of 4",
        "3.00",
        "second_to_first_ratio",
        "0.25",
        "knee",
        "80%",
    ):
        assert words in text, words
    assert "Some CPU (avx2), 2 CPUs" in text and "0123456789ab" in text and "torch 2.13" in text


def test_markdown_tables_have_as_many_cells_in_every_row() -> None:
    blocks = render([result()], is_markdown=True).split("### ")[1:]
    assert len(blocks) == 5
    for block in blocks:
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    "other",
    [
        Device("cpu", "Another CPU", 2, ("avx2",)),
        Device("cpu", "Some CPU", 4, ("avx2",)),
        Device("cuda", "H100", 2),
    ],
)
def test_unlike_devices_are_not_compared(other: Device, tmp_path: Path) -> None:
    pair = [result(), result(replace(HERE, device=other))]
    with pytest.raises(UnlikeDevices, match="2 devices"):
        render(pair, is_markdown=True)
    with pytest.raises(UnlikeDevices):
        plot(pair, tmp_path)
    assert render([result(), result()], is_markdown=True)


def test_a_busy_machine_and_uncommitted_changes_are_told() -> None:
    text = render([result(replace(HERE, load_average=4.0, is_dirty=True))], is_markdown=False)
    assert "no claims" in text and "uncommitted" in text
    assert "Warning" not in render([result()], is_markdown=False)


def test_results_survive_their_file_and_other_files_are_refused(tmp_path: Path) -> None:
    path = save(result(), tmp_path)
    assert load(path).as_json() == json.loads(json.dumps(result().as_json()))
    other = tmp_path / "other.json"
    for content in ("{}", "[]", "no json"):
        other.write_text(content)
        with pytest.raises(ValueError, match=r"other\.json"):
            load(other)


def test_the_last_line_is_one_line_of_medians() -> None:
    line = last_line(result())
    assert "\n" not in line
    cell = json.loads(line)["cells"][0]
    assert cell["median"]["output_tokens_per_s"] == 123.45 and "runs" not in cell and "by_adapter" not in cell


def test_plots_are_pictures_of_what_there_is(tmp_path: Path) -> None:
    made = plot([result()], tmp_path / "plots")
    assert sorted(path.name for path in made) == [
        f"bench-{name}.{kind}" for name in ("latency", "sweep", "throughput") for kind in ("png", "svg")
    ]
    for path in made:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in head
    again = plot([result()], tmp_path / "again")
    svg = [[path.read_bytes() for path in paths if path.suffix == ".svg"] for paths in (made, again)]
    assert svg[0] == svg[1]
    assert plot([make_result("run", HERE, [KERNELS])], tmp_path / "none") == ()
