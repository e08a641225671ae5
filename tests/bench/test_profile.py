"""The profile of a step: figures worked out by hand, windows that hold something else, and a whole run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cells import NothingMeasured
from bench.cli import app
from bench.endpoint import Endpoint
from bench.profile import Asked, Edge, figures, profile
from bench.report import render
from bench.results import Result
from bench.serving import Served
from tests.bench.fake_sse import Script, fake_sse_server

OPENED = {
    "lorikeet_generation_tokens_total": 100.0,
    "lorikeet_batch_rows_count": 10.0,
    "lorikeet_batch_rows_sum": 70.0,
    "lorikeet_step_seconds_sum/forward": 1.0,
    "lorikeet_step_seconds_sum/plan": 0.5,
    "lorikeet_step_cpu_seconds_total/forward": 0.9,
    "lorikeet_step_cpu_seconds_total/plan": 0.2,
    "lorikeet_step_cpu_seconds_total/send": 0.1,
    "lorikeet_prompt_tokens_total": 50.0,
}
CLOSED = OPENED | {
    "lorikeet_generation_tokens_total": 260.0,
    "lorikeet_batch_rows_count": 30.0,
    "lorikeet_batch_rows_sum": 230.0,
    "lorikeet_step_seconds_sum/forward": 1.2,
    "lorikeet_step_seconds_sum/plan": 0.52,
    "lorikeet_step_cpu_seconds_total/forward": 1.05,
    "lorikeet_step_cpu_seconds_total/plan": 0.21,
    "lorikeet_step_cpu_seconds_total/send": 0.13,
}

INSIDE = frozenset({20, 50})
"""Of 60 tokens: behind the opening of the window, and behind its closing."""


@pytest.fixture
def server() -> Iterator[tuple[Endpoint, Script]]:
    with fake_sse_server() as (url, script):
        yield Endpoint(url, "the-base", adapters=("one", "two")), script


def test_figures_are_those_worked_out_by_hand() -> None:
    """20 steps in 0.3 s: 15 ms each, of which forward 10 and plan 1; the main thread ran 2 ms of each, the engine's 0.5
    in plan and 1.5 in send.
    """
    found = figures(Edge(5.0, OPENED, 1.0, 2.0), Edge(5.3, CLOSED, 1.04, 2.2), 8)
    assert found["num_steps"] == 20
    assert found["step_ms"] == pytest.approx(15.0)
    assert found["forward_ms"] == pytest.approx(10.0) and found["plan_ms"] == pytest.approx(1.0)
    assert found["between_ms"] == pytest.approx(4.0), "what no phase has"
    assert found["around_ms"] == pytest.approx(5.0), "all but the model"
    assert found["around_cpu_ms"] == pytest.approx(2.0), "of it, what was computed"
    assert found["http_cpu_ms"] == pytest.approx(2.0) and found["engine_cpu_ms"] == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lorikeet_batch_rows_sum": 229.0}, "decoded 8 rows"),
        ({"lorikeet_prompt_tokens_total": 51.0}, "decoded 8 rows"),
        ({"lorikeet_batch_rows_count": 10.0}, "no step"),
    ],
    ids=["a-row-less", "a-prompt-between", "not-ours"],
)
def test_a_window_with_anything_else_in_it_is_refused(change: dict[str, float], words: str) -> None:
    with pytest.raises(NothingMeasured, match=words):
        figures(Edge(5.0, OPENED, 0.0, 0.0), Edge(5.3, CLOSED | change, 0.0, 0.0), 8)


def test_adapters_and_base_take_turns_and_lora_is_their_difference(server: tuple[Endpoint, Script]) -> None:
    endpoint, script = server
    script.waits_at = INSIDE
    cells = profile(endpoint, Served(endpoint.url, 0, 0.0), Asked(1, 60, 2), lambda _: None)
    assert [body.get("adapter") for body in script.bodies] == ["one", None] * 3, "a warm-up, then two repeats"
    found, base = (cell["profile"] for cell in cells)
    assert isinstance(found, dict) and isinstance(base, dict)
    assert found["forward_ms"] == pytest.approx(8.0) and found["lora_ms"] == pytest.approx(0.0, abs=1e-6)
    assert "lora_ms" not in base and "http_cpu_ms" not in base and "around_cpu_ms" not in base
    assert 0 < found["num_steps"] < 60


def test_streams_that_end_too_soon_give_no_window(server: tuple[Endpoint, Script]) -> None:
    endpoint, _ = server
    with pytest.raises(NothingMeasured, match="--tokens"):
        profile(endpoint, Served(endpoint.url, 0, 0.0), Asked(1, 8, 1), lambda _: None)


def test_the_command_prints_a_table_and_one_json_line_last(
    server: tuple[Endpoint, Script], tmp_path: Path
) -> None:
    endpoint, script = server
    script.waits_at = INSIDE
    named = ("--url", endpoint.url, "--model", "the-base", "--adapters", "one", "--out", str(tmp_path))
    done = CliRunner().invoke(app, ["profile", *named, "--rows", "1", "--tokens", "60", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.strip().splitlines()
    assert [cell["workload"] for cell in json.loads(lines[-1])["cells"]] == ["profile-1"] * 2
    assert any("forward" in line and "8.000" in line for line in lines[:-1])
    assert len(list(tmp_path.glob("profile-*.json"))) == 1


def test_the_report_shares_out_the_step() -> None:
    cell = {
        "workload": "profile-8",
        "endpoint": {"label": "lorikeet"},
        "profile": {"step_ms": 20.0, "forward_ms": 15.0, "http_cpu_ms": 1.0, "num_steps": 9},
    }
    text = render([Result("profile", {}, [cell])], is_markdown=False)
    rows = [line.split() for line in text.splitlines() if "profile-8" in line]
    assert rows == [
        ["lorikeet", "profile-8", "step", "20.000", "100.0%"],
        ["lorikeet", "profile-8", "forward", "15.000", "75.0%"],
        ["lorikeet", "profile-8", "http", "cpu", "1.000", "5.0%"],
    ]


def test_processor_time_is_told_apart_by_thread() -> None:
    main, others = Served("", os.getpid(), 0.0).cpu_seconds()
    assert main > 0 and others >= 0
    assert Served("", 0, 0.0).cpu_seconds() == (0.0, 0.0)
