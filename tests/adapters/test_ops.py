"""The batched products equal the plain loop, and give a row the same bits whatever else is in the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from adapters.layer import MultiLoraLinear
from adapters.ops.reference import lora_rows
from adapters.ops.site_group import torch_adder
from adapters.ops.torch_ops import Rounding
from adapters.staging import StagedSite
from base.ops.native_library import has_native_library
from tests.support.lora import Bench, make_weights, row_slots

RANKS = (1, 4, 8, 16, 64)
Segments = Sequence[tuple[int, int]]
Kernel = Literal["torch", "native"]

SEGMENTS: dict[str, Segments] = {
    "one token": [(1, 0)],
    "one base token": [(1, -1)],
    "all one adapter": [(37, 3)],
    "sixteen decodes over sixteen": [(1, slot) for slot in range(16)],
    "decodes over few": [(1, slot) for slot in (3, 0, 0, 3, -1, 1, 0)],
    "prefill among decodes": [(1, 2), (300, 0), (1, -1), (5, 4), (1, 2), (130, 1)],
    "one adapter twice": [(5, 6), (2, -1), (9, 6)],
}


@pytest.fixture(params=["torch", "native"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Who computes: both are held to the same."""
    if request.param == "native" and not has_native_library():
        pytest.skip("the compiled kernels are not here")
    name: Kernel = request.param
    return name


def loaded(
    kernel: Kernel,
    num_out: int,
    ranks: Sequence[int],
    dora: Sequence[int] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Bench, dict[int, StagedSite]]:
    """A 256-wide linear with one adapter a slot, and the same weights for the reference."""
    bench = Bench({"l": (256, num_out)}, dtype=dtype, kernel=kernel)
    staged = {}
    for slot, rank in enumerate(ranks):
        weights = make_weights(slot, {"l": rank}, bench.sites, is_dora=slot in dora)
        bench.bank.write(slot, weights)
        staged[slot] = bench.bank.stage(weights).sites["l"]
    return bench, staged


def rows(num_rows: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(num_rows, 256, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rounding", list(Rounding))
def test_the_batch_equals_the_plain_loop(
    kernel: Kernel, segments: Segments, dtype: torch.dtype, rounding: Rounding
) -> None:
    bench, staged = loaded(kernel, 384, [RANKS[slot % 5] for slot in range(16)], dora=(1, 4, 6), dtype=dtype)
    layer = bench.module.get_submodule("l")
    assert isinstance(layer, MultiLoraLinear)
    layer._add = torch_adder(replace(layer.group, rounding=rounding))
    x = rows(sum(n for n, _ in segments), dtype=dtype)
    base = bench.base("l", x)
    expected = lora_rows(base, x, row_slots(segments), staged, layer.bias, rounding)
    found = bench.run("l", x, segments)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * epsilon, atol=1e-5)
    if dtype is torch.bfloat16:  # fp32 sums against fp64 ones: hardly ever another bfloat16
        assert (found != expected).float().mean() < 1e-3
    changed = (found != base).any(dim=1).tolist()
    assert changed == [slot != -1 for slot in row_slots(segments)]


def test_a_planted_row_swap_is_seen(kernel: Kernel) -> None:
    bench, staged = loaded(kernel, 384, RANKS)
    x = rows(5)
    segments = [(1, slot) for slot in range(5)]
    swapped = [(1, slot) for slot in (1, 0, 2, 3, 4)]
    expected = lora_rows(bench.base("l", x), x, row_slots(segments), staged, None, Rounding.SUM)
    assert not torch.allclose(
        bench.run("l", x, swapped)[:2].float(), expected[:2].float(), rtol=0.1, atol=0.1
    )


def alone(bench: Bench, name: str, x: Tensor, slot: int) -> Tensor:
    return bench.run(name, x, [(x.shape[0], slot)])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_out", [52, 256, 384, 1540])
def test_a_row_has_the_same_bits_in_every_batch(kernel: Kernel, num_out: int) -> None:
    """Batches of 64 rows, drawn from eight, each of which is computed alone with each slot and on the base."""
    bench, _ = loaded(kernel, num_out, [random.Random(num_out).choice(RANKS) for _ in range(16)], dora=(2, 9))
    x = rows(8, seed=num_out)
    single = {slot: [alone(bench, "l", x[i : i + 1], slot)[0] for i in range(8)] for slot in range(16)}
    single[-1] = [bench.base("l", x[i : i + 1])[0] for i in range(8)]
    dice = random.Random(num_out)
    for _ in range(25):
        segments: list[tuple[int, int]] = []
        while sum(n for n, _ in segments) < 64:
            left = 64 - sum(n for n, _ in segments)
            segments.append((min(left, dice.choice((1, 1, 1, 2, 3, 5, 17, 40))), dice.randrange(-1, 16)))
        drawn = [dice.randrange(8) for _ in range(64)]
        found = bench.run("l", x[drawn], segments)
        expected = [single[slot][i] for slot, i in zip(row_slots(segments), drawn, strict=True)]
        differing = (found != torch.stack(expected)).any(dim=1).nonzero().flatten().tolist()
        assert differing == [], segments


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rank", RANKS)
def test_a_long_prefill_has_the_same_bits_as_its_chunks_and_as_decodes(kernel: Kernel, rank: int) -> None:
    bench, _ = loaded(kernel, 384, [rank, 8, 64])
    x = rows(420)
    whole = alone(bench, "l", x, 0)
    for size in (1, 3, 4, 17, 64, 250, 300):
        starts = list(range(0, 420, size))
        some = {*starts[:4], *starts[::11], *starts[-2:]}  # small chunks are all alike
        for i in sorted(some):
            chunk = bench.run("l", x[i : i + size], [(min(size, 420 - i), 0)])
            assert torch.equal(chunk, whole[i : i + size]), (size, i)
    mixed = bench.run("l", torch.cat([rows(7, 1), x, rows(3, 2)]), [(2, 1), (5, 2), (420, 0), (3, 1)])
    assert torch.equal(mixed[7:427], whole)


@pytest.mark.parametrize("rank", RANKS)
def test_neither_slot_nor_number_of_slots_nor_max_rank_matters(kernel: Kernel, rank: int) -> None:
    x = rows(23)
    results = []
    for num_slots, max_rank, slot in ((1, rank, 0), (8, 16 if rank <= 16 else 64, 5), (40, 128, 39)):
        bench = Bench({"l": (256, 384)}, num_slots=num_slots, max_rank=max_rank, kernel=kernel)
        for other in range(num_slots):
            bench.bank.write(other, make_weights(100 + other, {"l": min(8, rank)}, bench.sites))
        bench.bank.write(slot, make_weights(1, {"l": rank}, bench.sites))
        results.append(alone(bench, "l", x, slot))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_that_are_not_finite_stay_in_their_own_request(kernel: Kernel) -> None:
    bench, _ = loaded(kernel, 384, RANKS, dora=(2,))
    x = rows(12)
    segments = [(2, 0), (1, 1), (3, 2), (1, 0), (5, -1)]
    clean = bench.run("l", x, segments)
    poisoned_x = x.clone()
    poisoned_x[2] = float("nan")
    poisoned = bench.run("l", poisoned_x, segments)
    assert poisoned[2].isnan().all()
    others = [row for row in range(12) if row != 2]
    assert torch.equal(poisoned[others], clean[others])
