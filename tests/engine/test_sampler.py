"""The sampler against plain loops: what is kept, how it is drawn, and that a row never sees its neighbours."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from engine.errors import NumericalError
from engine.randomness import RandomStream
from engine.ranking import best_of, ranked_ids
from engine.sampler import NumericalFailure, SampledRow, SampledToken, Sampler, SamplerState, score_prompt
from engine.sampling import SamplingParams
from engine.selection import draw, draw_truncated, is_truncated, token_weights

V = 40
EOS = (3, 5)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
RANDOM = SamplingParams(max_tokens=8, seed=11)


def reference_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """The plain loop that defines truth: temperature, min_p, top_k, top_p, ties to the lowest id."""
    largest = max(logits)
    weights = [math.exp((x - largest) / params.temperature) for x in logits]
    weights = [w if w >= params.min_p else 0.0 for w in weights]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    total, up_to = sum(weights[i] for i in order), 0.0
    kept: list[int] = []
    for i in order:
        if kept and up_to >= params.top_p * total:
            break
        kept.append(i)
        up_to += weights[i]
    return [weights[i] / up_to if i in kept else 0.0 for i in range(len(logits))]


def draws(logits: Tensor, params: SamplingParams, num: int) -> Counter[int]:
    stream = RandomStream.from_seed(params.seed)
    uniforms = [stream.uniform(i) for i in range(num)]
    choose = draw_truncated if is_truncated(params, len(logits)) else draw
    return Counter(choose(logits.expand(num, -1), [params] * num, uniforms).tolist())


def sample(
    logits: Tensor, params: list[SamplingParams], prompt: tuple[int, ...] = (1, 2)
) -> list[SampledRow]:
    states = [SamplerState(p, prompt, EOS, logits.shape[-1]) for p in params]
    return Sampler(logits.shape[-1]).sample(logits, states)


def ids(rows: list[SampledRow]) -> list[int]:
    return [row.token_id for row in rows if isinstance(row, SampledToken)]


def some_logits(num_rows: int, seed: int = 0, vocab_size: int = V) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


# ---- what is drawn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        RANDOM,
        replace(RANDOM, temperature=0.5),
        replace(RANDOM, temperature=2.0, top_k=7),
        replace(RANDOM, top_p=0.8),
        replace(RANDOM, min_p=0.1),
        replace(RANDOM, temperature=1.5, top_k=12, top_p=0.7, min_p=0.02),
    ],
    ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = some_logits(1)[0]
    num = 20_000
    expected = reference_probabilities(logits.tolist(), params)
    counts = draws(logits, params, num)
    assert all(expected[token] > 0 for token in counts), "a token was drawn that is left out"
    cells = [(counts[i], num * p) for i, p in enumerate(expected) if num * p >= 5]
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    degrees = max(1, len(cells) - 1)
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees), "further off than one time in ten thousand"


def test_the_distribution_check_would_notice_a_wrong_temperature() -> None:
    logits, num = some_logits(1)[0], 20_000
    expected = reference_probabilities(logits.tolist(), RANDOM)
    counts = draws(logits, replace(RANDOM, temperature=1.1), num)
    cells = [(counts[i], num * p) for i, p in enumerate(expected) if num * p >= 5]
    assert sum((seen - wanted) ** 2 / wanted for seen, wanted in cells) > 200


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=2, max_size=30),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, 35),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_kept_tokens_equal_the_reference(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Every token that may be drawn is, and no other: uniforms a hair inside each kept token's share."""
    params = SamplingParams(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.tensor([values])
    expected = reference_probabilities(values, params)
    near_edge = [p for p in _nucleus_edges(values, params) if abs(p - top_p) < 1e-9]
    if near_edge:
        return  # float64 here and exact integers there may round the edge itself differently
    choose = draw_truncated if is_truncated(params, len(values)) else draw
    uniforms = [(i + 0.5) / 1000 for i in range(1000)]
    counts = Counter(choose(logits.expand(1000, -1), [params] * 1000, uniforms).tolist())
    for token, probability in enumerate(expected):
        assert abs(counts[token] - probability * 1000) <= 1.01 + 1e-6, (token, probability)


def _nucleus_edges(values: list[float], params: SamplingParams) -> list[float]:
    untruncated = reference_probabilities(values, replace(params, top_p=1.0))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return [sum(untruncated[i] for i in order[: n + 1]) for n in range(len(order))]


def test_top_p_reaches_beyond_the_tokens_that_are_sorted_first() -> None:
    logits = some_logits(2, vocab_size=5000) / 30  # nearly flat: 0.9 of the mass needs over 4000 tokens
    params = replace(RANDOM, top_p=0.9)
    uniforms = [0.999999, 0.5]
    chosen = draw_truncated(logits, [params] * 2, uniforms).tolist()
    order = ranked_ids(logits, 5000).tolist()
    assert 4000 < order[0].index(chosen[0]) < 4700
    assert chosen == [int(draw_truncated(logits[i : i + 1], [params], uniforms[i : i + 1])) for i in range(2)]


def test_a_wider_neighbour_changes_no_truncated_row() -> None:
    logits = some_logits(2, vocab_size=5000)
    logits[1] /= 30
    params = [replace(RANDOM, top_k=5), replace(RANDOM, top_p=0.99)]
    both = draw_truncated(logits, params, [0.7, 0.7]).tolist()
    assert both[0] == int(draw_truncated(logits[:1], params[:1], [0.7]))


def test_the_largest_uniform_still_picks_a_kept_token() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -100.0]])
    assert draw(logits, [RANDOM], [1 - 2**-53]).tolist() == [1]
    assert draw(logits, [RANDOM], [0.0]).tolist() == [0]


