"""A figure of the living adapters says what it must be and whether it is."""

from __future__ import annotations

import json

import pytest

from bench.living_checks import Check, checks_of, with_checks


@pytest.mark.parametrize(
    ("value", "limit", "is_at_least", "is_met"),
    [(1.5, 1.5, False, True), (1.51, 1.5, False, False), (0.5, 0.5, True, True), (0.49, 0.5, True, False),
     (float("nan"), 1, False, False), (float("nan"), 1, True, False)],
)  # fmt: skip
def test_a_limit_is_a_ceiling_or_a_floor_and_no_number_meets_neither(
    value: float, limit: float, is_at_least: bool, is_met: bool
) -> None:
    check = Check("gaps", value, limit, is_at_least)
    assert check.is_met is is_met
    assert check.line("storm").endswith(" met" if is_met else "NOT MET")


def test_checks_go_through_a_result_and_back() -> None:
    checks = [Check("gaps", 1.2, 1.5), Check("loads", 3, 15, is_at_least=True)]
    cell = json.loads(json.dumps(with_checks({"figure": "storm"}, checks)))
    assert checks_of(cell) == checks
    assert [each["is_met"] for each in cell["checks"]] == [True, False]


def test_a_figure_that_promises_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="storm has no checks"):
        checks_of({"figure": "storm", "checks": []})
