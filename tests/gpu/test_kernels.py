"""The Triton kernels, compiled, at the shapes of the 3B and the 7B against plain torch, and inside CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from torch.nn import functional

from adapters.ops import triton_ops
from adapters.ops.entries import DeviceTable
from adapters.ops.tiles import LONG_TILE, SHORT_TILE, TileTable
from adapters.ops.torch_ops import Rounding
from adapters.ops.triton_ops import TritonLinear
from adapters.sites import Site
from adapters.slots import SlotBank, page_rank
from base.cuda_attention import Heads, Segments, try_attention
from base.kernel_check import error_of
from base.ops import nf4, nf4_ops
from base.ops.attention_ops import attend_decodes, rotate_and_store
from base.ops.nf4_ahead import DequantiseAhead
from base.rotary import Rotary
from tests.support.lora import make_weights
from tests.support.rotaries import random_turns

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)
MERGED = (3584, (3584, 512, 512))
LINEARS = (MERGED, (18944, (3584,)), (2048, (11008, 11008)), (1280, (3840,)), (3420, (1280,)))
RANKS = (16, 8, 64, 16, 1, 32, 16, 128)
NUM_SLOTS = 64


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device=DEVICE, generator=generator).to(dtype)


def near(found: Tensor, expected: Tensor) -> None:
    """Sums of thousands in fp32 in another order, rounded once."""
    epsilon = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), rtol=epsilon, atol=2e-3)


class Stand:
    def __init__(self, num_in: int, widths: Sequence[int], dtype: torch.dtype) -> None:
        self.names = [f"l{place}" for place in range(len(widths))]
        sites = {
            name: Site(name, num_in, out, "language") for name, out in zip(self.names, widths, strict=True)
        }
        self.bank = SlotBank(sites, NUM_SLOTS, max(RANKS), dtype, DEVICE)
        self.table = DeviceTable([self.bank.shelf(name) for name in self.names], DEVICE)
        self.sites, self.widths = sites, widths
        for slot in range(NUM_SLOTS):
            self.write(slot, slot)
        entries = self.table.entries(self.names)
        rank = page_rank(max(RANKS))
        self.linear = TritonLinear(entries, num_in, tuple(widths), dtype, rank, Rounding.SUM)

    def write(self, slot: int, seed: int) -> None:
        ranks = dict.fromkeys(self.names, RANKS[seed % len(RANKS)])
        self.bank.write(slot, make_weights(seed, ranks, self.sites))
        self.table.refresh()

    def expected(self, y: Tensor, x: Tensor, slots: Sequence[int]) -> Tensor:
        result = y.float()
        for slot in set(slots) - {-1}:
            rows = torch.tensor([row for row, each in enumerate(slots) if each == slot], device=DEVICE)
            begin = 0
            for name, width in zip(self.names, self.widths, strict=True):
                shelf = self.bank.shelf(name)
                pages = shelf.pages[shelf.forms[slot].key]
                delta = x[rows].double() @ pages.a[slot].double().T @ pages.b[slot, :width].double().T
                result[rows, begin : begin + width] += delta.float()
                begin += width
        return result.to(y.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_in", "widths"), LINEARS, ids=str)
def test_lora_equals_the_plain_products(num_in: int, widths: Sequence[int], dtype: torch.dtype) -> None:
    stand = Stand(num_in, widths, dtype)
    routes = {
        "one": ([0], SHORT_TILE),
        "distinct": (list(range(64)), SHORT_TILE),
        "zipf": ([0] * 17 + [1] * 9 + [2] * 5 + [7, -1, 9, -1], SHORT_TILE),
        "prefill": ([2] * 1000 + [7] * 500 + [-1] * 100 + [3], LONG_TILE),
    }
    for slots, tile_rows in routes.values():
        x, y = randn(len(slots), num_in, dtype=dtype), randn(len(slots), sum(widths), dtype=dtype, seed=1)
        table = TileTable(len(slots), NUM_SLOTS, DEVICE, tile_rows)
        table.fill(slots)
        near(triton_ops.add_lora(y.clone(), x, stand.linear, table), stand.expected(y, x, slots))


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def test_a_lora_graph_follows_batches_and_swaps() -> None:
    """Captured with one adapter, replayed with none, many and others."""
    num_in, widths = MERGED
    stand = Stand(num_in, widths, torch.bfloat16)
    table = TileTable(16, NUM_SLOTS, DEVICE)
    table.fill([0] * 16)
    x, y = randn(16, num_in), randn(16, sum(widths), seed=1)
    graph, out = captured(lambda: triton_ops.add_lora(y.clone(), x, stand.linear, table))
    for seed, slots in enumerate(([-1] * 16, list(range(16)), [5] * 9, [63, -1] * 8)):
        stand.write(5, 64 + seed)
        table.fill(slots)
        graph.replay()
        near(out, stand.expected(y, x, [*slots, *[-1] * (16 - len(slots))]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_out", "num_in"), [(2560, 2048), (22016, 2048), (2048, 11008), (4608, 3584), (3584, 18944), (40, 64)]
)
def test_the_fused_product_is_dequantise_and_multiply(num_out: int, num_in: int, dtype: torch.dtype) -> None:
    packed, state = quantize_4bit(
        randn(num_out, num_in, dtype=dtype) / num_in**0.5, compress_statistics=True, quant_type="nf4"
    )
    weight, exact = nf4.lay_out(packed, state), dequantize_4bit(packed, state)
    assert torch.equal(nf4.dequantise(weight, dtype), exact)
    for permutes in (True, False):
        assert torch.equal(nf4_ops.dequantise(weight, dtype, permutes=permutes), exact)
    bias = randn(num_out, dtype=dtype, seed=2)
    for num_rows in (1, 2, 7, 16, 17, 32, 33, 64, 100, 128):
        x = randn(num_rows, num_in, dtype=dtype, seed=num_rows)
        found = nf4_ops.matmul(x, weight, bias)
        near(found, functional.linear(x.double(), exact.double(), bias.double()))
        assert torch.equal(found, nf4_ops.matmul(x, weight, bias, permutes=False))


def test_copies_ahead_are_never_overtaken() -> None:
    weights, exact = [], []
    for seed in range(6):
        packed, state = quantize_4bit(
            randn(3584, 3584, seed=seed), compress_statistics=True, quant_type="nf4"
        )
        weights.append(nf4.lay_out(packed, state))
        exact.append(dequantize_4bit(packed, state))
    ahead, x = DequantiseAhead(weights, torch.bfloat16), randn(2048, 3584)
    expected = [functional.linear(x, weight) for weight in exact]
    for _ in range(20):
        found = [functional.linear(x, ahead.take(weight)) for weight in weights]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 2), (28, 4)])
@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_paged_decodes_equal_attention_over_gathered_keys(
    dtype: torch.dtype, heads: int, kv_heads: int, num_rows: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    lengths = torch.randint(1, 2500, (num_rows,), generator=generator, dtype=torch.int32)
    width = 160
    order = torch.randperm(num_rows * width, generator=generator).to(torch.int32)
    tables = order.view(num_rows, width).to(DEVICE)
    keys = randn(num_rows * width, 16, kv_heads, 128, dtype=dtype)
    values = randn(num_rows * width, 16, kv_heads, 128, dtype=dtype, seed=1)
    query = randn(num_rows, heads, 128, dtype=dtype, seed=2)
    found = attend_decodes(query, keys, values, tables, lengths.to(DEVICE), 128**-0.5)
    for row, length in enumerate(lengths.tolist()):
        key, value = (
            cache[tables[row].long()].flatten(0, 1)[:length].transpose(0, 1).double()
            for cache in (keys, values)
        )
        expected = functional.scaled_dot_product_attention(
            query[row].double()[:, None], key, value, enable_gqa=True
        )
        torch.testing.assert_close(found[row].double(), expected[:, 0], rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 2), (28, 4)])
@pytest.mark.parametrize("num_rows", [1, 33, 2048])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate_and_store_rounds_like_transformers(
    dtype: torch.dtype, num_rows: int, heads: int, kv_heads: int
) -> None:
    """Over slices of one merged output, to the bit, and beside slots that stay as they were."""
    widths = [heads * 128, kv_heads * 128, kv_heads * 128]
    merged = randn(num_rows, sum(widths), dtype=dtype)
    query, key, value = (part.unflatten(1, (-1, 128)) for part in merged.split(widths, 1))
    before = merged.clone()
    cos, sin = random_turns(num_rows, 128, dtype, DEVICE)

    def rotated(rows: Tensor) -> Tensor:
        left, right = rows.chunk(2, -1)
        return rows * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]

    shape = (num_rows // 16 + 2, 16, kv_heads, 128)
    keys, values = (torch.full(shape, 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    slots = torch.randperm(shape[0] * 16, device=DEVICE)[:num_rows]
    slots[::5] = -1
    used = slots >= 0
    rotary = Rotary(cos, sin)
    found = rotate_and_store(query, key, value, rotary.cos, rotary.sin, slots, keys, values)
    assert torch.equal(found, rotated(query)) and torch.equal(found, rotary(query))
    flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
    assert torch.equal(flat_keys[slots[used]], rotated(key)[used])
    assert torch.equal(flat_values[slots[used]], value[used])
    flat_keys[slots[used]], flat_values[slots[used]] = 7.0, 7.0
    assert (keys == 7.0).all() and (values == 7.0).all()
    assert torch.equal(merged, before)


@pytest.mark.parametrize(
    "segments", [((1, 700), (1, 33)), ((1, 40), (19, 19), (5, 300))], ids=["decodes", "mixed"]
)
def test_a_step_rotates_stores_and_attends_as_torchs_does(segments: Segments) -> None:
    """The 7B's heads, through both whole implementations."""
    trial = try_attention(None, (segments,), Heads(28, 4, 128), torch.bfloat16, DEVICE)
    assert [error_of(found, expected) <= 1 for _, found, expected in trial] == [True] * 3