def test_weights_of_a_large_vocabulary_do_not_overflow() -> None:
    weights = token_weights(torch.zeros(1, 200_000), [RANDOM])
    assert int(weights.sum()) == 200_000 * 2**40


def test_weights_are_the_same_in_every_place_of_a_batch() -> None:
    """A guard on numpy's exp: another build might treat the end of an array differently."""
    values = some_logits(1, 1, 1003)[0]
    expected = token_weights(values[None], [RANDOM])[0]
    for num_rows in (2, 3, 7, 64):
        weights = token_weights(values.expand(num_rows, -1).contiguous(), [RANDOM] * num_rows)
        assert all(torch.equal(row, expected) for row in weights)


def test_ranking_is_by_value_and_then_by_id() -> None:
    logits = torch.tensor([0.0, 7.0, -0.0, -torch.inf, 7.0, -3.0, torch.inf])
    assert ranked_ids(logits, 7).tolist() == [6, 1, 4, 0, 2, 5, 3]


# ---- greedy ------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(3, V)
    logits[1, [7, 9]] = 2.0
    logits[2, 39] = 1.0
    assert ids(sample(logits, [GREEDY] * 3)) == [0, 7, 39]


@pytest.mark.parametrize("params", [replace(RANDOM, temperature=1e-6), replace(RANDOM, top_k=1)])
def test_a_tiny_temperature_and_top_k_of_one_are_greedy(params: SamplingParams) -> None:
    logits = torch.zeros(1, V)
    logits[0, [7, 9]] = 2.0
    assert ids(sample(logits, [params])) == [7]


def test_a_small_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0, 2.9e38]])
    params = SamplingParams(1, temperature=2e-5, seed=1)
    rows = Sampler(4).sample(logits, [SamplerState(params, (), (), 4)])
    assert ids(rows) == [0]


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    logits = some_logits(1)
    assert sample(logits, [replace(RANDOM, top_k=10_000)]) == sample(logits, [RANDOM])


# ---- independence ------------------------------------------------------------------------------------------------

