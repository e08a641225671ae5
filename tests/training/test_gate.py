"""Rules are read or refused with a reason before training, and held with both numbers after it."""

from __future__ import annotations

import math

import pytest

from training.evaluation.catalogue import MEASURES
from training.evaluation.errors import GateError
from training.evaluation.gate import Bound, check_gate, hold, parse_rule

ALL = tuple(MEASURES)


@pytest.mark.parametrize(
    ("text", "metric", "op", "bound"),
    [
        ("exact_match >= base + 0.1", "exact_match", ">=", Bound(1.0, 0.1)),
        ("exact_match>=base+0.1", "exact_match", ">=", Bound(1.0, 0.1)),
        ("loss <= base", "loss", "<=", Bound(1.0, 0.0)),
        ("loss <= base * 0.9", "loss", "<=", Bound(0.9, 0.0)),
        ("loss < 0.9*base - .05", "loss", "<", Bound(0.9, -0.05)),
        ("loss <= base * 90%", "loss", "<=", Bound(0.9, 0.0)),
        ("bleu >= 30", "bleu", ">=", Bound(None, 30.0)),
        ("vision_dependence > -0.1", "vision_dependence", ">", Bound(None, -0.1)),
        ("exact_match ≥ 90%", "exact_match", ">=", Bound(None, 0.9)),
        ("general_kl <= 1e-2", "general_kl", "<=", Bound(None, 0.01)),
    ],
)
def test_rules_are_read(text: str, metric: str, op: str, bound: Bound) -> None:
    rule = parse_rule(text)
    assert (rule.metric, rule.op) == (metric, op)
    assert rule.bound.factor == bound.factor and rule.bound.offset == pytest.approx(bound.offset)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read"),
        ("exact_match", "cannot be read"),
        (">= 0.9", "cannot be read"),
        ("exact_match >=", "is no bound"),
        ("blue >= 30", r"no metric 'blue'; known are .*bleu"),
        ("loss = 1", "'=' is no comparison"),
        ("loss == 1", "'==' is no comparison"),
        ("loss <= best", "'best' is no bound"),
        ("loss <= base + base", "is no bound"),
        ("loss <= base / 2", "is no bound"),
        ("loss <= 0.9 <= 1", "is no bound"),
        ("exact_match >= 90", "exact_match goes to 1: write 0.9"),
        ("bleu >= 30%", "goes from 0 to 100"),
        ("loss <= __import__('os')", "is no bound"),
        ("loss <= 1; bleu >= 1", "is no bound"),
    ],
)
def test_what_is_no_rule_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(GateError, match=reason):
        parse_rule(text)


@pytest.mark.parametrize(
    ("rule", "value", "base", "passes"),
    [
        ("exact_match >= base + 0.1", 0.3, 0.2, True),  # 0.2 + 0.1 is above 0.3 in floating point
        ("exact_match >= base + 0.1", 0.29, 0.2, False),
        ("exact_match > base", 0.2, 0.2, False),
        ("loss <= base", 1.0, 1.0, True),
        ("loss < base", 1.0, 1.0, False),
        ("loss <= base * 0.9", 0.9, 1.0, True),
        ("loss <= base * 0.9", 0.91, 1.0, False),
        ("bleu >= 30", 29.9, 80.0, False),
        ("loss <= base", math.nan, 1.0, False),
        ("loss <= base", 1.0, math.nan, False),
        ("loss <= 2", math.inf, 1.0, False),
    ],
)
def test_rules_are_held(rule: str, value: float, base: float, passes: bool) -> None:
    read = check_gate([rule], ALL)
    result = hold(read, {read[0].metric: value}, {read[0].metric: base})
    assert result.passed is passes


def test_the_outcome_has_both_numbers() -> None:
    rules = check_gate(["exact_match >= base + 0.1", "bleu >= 30"], ALL)
    result = hold(rules, {"exact_match": 0.25, "bleu": 41.26}, {"exact_match": 0.2, "bleu": 3.0})
    assert result.lines == (
        "FAILS  exact_match >= base + 0.1: 0.250 against 0.300 (base 0.200)",
        "holds  bleu >= 30: 41.3 against 30.0 (base 3.0)",
    )
    assert not result.passed
    assert result.as_json()["passed"] is False
    first = result.outcomes[0].as_json()
    assert (first["value"], first["base"], first["bound"]) == (0.25, 0.2, pytest.approx(0.3))


def test_no_rules_pass() -> None:
    assert hold((), {}, {}).passed


def test_a_number_that_is_missing_after_all_fails_its_rule() -> None:
    (rule,) = check_gate(["loss <= base"], ALL)
    result = hold([rule], {"loss": 1.0}, {})
    assert not result.passed
    assert result.lines == ("FAILS  loss <= base: 1.0000 against -",)


def test_rules_on_numbers_that_will_not_be_there_are_refused_before_training() -> None:
    there = ("exact_match", "bleu")
    with pytest.raises(GateError) as caught:
        check_gate(
            ["exact_match >= 0.5", "vision_dependence >= 0.1", "json_valid >= 0.9", "loss <= b"], there
        )
    first, second, third = str(caught.value).splitlines()
    assert "vision_dependence will not be computed" in first and "there will be exact_match, bleu" in first
    assert "add json_valid to metrics" in second
    assert "is no bound" in third


def test_without_held_out_rows_any_rule_is_refused() -> None:
    with pytest.raises(GateError, match="no held-out rows to judge on; hold rows out"):
        check_gate(["loss <= base"], ())


def test_what_compares_with_the_base_is_not_compared_with_it_again() -> None:
    with pytest.raises(GateError, match="compare it with a number"):
        check_gate(["general_agreement >= base"], ALL)
    assert check_gate(["general_agreement >= 0.5"], ALL)
