"""What weighted adapters mean together, and their weights as one adapter's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.composition import (
    MAX_PARTS,
    CompositionRejected,
    Ingredient,
    check_composition,
    compose,
)
from adapters.concatenation import ComposingReader, concatenate
from adapters.errors import AdapterRejected, RejectReason
from adapters.ref import BASE, COMPOSED, AdapterRef, WeightedRef
from adapters.sites import Part, Site
from adapters.slots import SlotBank
from adapters.weights import AdapterWeights
from tests.support.fake_registry import FakeReport
from tests.support.lora import CPU, Bench, make_ref, make_weights

A, B, C = make_ref("a"), make_ref("b"), make_ref("c", 3)
SITES = {name: Site(name, 24, 40, "language") for name in ("p", "q", "r")}


# ---- meaning


def test_the_name_tells_versions_and_weights_in_the_order_of_names() -> None:
    ref = compose([(C, -0.25), (A, 2.0), (B, 0.1)])
    assert str(ref) == "a@1*2+b@1*0.1+c@3*-0.25"
    assert ref == compose([(A, 2.0), (B, 0.1), (C, -0.25)])
    assert ref.versions == (A, B, C)
    assert (ref.name, ref.is_composed, ref.is_base) == (COMPOSED, True, False)


weights = st.lists(st.tuples(st.sampled_from([A, B, C, BASE]), st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])))


@given(weights)
def test_it_means_the_sums_whatever_the_order_and_the_zeros(weighted: list[tuple[AdapterRef, float]]) -> None:
    sums = {ref: math.fsum(w for other, w in weighted if other == ref) for ref in (A, B, C)}
    acting = {ref: weight for ref, weight in sums.items() if weight}
    ref = compose(weighted)
    assert ref == compose(reversed(weighted)) == compose([*weighted, (A, 0.0), (BASE, 1.0)])
    if not acting:
        assert ref == BASE
    elif list(acting.values()) == [1.0]:
        assert ref == next(iter(acting))
    else:
        assert {part.ref: part.weight for part in ref.parts} == acting


@given(weights, weights)
def test_two_compositions_share_a_digest_only_if_they_are_the_same(
    first: list[tuple[AdapterRef, float]], second: list[tuple[AdapterRef, float]]
) -> None:
    one, other = compose(first), compose(second)
    assert (one.digest == other.digest) == (one == other)


def test_parts_that_a_side_lacks_do_not_count_there() -> None:
    words = AdapterRef("words", 1, "w", language_digest="wl")
    eyes = AdapterRef("eyes", 1, "e", vision_digest="ev")
    both = compose([(words, 0.5), (eyes, 1.0)])
    assert both.vision_digest == "ev"
    assert both.language_digest not in ("", "wl")
    assert compose([(words, 0.5), (A, 1.0)]).vision_digest == ""
    assert compose([(words, 0.5)]).language_digest == both.language_digest


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_are_finite(weight: float) -> None:
    with pytest.raises(CompositionRejected, match=r"weight of a@1"):
        compose([(A, weight)])


def test_parts_are_few() -> None:
    refs = [make_ref(f"x{i}") for i in range(MAX_PARTS + 1)]
    assert len(compose((ref, 0.5) for ref in refs[:MAX_PARTS]).parts) == MAX_PARTS
    with pytest.raises(CompositionRejected, match="9 adapters"):
        compose((ref, 0.5) for ref in refs)
    assert compose((ref, float(ref is refs[0])) for ref in refs) == refs[0]


def ingredient(
    rank: int, *targets: str, parts: tuple[Part, ...] = ("language",), kind: str = "lora"
) -> Ingredient:
    report = FakeReport(kind=kind, rank=rank, targets=targets, parts=parts)  # type: ignore[arg-type]
    return Ingredient(WeightedRef(A, 1.0), report)


@pytest.mark.parametrize(
    "ingredients",
    [
        [ingredient(64, "q"), ingredient(64, "q")],
        [ingredient(64, "q"), ingredient(64, "v"), ingredient(64, "q", "o")],
        [ingredient(64, "gate"), ingredient(64, "gate"), ingredient(64, "gate", parts=("vision", "merger"))],
    ],
)
def test_ranks_count_where_the_linears_are_the_same(ingredients: list[Ingredient]) -> None:
    check_composition(ingredients, max_rank=64)
    with pytest.raises(CompositionRejected, match="this server allows 126 "):
        check_composition(ingredients, max_rank=63)


def test_dora_is_refused_by_name() -> None:
    with pytest.raises(CompositionRejected, match="a@1 uses DoRA"):
        check_composition([ingredient(4, "q", kind="dora")], max_rank=64)


# ---- weights


def delta(weights: AdapterWeights, name: str) -> torch.Tensor:
    site = weights.sites.get(name)
    return torch.zeros(40, 24) if site is None else site.b @ site.a


PARTS: Mapping[AdapterRef, AdapterWeights] = {
    A: make_weights(1, {"p": 4, "q": 8}, SITES),
    B: make_weights(2, {"q": 16}, SITES),
    C: make_weights(3, {"q": 3, "r": 5}, SITES),
}


def test_what_it_adds_is_the_weighted_sum_of_what_its_parts_add() -> None:
    composed = ComposingReader(PARTS.__getitem__)(compose([(A, 0.5), (B, -2.0), (C, 3.0)]))
    for name in SITES:
        wanted = 0.5 * delta(PARTS[A], name) - 2 * delta(PARTS[B], name) + 3 * delta(PARTS[C], name)
        torch.testing.assert_close(delta(composed, name), wanted, rtol=1e-5, atol=1e-5)
    assert {name: site.a.shape[0] for name, site in composed.sites.items()} == {"p": 4, "q": 27, "r": 5}
    assert (composed.max_rank, composed.num_parts) == (27, 3)
    assert composed.num_bytes == 4 * (4 + 27 + 5) * (24 + 40)


def test_a_single_version_is_read_as_it_is_and_no_part_is_changed() -> None:
    before = PARTS[A].sites["p"].b.clone()
    assert ComposingReader(PARTS.__getitem__)(A) is PARTS[A]
    concatenate([(PARTS[A], 3.0)], "x")
    assert torch.equal(PARTS[A].sites["p"].b, before)


def test_magnitudes_cannot_be_added_up() -> None:
    dora = make_weights(4, {"p": 4}, SITES, is_dora=True)
    with pytest.raises(AdapterRejected) as caught:
        concatenate([(dora, 1.0), (PARTS[A], 1.0)], "x")
    assert caught.value.reason is RejectReason.UNSUPPORTED_KIND


def test_a_slot_takes_twice_the_rank_for_a_composition_and_for_nothing_else() -> None:
    bank = SlotBank(SITES, 2, 16, torch.float32, CPU)
    wide = make_weights(5, {"q": 16}, SITES)
    assert bank.stage(concatenate([(wide, 1.0), (PARTS[B], 1.0)], "x")).sites["q"].a.shape[0] == 32
    with pytest.raises(AdapterRejected, match="rank 40 at q; this server allows 32"):
        bank.stage(concatenate([(wide, 1.0), (PARTS[B], 1.0), (PARTS[A], 1.0)], "x"))
    with pytest.raises(AdapterRejected, match="rank 17"):
        bank.stage(concatenate([(make_weights(6, {"q": 17}, SITES), 0.5)], "x"))


def test_a_row_beside_its_own_parts_gets_their_weighted_sum() -> None:
    bench = Bench({"q": (24, 40)}, dtype=torch.float32)
    parts = [make_weights(7, {"q": 4}, bench.sites), make_weights(8, {"q": 12}, bench.sites)]
    for slot, weights in enumerate([*parts, concatenate([(parts[0], 0.5), (parts[1], -1.5)], "x")]):
        bench.bank.write(slot, weights)
    x = torch.randn(24).expand(4, 24)
    first, second, both, base = bench.run("q", x, [(1, 0), (1, 1), (1, 2), (1, -1)])
    torch.testing.assert_close(
        both - base, 0.5 * (first - base) - 1.5 * (second - base), rtol=1e-4, atol=1e-4
    )
