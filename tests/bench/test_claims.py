"""Claims: a median over pairs, held against a target the right way round; and what a report makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.claims import Claim, Proof, not_measured, quotients
from bench.proofs.bed import Bed
from bench.prove import ITEMS, chosen, estimate, prove
from bench.provenance import Device, Provenance, Watch
from bench.report import plot, render
from bench.results import Result, make_result
from bench.serving import ServerDied

HERE = Provenance(
    "0123456789abcdef", False, Device("cpu", "Some CPU", 2, ("avx2",)), {"torch": "2.13"}, 0.1, 0.01
)


@pytest.mark.parametrize(
    ("values", "sense", "target", "is_met"),
    [
        ((0.95, 0.1, 0.99), "at least", 0.95, True),
        ((0.94, 0.1, 0.99), "at least", 0.95, False),
        ((0.4, 9.0, 0.1), "at most", 0.4, True),
        ((0.41, 9.0, 0.1), "at most", 0.4, False),
        ((0.41,), "at most", None, None),
    ],
)
def test_the_median_of_the_pairs_decides(
    values: tuple[float, ...], sense: str, target: float | None, is_met: bool | None
) -> None:
    claim = Claim(1, "some", values, target, "at least" if sense == "at least" else "at most")
    assert claim.is_met is is_met
    assert claim.as_json()["num_pairs"] == len(values)


def test_nothing_measured_is_no_claim_and_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        Claim(1, "some", ())
    assert quotients((2.0, 9.0), (1.0, 3.0)) == (2.0, 3.0)
    with pytest.raises(ValueError, match="argument 2"):
        quotients((1.0,), (1.0, 2.0))


def result() -> Result:
    met = Claim(1, "efficiency", (0.92, 0.93, 0.91), 0.9)
    missed = Claim(6, "worst gap", (3.1, 2.9, 3.5), 2.0, "at most")
    shown = Claim(3, "for the record", (0.7,))
    floor = {"share": 0.31, "tokens_per_s": 200.0}
    cell = {
        "workload": "closed-8",
        "endpoint": {"label": "lorikeet"},
        "median": {"output_tokens_per_s": 62.0},
        "runs": [],
        "floor": floor,
        "step_profile": {"forward_ms": 120.0, "forward_share": 0.97, "sample_ms": 1.5, "sample_share": 0.03},
    }
    cells = Proof((met, missed, shown), (cell,)).as_cells(1, "about")
    return make_result("prove", HERE, [*cells, not_measured(7, "a flood", "the server ended")])


def test_a_report_says_what_is_met_what_is_missed_and_what_could_not_be_measured() -> None:
    text = render([result()], is_markdown=True)
    assert "fewer than 5 pairs" in text
    assert "| 1 | efficiency | at least 0.9 | 0.92 | 0.91 to 0.93 | 3 | yes |" in text
    assert "| 6 | worst gap | at most 2 | 3.1 | 2.9 to 3.5 | 3 | no |" in text
    assert "| 3 | for the record |  | 0.7 | 0.7 to 0.7 | 1 |  |" in text
    assert "| 7 | not measured |  | the server ended |" in text
    assert "| lorikeet | closed-8 | 62.0 | 200.0 | 31% | forward 120 ms, sample 1.5 ms |" in text


def test_claims_and_floors_are_drawn(tmp_path: Path) -> None:
    names = {path.name for path in plot([result()], tmp_path)}
    assert {"bench-claims.svg", "bench-claims.png", "bench-floors.svg", "bench-floors.png"} <= names


def test_items_are_chosen_by_number_and_the_estimate_is_their_sum() -> None:
    assert [item.number for item in chosen(None)] == [1, 2, 3, 4, 5, 6, 7]
    assert [item.number for item in chosen("3, 1,3")] == [3, 1]
    with pytest.raises(ValueError, match="no item '9'"):
        chosen("9")
    whole = sum(item.seconds(5) for item in ITEMS) / 60
    assert f"about {whole:.0f} minutes" in estimate(ITEMS, 5)
    assert ITEMS[0].seconds(10) > ITEMS[0].seconds(5)


def test_an_item_that_fails_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    def dies(_: Bed) -> Proof:
        raise ServerDied("the server ended with status 1")

    def works(_: Bed) -> Proof:
        return Proof((Claim(2, "fine", (1.0,), 1.0),))

    first, second = ITEMS[:2]
    items = [type(first)(1, "one", 0, 0, dies), type(second)(2, "two", 0, 0, works)]
    kept: list[int] = []
    cells = prove(Bed(tmp_path, "tiny", 1, lambda _: None), items, lambda cells: kept.append(len(cells)))
    assert cells[0]["failure"] == "the server ended with status 1"
    assert str(cells[1]["claims"]).startswith("[{'item': 2")
    assert kept == [1, 2]  # what there is after each item


def test_a_run_knows_what_others_took_of_the_processors() -> None:
    watch = Watch()
    sum(number * number for number in range(200_000))
    found = watch.end()
    assert found.others_share is None or 0 <= found.others_share <= 1


def test_others_at_work_make_a_figure_no_claim_and_our_own_load_does_not() -> None:
    device = Device("cpu", "Some CPU", 2)
    assert Provenance("", False, device, {}, 0.0, 0.2).is_contended
    assert not Provenance("", False, device, {}, 8.0, 0.01).is_contended
    assert Provenance("", False, device, {}, 8.0).is_contended
