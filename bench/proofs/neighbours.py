"""Items 6 and 7: what one caller may do to another: a long prompt beside streams, and a flood on one adapter."""

from __future__ import annotations

from bench.claims import Claim, Proof
from bench.proofs.bed import Bed
from bench.scenarios import SCENARIOS, run_scenario


def prove_long_prompt(bed: Bed) -> Proof:
    cell = run_scenario(bed.shared(), SCENARIOS["long-prompt"], bed.plan("prove"), bed.tell)
    name = "worst gap of 8 streams beside a prompt of 2,000 tokens, to the quiet p99"
    return Proof((Claim(6, name, _values(cell, "worst_stall_ratio"), 2.0, "at most"),), (cell,))


def prove_flood(bed: Bed) -> Proof:
    """On the embedded base: 32 streams on one adapter, and one on another."""
    with bed.pocket(8) as endpoint:
        cell = run_scenario(endpoint, SCENARIOS["flood"], bed.plan("pocket"), bed.tell)
    name = "p99 of the first token beside a flood on another adapter, to the unloaded one"
    return Proof((Claim(7, name, _values(cell, "first_token_ratio"), 2.0, "at most"),), (cell,))


def _values(cell: dict[str, object], figure: str) -> tuple[float, ...]:
    runs = cell["runs"]
    return tuple(float(run[figure]) for run in runs) if isinstance(runs, list) else ()
