"""Cells against the floor: which cells have one, and whose adapters count."""

from __future__ import annotations

from typing import Any

import pytest

from bench.efficiency import Ground, hold_against
from bench.floors import LanguageShape, Machine

SHAPE = LanguageShape(128, 2, 4, 2, 32, 192, 1024)
GROUND = Ground(Machine(1e9, 1e12, 1e12), SHAPE, 8, ("q", "v"), is_cpu=True)


def cell(workload: str, label: str, **more: object) -> dict[str, Any]:
    median = {
        "num_calls": 16,
        "prompt_tokens": 320.0,
        "output_tokens": 384.0,
        "seconds": 2.0,
        "num_failed": 0,
    }
    endpoint = {"label": label, "naming": "none" if "base" in label else "adapter"}
    return {"workload": workload, "endpoint": endpoint, "median": median, **more}


def test_a_closed_loop_over_text_has_a_floor_and_adapters_raise_it() -> None:
    ratios = {"lorikeet, base only": {"median": 0.9}}
    ours, base = cell("closed-16", "lorikeet", ratios=ratios), cell("closed-16", "lorikeet, base only")
    hold_against([ours, base], GROUND)
    assert ours["floor"]["seconds"] > base["floor"]["seconds"] > 0
    assert ours["floor"]["share"] == pytest.approx(ours["floor"]["seconds"] / 2.0)
    possible = base["floor"]["seconds"] / ours["floor"]["seconds"]
    assert ours["efficiency"]["possible_ratio"] == pytest.approx(possible)
    assert ours["efficiency"]["efficiency"] == pytest.approx(0.9 / possible)
    assert "efficiency" not in base


@pytest.mark.parametrize("workload", ["open-cv1", "pictures", "system", "fan-out", "prove-1"])
def test_what_is_bound_by_other_things_has_none(workload: str) -> None:
    other = cell(workload, "lorikeet")
    hold_against([other], GROUND)
    assert "floor" not in other


def test_a_worker_that_keeps_no_streams_and_a_run_that_failed_have_none() -> None:
    worker, broken = cell("closed-16", "peft set-adapter"), cell("closed-16", "lorikeet")
    del worker["endpoint"]["naming"]
    broken["median"]["num_failed"] = 1
    hold_against([worker, broken], GROUND)
    assert "floor" not in worker and "floor" not in broken
