"""Workloads: the draws have the statistics that they claim, and a name gives the same calls for ever."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from itertools import pairwise

import pytest

from bench.draws import Lengths, gamma_arrivals, power_choices, zipf_choices
from bench.pictures import png_bytes
from bench.workloads import CATALOGUE, make_trace, workload_named


@pytest.mark.parametrize("cv", [1.0, 2.0, 4.0, 8.0])
def test_gaps_between_arrivals_have_the_rate_and_the_cv(cv: float) -> None:
    times = gamma_arrivals(5.0, cv, 60_000, random.Random(7))
    gaps = [later - earlier for earlier, later in pairwise((0.0, *times))]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 5.0, rel=0.02 * cv + 0.01)
    assert statistics.pstdev(gaps) / mean == pytest.approx(cv, rel=0.1)
    assert min(gaps) >= 0


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_adapters_are_drawn_by_zipf(exponent: float) -> None:
    drawn = Counter(zipf_choices(64, exponent, 100_000, random.Random(1)))
    assert drawn[0] / drawn[7] == pytest.approx(8**exponent, rel=0.15)
    assert set(drawn) <= set(range(64))


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
def test_s_lora_s_adapters_follow_its_power_distribution(alpha: float) -> None:
    drawn = power_choices(200, alpha, 50_000, random.Random(2))
    below_half = sum(number < 100 for number in drawn) / len(drawn)
    assert below_half == pytest.approx(0.5**alpha, abs=0.01)  # P(U^(1/a) < x) = x^a
    assert max(drawn) <= 199


def test_uniform_lengths_reach_both_ends_and_lognormal_ones_have_a_tail() -> None:
    even = Lengths(8, 128).draw(20_000, random.Random(3))
    assert (min(even), max(even)) == (8, 128)
    assert statistics.fmean(even) == pytest.approx(68, rel=0.02)
    tailed = Lengths(8, 128, "lognormal").draw(20_000, random.Random(3))
    assert (min(tailed), max(tailed)) == (8, 128)
    assert statistics.median(tailed) == pytest.approx(32, rel=0.03)
    assert statistics.fmean(tailed) > statistics.median(tailed)


DIGESTS = {
    "closed-8": "1d6ddc21e1216312",
    "open-cv4": "3f4048dbf4591a9d",
    "pictures": "26b12f1342affc52",
    "slora-alpha0.3-cv1": "3f8f9b4c9d810efe",
}


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_a_workload_is_frozen(name: str) -> None:
    """A digest that changes makes every earlier figure another workload's: then give the workload another name."""
    assert make_trace(workload_named(name), "pocket").digest[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_workload_gives_calls_that_its_description_promises(name: str) -> None:
    workload = workload_named(name)
    trace = make_trace(workload, "smoke")
    assert trace.digest == make_trace(workload, "smoke").digest
    assert trace.digest != make_trace(workload, "smoke", seed=1).digest
    assert (trace.num_streams is None) == (workload.cv is not None)
    assert trace.num_adapters <= workload.num_adapters
    assert [call.index for call in trace.calls] == list(range(len(trace.calls)))
    assert list(trace.calls) == sorted(trace.calls, key=lambda call: call.at_s)


def test_half_the_picture_mix_has_a_picture_and_a_third_of_them_was_sent_before() -> None:
    trace = make_trace(workload_named("pictures"), "pocket", num_calls=4000)
    pictures = [call.picture for call in trace.calls if call.picture]
    assert len(pictures) / 4000 == pytest.approx(0.5, abs=0.03)
    assert 1 - len(set(pictures)) / len(pictures) == pytest.approx(0.3, abs=0.03)
    assert len({(picture.width, picture.height) for picture in pictures}) == 3


def test_what_a_fan_out_asks_at_once_is_what_is_asked_apart() -> None:
    at_once = make_trace(workload_named("fan-out"), "pocket").calls
    apart = make_trace(workload_named("fan-out-apart"), "pocket").calls
    assert all(call.fan_out == 8 for call in at_once)
    assert [(call.prompt, call.picture) for call in apart[::8]] == [(c.prompt, c.picture) for c in at_once]
    assert [call.adapter for call in apart[:8]] == list(range(8))


def test_the_same_picture_is_the_same_file() -> None:
    pictures = [call.picture for call in make_trace(workload_named("one-picture"), "pocket").calls]
    assert len(set(pictures)) == 1 and pictures[0] is not None
    assert png_bytes(pictures[0]).startswith(b"\x89PNG")


def test_a_name_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(KeyError, match="closed-8"):
        workload_named("closed-9")
    with pytest.raises(KeyError, match="pocket"):
        make_trace(workload_named("closed-8"), "huge")