MIXED = [
    GREEDY,
    RANDOM,
    replace(RANDOM, top_p=0.9, seed=3),
    replace(RANDOM, top_k=4, min_p=0.05, seed=-5),
    replace(GREEDY, repetition_penalty=1.3),
    replace(RANDOM, presence_penalty=0.5, frequency_penalty=0.2, logit_bias=((4, 3.5),), seed=2**70),
    replace(RANDOM, logprobs=3),
    replace(GREEDY, min_tokens=4, logprobs=0),
]


def generate(
    params: SamplingParams, logits: Tensor, neighbours: list[SamplingParams], place: int
) -> list[SampledRow]:
    """Eight steps of one request, alone or at ``place`` among neighbours with logits of their own."""
    all_params = [*neighbours[:place], params, *neighbours[place:]]
    states = [SamplerState(p, (1, 2, 3), EOS, logits.shape[-1]) for p in all_params]
    noise = some_logits(8 * len(states), 99, logits.shape[-1]).view(8, len(states), -1)
    rows = []
    for step in range(8):
        batch = noise[step].clone()
        batch[place] = logits[step]
        sampled = Sampler(logits.shape[-1]).sample(batch, states)
        for state, row in zip(states, sampled, strict=True):
            assert isinstance(row, SampledToken)
            state.accept(row.token_id)
        rows.append(sampled[place])
    return rows


@pytest.mark.parametrize("vocab_size", [V, 1003])
@pytest.mark.parametrize("params", MIXED)
def test_a_row_does_not_depend_on_its_neighbours_to_the_bit(params: SamplingParams, vocab_size: int) -> None:
    logits = some_logits(8, 5, vocab_size)
    alone = generate(params, logits, [], 0)
    for place in (0, 3, len(MIXED)):
        assert generate(params, logits, MIXED, place) == alone


def test_the_independence_check_would_notice_a_swapped_row() -> None:
    logits = some_logits(8, 5)
    assert generate(RANDOM, logits.flip(0), MIXED, 3) != generate(RANDOM, logits, [], 0)


def test_without_a_seed_requests_differ_and_with_one_they_agree() -> None:
    logits = torch.zeros(64, 1000)
    free = ids(sample(logits, [replace(RANDOM, seed=None)] * 64))
    assert len(set(free)) > 32
    assert len(set(ids(sample(logits, [RANDOM] * 64)))) == 1
    assert len(set(ids(sample(logits, [replace(RANDOM, seed=i) for i in range(64)])))) > 32


def test_sampling_again_without_accepting_gives_the_same_token() -> None:
    state = SamplerState(replace(RANDOM, seed=None), (1,), EOS, V)
    logits = torch.zeros(1, V)
    first = Sampler(V).sample(logits, [state])
    assert Sampler(V).sample(logits, [state]) == first
    seen = set()
    for _ in range(20):
        state.accept(0)
        seen |= set(ids(Sampler(V).sample(logits, [state])))
    assert len(seen) > 5


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    stream = RandomStream.from_seed(0)
    values = torch.tensor([stream.uniform(i) for i in range(20_000)], dtype=torch.float64)
    assert abs(float(values.mean()) - 0.5) < 0.01
    assert abs(float(values.var()) - 1 / 12) < 0.002
    assert abs(float(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1])) < 0.03
    assert 0.0 <= float(values.min()) < float(values.max()) < 1.0


def test_the_callers_logits_are_not_changed() -> None:
    logits = some_logits(len(MIXED))
    before = logits.clone()
    sample(logits, MIXED)
    assert torch.equal(logits, before)


# ---- shaping -----------------------------------------------------------------------------------------------------


def shaped(params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...], row: Tensor) -> Tensor:
    state = SamplerState(params, prompt, EOS, V)
    for token in output:
        state.accept(token)
    row = row.clone()
    state.shape(row)
    return row


