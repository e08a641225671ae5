"""The compiled selection chooses what the plain one chooses, over a table of rows and of what may be asked of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from base.ops.native_library import has_native_library
from engine import native_selection
from engine.exponential import LOWEST, relative_exp
from engine.native_selection import MAX_VOCABULARY, NativeSelection, selection_on
from engine.randomness import RandomStream
from engine.ranking import NO_TOKEN
from engine.sampler import Sampler, SamplerState
from engine.sampling import SamplingParams
from engine.selection import select_tokens

needs_kernels = pytest.mark.skipif(not has_native_library(), reason="the compiled kernels are not here")
QWEN = 151_936
WIDTHS = (1, 2, 7, 8, 15, 16, 17, 40, 257, 5003)
GREEDY = SamplingParams(1, temperature=0.0)
RANDOM = SamplingParams(1)
INF, NAN = math.inf, math.nan
ASKED = [
    GREEDY,
    replace(RANDOM, temperature=1e-5),
    *(
        replace(RANDOM, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
        for temperature, min_p, (top_k, top_p) in product(
            (0.05, 0.7, 1.0, 1.7, 100.0),
            (0.0, 0.02, 1.0),
            ((0, 1.0), (0, 0.9), (0, 1e-9), (0, 1 - 2**-40), (1, 1.0), (40, 1.0), (300, 0.5), (6000, 0.9)),
        )
    ),
]


def rows_of(width: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(8, width, generator=generator)
    peaked = normal[0] * 3
    peaked[width // 3] = 17.0
    some_open = torch.full((width,), -INF).index_copy_(0, torch.tensor([width // 2]), normal[1, :1])
    return {
        "flat": normal[0],
        "wide": normal[1] * 8,
        "flatter": normal[2] / 30,
        "peaked": peaked,
        "as bfloat16": normal[3].bfloat16().float(),
        "many ties": (normal[4] * 2).round(),
        "all equal": torch.full((width,), 0.25),
        "both zeros": torch.where(normal[5] > 0, 0.0, -0.0),
        "far from zero": normal[6] + 1e6,
        "far apart": normal[7] * 1e30,
        "denormal": normal[2] * 1e-42,
        "falling": torch.arange(width) * -0.01,
        "rising": torch.arange(width) * 0.003,
        "the largest there is": torch.full((width,), torch.finfo(torch.float32).max),
        "half minus infinity": torch.where(torch.arange(width) < width // 2, -INF, normal[5]),
        "minus infinity but one": some_open,
    }


def random_numbers(num: int) -> list[float]:
    stream = RandomStream.from_seed(num)
    return [*(stream.uniform(i) for i in range(num - 2)), 0.0, 1 - 2**-53][:num]


def assert_same(rows: Tensor, params: list[SamplingParams], uniforms: list[float]) -> Tensor:
    found = NativeSelection()(rows, params, uniforms)
    assert torch.equal(found, select_tokens(rows, params, uniforms))
    return found


@needs_kernels
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", WIDTHS)
def test_the_choice_is_the_plain_ones(width: int) -> None:
    """Every kind of row, asked for everything; each time other random numbers, and 0 and the largest below 1."""
    for place, row in enumerate(rows_of(width, width).values()):
        uniforms = random_numbers(len(ASKED) + place)[place:]
        found = assert_same(row.expand(len(ASKED), -1), ASKED, uniforms)
        assert bool((found != NO_TOKEN).all())


@needs_kernels
@pytest.mark.parametrize("kind", ["flat", "wide", "flatter", "peaked", "as bfloat16", "many ties"])
def test_thousands_of_draws_are_the_plain_ones(kind: str) -> None:
    row, num = rows_of(1009, 5)[kind], 2000
    seen: set[int] = set()
    for params in (RANDOM, replace(RANDOM, top_p=0.9), replace(RANDOM, top_k=50, temperature=1.3)):
        seen |= set(assert_same(row.expand(num, -1), [params] * num, random_numbers(num)).tolist())
    assert len(seen) > 3


@needs_kernels
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 16])
def test_a_whole_vocabulary(num_rows: int) -> None:
    kinds = list(rows_of(QWEN, 3).values())
    rows = torch.stack([kinds[i % len(kinds)] for i in range(num_rows)])
    assert_same(rows, [ASKED[(7 * i + 1) % len(ASKED)] for i in range(num_rows)], random_numbers(num_rows))


@needs_kernels
@pytest.mark.parametrize(
    "params", [GREEDY, RANDOM, replace(RANDOM, top_p=0.9), replace(RANDOM, top_k=3)], ids=str
)
@pytest.mark.parametrize("width", [1, 7, 17, 300])
def test_a_row_that_is_not_sound_has_no_token_and_its_neighbours_have_theirs(
    width: int, params: SamplingParams
) -> None:
    clean = torch.stack(list(rows_of(width, 1).values()))
    rows, spoilt = clean.clone(), (1, 4, 5)
    for i, value in zip(spoilt, (NAN, INF, -NAN), strict=True):
        rows[i, -1] = value
    rows[7] = -INF
    uniforms = random_numbers(len(rows))
    found = assert_same(rows, [params] * len(rows), uniforms)
    assert bool((found[[*spoilt, 7]] == NO_TOKEN).all())
    others = [i for i in range(len(rows)) if i not in (*spoilt, 7)]
    assert torch.equal(found[others], NativeSelection()(clean, [params] * len(rows), uniforms)[others])


@needs_kernels
def test_rows_of_a_wider_matrix_are_read_where_they_lie() -> None:
    wide = torch.stack(list(rows_of(200, 2).values()))
    before = wide.clone()
    for rows in (wide[:, 13:90], wide[::2], wide[:, ::3], wide.t()[:16]):
        asked = ASKED[3 : 3 + len(rows)]
        assert_same(rows, asked, random_numbers(len(rows)))
    assert torch.equal(wide, before)


@needs_kernels
def test_the_comparison_would_notice_another_temperature() -> None:
    rows, uniforms = rows_of(1009, 5)["flat"].expand(50, -1), random_numbers(50)
    ours = NativeSelection()(rows, [replace(RANDOM, temperature=1.1)] * 50, uniforms)
    assert not torch.equal(ours, select_tokens(rows, [RANDOM] * 50, uniforms))


@needs_kernels
def test_a_sampler_with_either_gives_the_same_tokens_also_of_changed_rows() -> None:
    rows = torch.stack(list(rows_of(300, 9).values()))
    changed = replace(RANDOM, seed=4, frequency_penalty=0.5, logit_bias=((4, 2.0),), logprobs=2, top_p=0.8)
    states = [SamplerState(replace(changed, seed=i), (1, 2), (3,), 300) for i in range(len(rows))]
    for state in states:
        state.accept(7)
    rows[3, 9] = NAN
    assert Sampler(300, NativeSelection()).sample(rows, states) == Sampler(300).sample(rows, states)


@needs_kernels
def test_what_the_kernel_does_not_take_is_refused() -> None:
    select = NativeSelection()
    with pytest.raises(ValueError, match="float64"):
        select(torch.zeros(1, 4, dtype=torch.float64), [RANDOM], [0.5])
    with pytest.raises(ValueError, match="takes no"):
        select(torch.zeros(1, 0), [RANDOM], [0.5])
    with pytest.raises(ValueError, match="takes no"):
        select(torch.zeros(1).expand(1, MAX_VOCABULARY), [RANDOM], [0.5])
    with pytest.raises(ValueError, match="2 rows, 1"):
        select(torch.zeros(2, 4), [RANDOM], [0.5])


def test_without_the_kernels_and_on_a_gpu_the_plain_way_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selection_on(torch.device("cuda")) is select_tokens
    assert isinstance(selection_on(torch.device("cpu")), NativeSelection) == has_native_library()
    monkeypatch.setattr(native_selection, "has_native_library", lambda: False)
    assert selection_on(torch.device("cpu")) is select_tokens


# ---- the exponential ---------------------------------------------------------------------------------------------


def test_the_exponential_is_right_to_two_units_in_the_last_place() -> None:
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.uniform(LOWEST, 0, 200_000), -(2.0 ** generator.uniform(-60, 0, 50_000))])
    exact = np.exp(x.astype(np.longdouble))
    assert float((np.abs(relative_exp(x) - exact) / np.spacing(exact.astype(np.float64))).max()) < 2


def test_the_exponential_of_the_ends_and_of_no_number() -> None:
    found = relative_exp(np.array([[0.0, -0.0, LOWEST, LOWEST - 1], [-INF, NAN, -1e300, -5e-324]])).ravel()
    lowest = found[2]
    assert found.tolist() == [1.0, 1.0, lowest, lowest, lowest, lowest, lowest, 1.0]
    assert 0 < lowest * 2**40 < 1  # which as a weight is nothing


def test_a_places_exponential_depends_on_its_own_number_only() -> None:
    x = -np.random.default_rng(1).exponential(4, 40_000)
    whole = relative_exp(x)
    for start, end in ((0, 1), (5, 9), (7, 1024), (16_383, 16_386), (39_999, 40_000)):
        assert np.array_equal(relative_exp(x[start:end]), whole[start:end])
