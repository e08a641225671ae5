"""The measures: percentiles and figures against values worked out by hand, floors against the published shapes'."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.floors import (
    NF4_BYTES,
    LanguageShape,
    Machine,
    Step,
    Work,
    base_seconds,
    lora_efficiency,
    lora_seconds,
    possible_ratio,
    read_shape,
)
from bench.load import Run
from bench.measure import Slo, by_adapter, failures, measure, paired_ratio, parity, percentile, repeats
from bench.provenance import provenance
from bench.streamed import Streamed, failed
from bench.trace import Call

SHAPE_3B = LanguageShape(2048, 36, 16, 2, 128, 11008, 151936)
SHAPE_7B = LanguageShape(3584, 28, 28, 4, 128, 18944, 152064)
H100 = Machine(3.0e12, 7.98e14, 7.98e14)


def streamed(index: int, sent_s: float, times: tuple[float, ...], adapter: str | None = "a") -> Streamed:
    return Streamed(index, adapter, sent_s, times, times[-1] + 0.01, 10, 4, len(times), f"text {index}")


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0], 0.99, 3.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.5),
        ([10.0, 20.0, 30.0, 40.0, 50.0], 0.95, 48.0),  # place 3.8
        (list(map(float, range(101))), 0.99, 99.0),
        ([5.0, 7.0], 0.0, 5.0),
        ([5.0, 7.0], 1.0, 7.0),
    ],
)
def test_percentiles_are_those_worked_out_by_hand(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_a_percentile_of_nothing_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError):
        percentile(values, share)


def test_a_run_s_figures_are_those_worked_out_by_hand() -> None:
    call = Call(2, "x", 3)
    run = Run(
        (
            streamed(0, 0.0, (0.10, 0.15, 0.25)),  # gaps 50, 100
            streamed(1, 1.0, (1.30, 1.40)),  # gap 100
            failed(call, "a", 1.0, 1.1, "503: draining"),
        ),
        seconds=2.0,
    )
    figures = measure(run, Slo(first_token_ms=200, per_token_ms=90))
    assert figures["num_calls"] == 3 and figures["num_failed"] == 1
    assert figures["output_tokens_per_s"] == pytest.approx(2.5)
    assert figures["first_token_ms_p50"] == pytest.approx(200)
    assert figures["between_tokens_ms_p50"] == pytest.approx(100)
    assert figures["per_token_ms_p50"] == pytest.approx(87.5)  # 75 and 100
    assert figures["worst_stall_ms"] == pytest.approx(100)
    assert figures["goodput_share"] == pytest.approx(1 / 3)  # the second is too slow, the third failed
    assert figures["goodput_per_s"] == pytest.approx(0.5)
    assert figures["cached_tokens"] == 8
    assert failures(run) == {"503: draining": 1}


def test_a_call_that_the_client_sent_late_is_measured_from_when_it_was_due() -> None:
    run = Run((replace(streamed(0, 1.0, (1.1,)), due_s=0.7),), 1.0)
    figures = measure(run, Slo())
    assert figures["first_token_ms_p50"] == pytest.approx(400)
    assert figures["sent_late_ms_p50"] == pytest.approx(300)


def test_rare_adapters_are_the_less_asked_half_and_none_where_all_are_asked_alike() -> None:
    often = [streamed(number, 0.0, (0.1,), "often") for number in range(3)]
    rare = streamed(3, 0.0, (0.9,), "rare")
    assert measure(Run((*often, rare), 1.0), Slo())["rare_first_token_ms_p99"] == pytest.approx(900)
    assert "rare_first_token_ms_p99" not in measure(Run((often[0], rare), 1.0), Slo())
    assert by_adapter(Run((*often, rare), 1.0))["often"]["num_calls"] == 3


def test_repeats_give_the_median_and_how_far_apart_they_lie() -> None:
    found = repeats([{"x": 10.0, "only": 1.0}, {"x": 12.0}, {"x": 11.0}])
    assert found.median == {"x": 11.0}
    assert found.spread["x"] == pytest.approx(2 / 11)
    with pytest.raises(ValueError):
        repeats([])


def test_a_ratio_is_taken_of_pairs_and_not_of_medians() -> None:
    assert paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])["median"] == pytest.approx(2.0)
    with pytest.raises(ValueError):
        paired_ratio([1.0], [])


def test_parity_sees_one_differing_answer() -> None:
    ours = Run((streamed(0, 0, (1,)), streamed(1, 0, (1,))), 1.0)
    theirs = Run((ours.streams[0], replace(ours.streams[1], text_sha256="other")), 1.0)
    assert parity(ours, ours).num_equal == 2
    found = parity(ours, theirs)
    assert (found.num_compared, found.num_equal, found.differing) == (2, 1, (1,))


# ---- floors: the values of the published shapes


@pytest.mark.parametrize(
    ("shape", "linears", "nf4", "head", "kv", "lora_all", "lora_attention"),
    [
        (SHAPE_3B, 2.775e9, 1.431e9, 0.622e9, 36_864, 59.9e6, 14.7e6),
        (SHAPE_7B, 6.525e9, 3.366e9, 1.090e9, 57_344, 80.7e6, 20.2e6),
    ],
)
def test_bytes_are_those_of_the_published_shapes(
    shape: LanguageShape,
    linears: float,
    nf4: float,
    head: float,
    kv: int,
    lora_all: float,
    lora_attention: float,
) -> None:
    assert shape.num_linear_weights == pytest.approx(linears, rel=1e-3)
    assert shape.num_linear_weights * Step(1).base_weight_bytes == pytest.approx(nf4, rel=1e-3)
    assert 2 * shape.num_head_weights == pytest.approx(head, rel=1e-3)
    assert shape.kv_bytes_per_token == kv
    assert 2 * shape.num_lora_weights(16) == pytest.approx(lora_all, rel=2e-3)
    assert 2 * shape.num_lora_weights(16, ("q", "k", "v", "o")) == pytest.approx(lora_attention, rel=5e-3)


@pytest.mark.parametrize(
    ("shape", "step", "tokens_per_s"),
    [
        (SHAPE_3B, Step(1, 1), 1407),
        (SHAPE_3B, Step(32, 8), 30_607),
        (SHAPE_3B, Step(64, 64), 27_069),
        (SHAPE_7B, Step(1, 1), 657),
        (SHAPE_7B, Step(32, 8), 15_890),
        (SHAPE_7B, Step(64, 64), 16_692),
    ],
)
def test_decode_floors_are_those_of_one_large_gpu(
    shape: LanguageShape, step: Step, tokens_per_s: float
) -> None:
    seconds = base_seconds(shape, step, H100) + lora_seconds(shape, step, H100)
    assert step.rows / seconds == pytest.approx(tokens_per_s, rel=5e-3)


def test_efficiency_is_one_where_the_possible_ratio_is_reached() -> None:
    work = Work(0, 32_000, Step(32, 8))
    ratio = possible_ratio(SHAPE_3B, work, H100)
    assert 0.8 < ratio < 0.9
    assert lora_efficiency(ratio, SHAPE_3B, work, H100) == pytest.approx(1.0)
    assert possible_ratio(SHAPE_3B, replace(work, step=Step(32)), H100) == 1.0
    slow = Machine(3.0e12, 1e12, 1e12)  # operations decide
    assert base_seconds(SHAPE_3B, work.step, slow) == pytest.approx(
        2 * 32 * (SHAPE_3B.num_linear_weights + SHAPE_3B.num_head_weights) / 1e12
    )


def test_where_a_base_may_be_computed_in_two_ways_the_floor_is_the_faster_one() -> None:
    narrow = Machine(12e9, 10e9, 70e9)
    both = Machine(12e9, 10e9, 70e9, wide_flops_per_s=70e9)
    weights = SHAPE_3B.num_linear_weights + SHAPE_3B.num_head_weights
    few, many = (Step(rows, context=0, base_weight_bytes=2.0) for rows in (1, 16))
    assert base_seconds(SHAPE_3B, few, narrow) == pytest.approx(2 * weights / 10e9)  # operations decide
    by_bytes = NF4_BYTES * SHAPE_3B.num_linear_weights + 2 * SHAPE_3B.num_head_weights
    assert base_seconds(SHAPE_3B, few, both) == pytest.approx(by_bytes / 12e9)  # from 4 bits: its bytes do
    assert base_seconds(SHAPE_3B, many, both) == pytest.approx(2 * 16 * weights / 70e9)
    assert both.most_flops_per_s == 70e9 and narrow.most_flops_per_s == 10e9


def test_long_prompts_leave_adapters_their_share_of_operations_alone() -> None:
    """Rank 16 on all linears of the 3B shape is 1.08 % of its weights: so much does a prompt cost more."""
    ratio = possible_ratio(SHAPE_3B, Work(1e6, 0, Step(1, 1)), H100)
    assert ratio == pytest.approx(1 / (1 + SHAPE_3B.num_lora_weights(16) / SHAPE_3B.num_linear_weights))
    assert 0.98 < ratio < 0.99


def test_a_shape_is_read_from_both_layouts(tmp_path: Path) -> None:
    text = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 100,
    }  # fmt: skip
    for config in (text, {"text_config": text}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_shape(tmp_path) == LanguageShape(64, 2, 4, 2, 16, 96, 100)


def test_a_figure_names_its_commit_device_and_versions() -> None:
    found = provenance().as_json()
    assert found["commit"] and isinstance(found["is_dirty"], bool)
    assert provenance().device.name
    assert "torch" in provenance().versions