@pytest.mark.parametrize("penalty", [0.5, 1.2, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    row, prompt, output = some_logits(1)[0], (1, 2, 2, 39), (7, 1, 7, *range(20, 30))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([[*prompt, *output]]), row[None].clone()
    )[0]
    assert torch.equal(shaped(replace(GREEDY, repetition_penalty=penalty), prompt, output, row), expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    row, prompt, output = some_logits(1)[0], (1, 2, 7), (7, 7, 9)
    result = shaped(replace(GREEDY, presence_penalty=0.5, frequency_penalty=0.25), prompt, output, row)
    expected = row.clone()
    expected[7] -= 0.5 + 2 * 0.25
    expected[9] -= 0.5 + 0.25
    assert torch.allclose(result, expected, atol=1e-6)
    assert torch.equal(result[[1, 2]], row[[1, 2]])


def test_counts_grow_with_a_long_output() -> None:
    output = tuple(range(V)) * 10
    result = shaped(replace(GREEDY, frequency_penalty=1.0), (0,), output, torch.zeros(V))
    assert torch.equal(result, torch.full((V,), -10.0))


def test_logit_bias_is_added() -> None:
    row = some_logits(1)[0]
    result = shaped(replace(GREEDY, logit_bias=((4, 100.0), (6, -100.0))), (), (), row)
    assert result[4] == row[4] + 100
    assert result[6] == row[6] - 100
    banned = replace(GREEDY, logit_bias=((int(row.argmax()), -100.0),))
    forced = replace(GREEDY, logit_bias=((4, 100.0),))
    first, second = ids(sample(torch.stack([row, row]), [banned, forced]))
    assert (first, second) == (int(row.topk(2).indices[1]), 4)


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
def test_ids_outside_the_vocabulary_are_refused(name: str) -> None:
    value = {"logit_bias": ((V, 1.0),), "stop_token_ids": (V,)}[name]
    with pytest.raises(ValueError, match="outside the vocabulary"):
        SamplerState(replace(GREEDY, **{name: value}), (), EOS, V)  # type: ignore[arg-type]


def test_min_tokens_keeps_the_end_away_exactly_so_long() -> None:
    logits = torch.zeros(1, V)
    logits[0, [3, 5, 8]] = torch.tensor([5.0, 6.0, 4.0])
    state = SamplerState(replace(GREEDY, min_tokens=2, stop_token_ids=(8,)), (), EOS, V)
    chosen = []
    for _ in range(3):
        [token] = ids(Sampler(V).sample(logits, [state]))
        chosen.append(token)
        state.accept(token)
    assert chosen == [0, 0, 5]


def test_min_tokens_leaves_the_end_alone_when_it_is_ignored() -> None:
    logits = torch.zeros(1, V)
    logits[0, 3] = 5.0
    assert ids(sample(logits, [replace(GREEDY, min_tokens=2, ignore_eos=True)])) == [3]


# ---- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", MIXED)
@pytest.mark.parametrize("poison", ["one nan", "all nan", "plus inf", "all minus inf"])
def test_a_row_that_is_not_finite_fails_alone(params: SamplingParams, poison: str) -> None:
    logits = some_logits(3)
    match poison:
        case "one nan":
            logits[1, 6] = torch.nan
        case "all nan":
            logits[1] = torch.nan
        case "plus inf":
            logits[1, 6] = torch.inf
        case _:
            logits[1] = -torch.inf
    rows = sample(logits, [params] * 3)
    assert rows[1] == NumericalFailure()
    assert [rows[0], rows[2]] == sample(logits[[0, 2]], [params] * 2)
    assert len(ids(rows)) == 2


def test_some_minus_inf_is_no_failure() -> None:
    logits = torch.full((2, V), -torch.inf)
    logits[:, 4] = -7.0
    assert ids(sample(logits, [GREEDY, replace(RANDOM, top_p=0.5)])) == [4, 4]


def test_no_rows_give_no_tokens() -> None:
    assert Sampler(V).sample([], []) == []


def test_logits_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        Sampler(V + 1).sample(some_logits(1), [SamplerState(GREEDY, (), (), V + 1)])


# ---- logprobs ----------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = some_logits(1)
    params = replace(
        RANDOM, temperature=0.3, top_k=2, logprobs=5, logit_bias=((30, 100.0),), repetition_penalty=2.0
    )
    [row] = sample(logits, [params])
    assert isinstance(row, SampledToken)
    assert row.logprob is not None
    expected = torch.log_softmax(logits[0], -1)
    assert row.logprob.token_id == row.token_id == 30
    assert row.logprob.logprob == float(expected[30])
    assert [token for token, _ in row.logprob.top] == logits[0].topk(5).indices.tolist()
    assert [value for _, value in row.logprob.top] == expected.topk(5).values.tolist()


def test_logprobs_are_given_only_to_those_who_ask_and_as_many() -> None:
    rows = sample(some_logits(3), [GREEDY, replace(GREEDY, logprobs=0), replace(GREEDY, logprobs=V + 9)])
    tops = [row.logprob and len(row.logprob.top) for row in rows if isinstance(row, SampledToken)]
    assert tops == [None, 0, V]


def test_a_probability_of_nothing_has_a_finite_logprob() -> None:
    logits = torch.full((1, V), -torch.inf)
    logits[0, 4] = 0.0
    [row] = sample(logits, [replace(GREEDY, logprobs=2)])
    assert isinstance(row, SampledToken)
    assert row.logprob is not None
    assert row.logprob.top == ((4, 0.0), (0, -9999.0))


def test_prompt_logprobs_equal_log_softmax_whatever_the_chunks() -> None:
    logits, targets = some_logits(9), [i * 4 for i in range(9)]
    whole = score_prompt(logits, targets, 2)
    expected = torch.log_softmax(logits, -1)
    assert [score.logprob for score in whole] == [float(expected[i, t]) for i, t in enumerate(targets)]
    assert whole == [*score_prompt(logits[:4], targets[:4], 2), *score_prompt(logits[4:], targets[4:], 2)]
    assert score_prompt(logits[:0], [], 2) == []


def test_prompt_logprobs_of_nan_raise() -> None:
    logits = some_logits(2)
    logits[1, 0] = torch.nan
    with pytest.raises(NumericalError):
        score_prompt(logits, [1, 2], 0)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]),
        torch.tensor([[0.0, -0.0], [-0.0, 0.0]]),
        torch.tensor([[1.0, torch.nan, torch.inf, torch.nan], [2.0, 1.0, 2.0, 0.0]]),
        torch.full((3, 5), -torch.inf),
        some_logits(4, 3, 1),
        some_logits(7, 1, 4099),
        (some_logits(5, 2, 300) / 3).round(),
    ],
    ids=["ties", "zeros", "nan", "nothing", "one-token", "wide", "many-ties"],
)
def test_the_best_of_a_row_is_what_torch_says(rows: Tensor) -> None:
    values, found = best_of(rows)
    expected, expected_ids = rows.max(-1)
    assert torch.equal(found, expected_ids)
    assert torch.equal(
        values.view(torch.int32), rows.gather(-1, expected_ids[:, None])[:, 0].view(torch.int32)
    )
    assert torch.equal(values, expected) or bool(rows.isnan().any())


def test_logits_are_left_as_they_were_whether_a_list_or_one_tensor() -> None:
    logits = some_logits(len(MIXED), 4)
    before = logits.clone()
    states = [SamplerState(p, (1, 2), EOS, V) for p in MIXED]
    assert Sampler(V).sample(logits, states) == Sampler(V).sample(list(logits), states)
    assert torch.equal(logits, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_waits_for_the_device_once() -> None:
    params = [GREEDY, RANDOM, replace(RANDOM, top_k=4), replace(GREEDY, frequency_penalty=0.5)]
    params += [replace(GREEDY, logit_bias=((4, 2.0),)), replace(GREEDY, min_tokens=2)]
    logits = some_logits(len(params)).cuda()
    sample(logits, params)  # what is built on first use
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            sample(logits, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 1, [str(wait.message) for wait in waits]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_chooses_what_the_cpu_chooses() -> None:
    logits = some_logits(len(MIXED), 5, 1003)
    assert ids(sample(logits.cuda(), MIXED)) == ids(sample(logits, MIXED))
