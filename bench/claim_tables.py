"""The tables of claims and floors: what was promised and is it met; how far from this machine's limits cells are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.results import Cell, claims_of, label_of
from bench.table import Table

MET = {True: "yes", False: "no", None: ""}


def claims_table(cells: Sequence[Cell]) -> Table | None:
    rows = [_claim(claim) for claim in claims_of(cells)]
    rows += [
        (
            str(cell["workload"]).removeprefix("prove-"),
            "not measured",
            "",
            str(cell["failure"])[:80],
            "",
            "",
            "no",
        )
        for cell in cells
        if "failure" in cell
    ]
    head = ("item", "claim", "target", "measured", "from", "pairs", "met")
    return Table("What the engine must show", head, tuple(rows)) if rows else None


def _claim(claim: Mapping[str, object]) -> tuple[str, ...]:
    target = claim["target"]
    met = claim["is_met"]
    return (
        str(claim["item"]),
        str(claim["name"]),
        f"{claim['sense']} {target:g}" if isinstance(target, float) else "",
        f"{claim['measured']:.3g}",
        f"{claim['lowest']:.3g} to {claim['highest']:.3g}",
        str(claim["num_pairs"]),
        MET[met if isinstance(met, bool) else None],
    )


def floors_table(cells: Sequence[Cell]) -> Table | None:
    """The share of the floor's speed, and what the rest of a step is spent on besides the model's forward."""
    rows = []
    for cell in cells:
        floor, median, profile = cell.get("floor"), cell.get("median"), cell.get("step_profile")
        if not isinstance(floor, dict) or not isinstance(median, dict):
            continue
        phases = profile if isinstance(profile, dict) else {}
        spent = ", ".join(
            f"{name.removesuffix('_ms')} {value:.3g} ms"
            for name, value in phases.items()
            if name.endswith("_ms")
        )
        shown = (
            f"{median['output_tokens_per_s']:.1f}",
            f"{floor['tokens_per_s']:.1f}",
            f"{floor['share']:.0%}",
        )
        rows.append((label_of(cell), str(cell["workload"]), *shown, spent))
    head = ("server", "workload", "tokens/s", "floor", "of the floor's speed", "a step")
    return Table("How far from the floor", head, tuple(rows)) if rows else None
