"""Gate: the rules that an adapter must satisfy before anything is deployed.

A rule is ``metric op bound``: op is one of >= > <= <; bound is a number (``0.9``, ``90%``), or the base's value of the
same metric on the same rows, perhaps times a number, perhaps plus or minus one: ``base``, ``base + 0.1``,
``base * 0.9``, ``base * 2 - 0.05``. BLEU and chrF go from 0 to 100, loss is in nats, all else from 0 to 1.
``exact_match >= base + 0.1`` asks for ten points of a hundred more than the base.

Owns: reading rules, checking before training that every number they name will be there, holding them.
Does not know: how numbers are made, what happens to an adapter that fails.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from training.evaluation.catalogue import MEASURES, json_number, measure
from training.evaluation.errors import GateError, MetricError

_TOLERANCE: Final = 1e-9
"""Of comparisons: 0.2 + 0.1 is above 0.3 in floating point, and no rule means that."""
_NUMBER: Final = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?%?"
_RULE: Final = re.compile(r"\s*(?P<metric>\w+)\s*(?P<op>[<>]=?|[=!]=?|≥|≤)\s*(?P<bound>.*?)\s*", re.DOTALL)
_PLAIN: Final = re.compile(rf"[+-]?\s*{_NUMBER}")
_OF_BASE: Final = re.compile(
    rf"(?:(?P<before>{_NUMBER})\s*\*\s*)?base(?:\s*\*\s*(?P<after>{_NUMBER}))?"
    rf"(?:\s*(?P<sign>[+-])\s*(?P<more>{_NUMBER}))?"
)
_GRAMMAR: Final = (
    "a rule is `metric >= 0.9`, `metric >= base + 0.1` or `metric <= base * 0.9`, with >=, >, <= or <"
)


@dataclass(frozen=True, slots=True)
class Bound:
    """factor * base + offset; without ``factor`` it is ``offset`` alone."""

    factor: float | None
    offset: float

    def value(self, base: float | None) -> float | None:
        if self.factor is None:
            return self.offset
        return None if base is None else self.factor * base + self.offset


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule as read."""

    text: str
    metric: str
    op: str
    bound: Bound

    def holds(self, value: float, bound: float) -> bool:
        """A value that is no number holds nothing."""
        if self.op in (">=", ">"):
            return value >= bound - _TOLERANCE if self.op == ">=" else value > bound + _TOLERANCE
        return value <= bound + _TOLERANCE if self.op == "<=" else value < bound - _TOLERANCE


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """One rule held against the numbers; None is a number that is not there, which fails the rule."""

    rule: str
    metric: str
    passed: bool
    value: float | None
    bound: float | None
    base: float | None

    def text(self) -> str:
        shown = measure(self.metric).shown
        of_base = f" (base {shown(self.base)})" if self.base is not None else ""
        verdict = "holds" if self.passed else "FAILS"
        return f"{verdict}  {self.rule}: {shown(self.value)} against {shown(self.bound)}{of_base}"

    def as_json(self) -> dict[str, object]:
        return {
            "rule": self.rule, "metric": self.metric, "passed": self.passed,
            "value": json_number(self.value), "bound": json_number(self.bound), "base": json_number(self.base),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class GateResult:
    """All rules held; without rules everything passes."""

    outcomes: tuple[RuleOutcome, ...]

    @property
    def passed(self) -> bool:
        return all(outcome.passed for outcome in self.outcomes)

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(outcome.text() for outcome in self.outcomes)

    def as_json(self) -> dict[str, object]:
        return {"passed": self.passed, "rules": [outcome.as_json() for outcome in self.outcomes]}


def parse_rule(text: str) -> Rule:
    """Raises GateError, which names what is wrong."""
    found = _RULE.fullmatch(text)
    if found is None:
        raise GateError(f"gate rule {text!r} cannot be read: {_GRAMMAR}")
    op = {"≥": ">=", "≤": "<="}.get(found["op"], found["op"])
    if op not in (">=", ">", "<=", "<"):
        raise GateError(f"gate rule {text!r}: {op!r} is no comparison of a gate; {_GRAMMAR}")
    rule = Rule(" ".join(text.split()), _known(found["metric"], text), op, _bound(found["bound"], text))
    _check_unit(rule, found["bound"])
    return rule


def check_gate(rules: Sequence[str], available: Collection[str]) -> tuple[Rule, ...]:
    """The rules, read; ``available`` are the numbers that there will be (``catalogue.expected_numbers``). To be called
    before training: raises GateError naming every rule that cannot be read or held."""
    read, wrong = [], []
    for text in rules:
        try:
            read.append(_holdable(parse_rule(text), available))
        except GateError as error:
            wrong.append(str(error))
    if wrong:
        raise GateError("\n".join(wrong))
    return tuple(read)


def hold(rules: Sequence[Rule], adapter: Mapping[str, float], base: Mapping[str, float]) -> GateResult:
    """The rules against the numbers of the adapter and of the base."""
    return GateResult(
        tuple(_outcome(rule, adapter.get(rule.metric), base.get(rule.metric)) for rule in rules)
    )


def _outcome(rule: Rule, value: float | None, base: float | None) -> RuleOutcome:
    bound = rule.bound.value(base)
    passed = value is not None and bound is not None and rule.holds(value, bound)
    return RuleOutcome(rule.text, rule.metric, passed, value, bound, base)


def _known(metric: str, text: str) -> str:
    try:
        return measure(metric).name
    except MetricError as error:
        raise GateError(f"gate rule {text!r}: {error}") from error


def _bound(words: str, text: str) -> Bound:
    if _PLAIN.fullmatch(words):
        return Bound(None, _number(words))
    found = _OF_BASE.fullmatch(words)
    if found is None:
        raise GateError(f"gate rule {text!r}: {words!r} is no bound; {_GRAMMAR}")
    factor = _number(found["before"] or "1") * _number(found["after"] or "1")
    offset = _number((found["sign"] or "") + (found["more"] or "0"))
    return Bound(factor, offset)


def _check_unit(rule: Rule, bound: str) -> None:
    """A share above 1, or a percentage of what is counted to 100 anyway, is a slip."""
    unit = measure(rule.metric).unit
    if unit.endswith("..1") and rule.bound.factor is None and rule.bound.offset > 1:
        raise GateError(
            f"gate rule {rule.text!r}: {rule.metric} goes to 1: write {rule.bound.offset / 100:g}"
        )
    if unit == "0..100" and bound.endswith("%") and rule.bound.offset:
        raise GateError(f"gate rule {rule.text!r}: {rule.metric} goes from 0 to 100: write it without %")


def _number(words: str) -> float:
    digits = "".join(words.split())
    return float(digits[:-1]) / 100 if digits.endswith("%") else float(digits)


def _holdable(rule: Rule, available: Collection[str]) -> Rule:
    if rule.metric not in available:
        there = ", ".join(name for name in MEASURES if name in available)
        raise GateError(
            f"gate rule {rule.text!r}: {rule.metric} will not be computed in this run; "
            + (f"there will be {there}" if there else "there are no held-out rows to judge on")
            + f"; {_remedy(rule.metric, bool(there))}"
        )
    if rule.bound.factor is not None and not MEASURES[rule.metric].has_base:
        raise GateError(
            f"gate rule {rule.text!r}: {rule.metric} compares with the base already; compare it with a number"
        )
    return rule


def _remedy(metric: str, has_rows: bool) -> str:
    if not has_rows:
        return "hold rows out (eval or eval_split), or give no gate rules"
    if metric.startswith("vision"):
        return "it needs held-out rows with pictures"
    if metric == "loss":
        return "it needs the trainer's model; compare answers instead"
    return f"add {metric} to metrics, or drop the rule"
