"""The numbers that judging can give: their names, units, and which way is better.

Owns: the closed list, which metrics a recipe's list means, and which numbers a run will have before it has begun.
Does not know: how any of them is computed. Place in a training run: asked before training by the gate's check, and
after it by whoever writes a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from training.evaluation.errors import MetricError


@dataclass(frozen=True, slots=True)
class Measure:
    """One number's meaning."""

    name: str
    title: str
    unit: str
    is_better_higher: bool = True
    has_base: bool = True
    """Whether the base has it too; a comparison with the base itself has not."""
    digits: int = 3

    def shown(self, value: float | None) -> str:
        return "-" if value is None else f"{value:.{self.digits}f}"


_ALL: Final = (
    Measure("loss", "held-out loss", "nats per label", is_better_higher=False, digits=4),
    Measure("exact_match", "exact match", "0..1"),
    Measure("token_f1", "token F1", "0..1"),
    Measure("bleu", "BLEU", "0..100", digits=1),
    Measure("rouge_l", "ROUGE-L", "0..1"),
    Measure("chrf", "chrF", "0..100", digits=1),
    Measure("json_valid", "JSON validity", "0..1"),
    Measure("vision_dependence", "vision dependence (token F1)", "-1..1"),
    Measure("vision_dependence_exact", "vision dependence (exact match)", "-1..1"),
    Measure("general_agreement", "general ability: agreement with the base", "0..1", has_base=False),
    Measure("general_identical", "general ability: answers as the base's", "0..1", has_base=False),
    Measure("general_kl", "general ability: divergence from the base", "nats", False, False),
)
MEASURES: Final[Mapping[str, Measure]] = {measure.name: measure for measure in _ALL}
"""By name, in the order in which tables list them."""

DEFAULT_METRICS: Final = ("exact_match", "token_f1", "bleu", "rouge_l", "chrf")
"""What a recipe that names no metrics gets."""
ANSWER_METRICS: Final = (*DEFAULT_METRICS, "json_valid")
"""What may be asked for: those that are computed from answers."""
VISION_METRICS: Final = ("vision_dependence", "vision_dependence_exact")
GENERAL_METRICS: Final = ("general_agreement", "general_identical", "general_kl")


def measure(name: str) -> Measure:
    """Raises MetricError, with the names there are."""
    found = MEASURES.get(name)
    if found is None:
        raise MetricError(f"there is no metric {name!r}; known are {', '.join(MEASURES)}")
    return found


def json_number(value: float | None) -> float | None:
    """None for infinities and what is no number: JSON has no word for them."""
    return value if value is not None and math.isfinite(value) else None


def chosen_metrics(asked: Sequence[str]) -> tuple[str, ...]:
    """The metrics of answers that ``asked`` means: the default ones when empty. ``loss`` and the other numbers come by
    themselves wherever they can be had, so naming them is allowed and changes nothing. Raises MetricError."""
    names = [measure(name).name for name in asked]
    of_answers = tuple(name for name in ANSWER_METRICS if name in names)
    return of_answers or DEFAULT_METRICS


def expected_numbers(
    metrics: Sequence[str], *, has_rows: bool, has_pictures: bool, has_loss: bool, has_general: bool = True
) -> tuple[str, ...]:
    """Names of all numbers that an evaluation will give; what a gate may speak of."""
    if not has_rows:
        return ()
    names = {*chosen_metrics(metrics)}
    names |= {"loss"} if has_loss else set()
    names |= {*VISION_METRICS} if has_pictures else set()
    names |= {*GENERAL_METRICS} if has_general else set()
    return tuple(name for name in MEASURES if name in names)
