"""Triton's shrink and expand equal the plain loop, in the interpreter on a CPU and compiled on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapters.ops.entries import DeviceTable
from adapters.ops.reference import lora_rows
from adapters.ops.tiles import TILE_FIELDS, TileTable, max_tiles
from adapters.ops.torch_ops import Rounding
from adapters.sites import Site
from adapters.slots import SlotBank, page_rank
from adapters.staging import StagedSite
from tests.support.lora import make_weights

pytest.importorskip("triton")
from adapters.ops import triton_ops
from adapters.ops.triton_ops import TritonLinear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS = 8
RANKS = (16, 1, 64, 8, 4, 128, 24)
"""By slot; the last slot stays empty."""
DORA = (1, 5)

ROUTES: Mapping[str, Sequence[int]] = {
    "one token": [0],
    "one adapter, over a tile": [0] * 21,
    "all distinct": [3, 0, 6, 1, 5, 2, 4],  # of ranks from 1 to 128
    "Zipf with the base": [0, 2, 0, -1, 0, 1, 0, 2, 0, -1, 3, 0],
    "the base alone": [-1, -1, -1],
}


class Stand:
    """Linears that share an input, a bank with adapters of many ranks, and the same weights for the reference."""

    def __init__(self, num_in: int, widths: Sequence[int], dtype: torch.dtype) -> None:
        self.names = [f"l{place}" for place in range(len(widths))]
        self.sites = {
            name: Site(name, num_in, w, "language") for name, w in zip(self.names, widths, strict=True)
        }
        self.num_in, self.widths, self.dtype = num_in, tuple(widths), dtype
        self.bank = SlotBank(self.sites, NUM_SLOTS, max(RANKS), dtype, DEVICE)
        self.bank.connect(lambda name: torch.eye(self.sites[name].out_features, num_in))
        self.staged: dict[str, dict[int, StagedSite]] = {name: {} for name in self.names}
        for slot, rank in enumerate(RANKS):
            self.write(slot, dict.fromkeys(self.names, rank), is_dora=slot in DORA)
        self.table = DeviceTable([self.bank.shelf(name) for name in self.names], DEVICE)
        self.table.refresh()

    def write(self, slot: int, ranks: Mapping[str, int], *, is_dora: bool = False, seed: int = 0) -> None:
        weights = make_weights(100 * seed + slot, ranks, self.sites, is_dora=is_dora)
        self.bank.write(slot, weights)
        for name in self.names:
            self.staged[name].pop(slot, None)
        for name, site in self.bank.stage(weights).sites.items():
            self.staged[name][slot] = site

    def linear(self, rounding: Rounding = Rounding.DELTA) -> TritonLinear:
        rank = page_rank(max(RANKS))
        return TritonLinear(
            self.table.entries(self.names), self.num_in, self.widths, self.dtype, rank, rounding
        )

    def tiles(self, slots: Sequence[int], tile_rows: int = 16) -> TileTable:
        table = TileTable(len(slots), NUM_SLOTS, DEVICE, tile_rows)
        table.fill(slots)
        return table

    def expected(
        self, y: Tensor, x: Tensor, slots: Sequence[int], bias: Tensor | None, rounding: Rounding
    ) -> Tensor:
        parts = zip(self.names, y.cpu().split(self.widths, 1), strict=True)
        biases = [None] * len(self.names) if bias is None else bias.cpu().split(self.widths)
        made = [
            lora_rows(part, x.cpu(), slots, self.staged[name], each, rounding)
            for (name, part), each in zip(parts, biases, strict=True)
        ]
        return torch.cat(made, 1)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def agree(found: Tensor, expected: Tensor) -> None:
    """To the last bit of the dtype, and hardly ever that: fp32 sums against fp64 ones."""
    epsilon = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found.cpu(), expected, rtol=2 * epsilon, atol=max(2 * epsilon, 1e-5))
    if expected.dtype is not torch.float32:
        assert (found.cpu() != expected).float().mean() < 5e-3


@pytest.fixture(scope="module")
def stands() -> dict[torch.dtype, Stand]:
    return {dtype: Stand(340, (200,), dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}


@pytest.fixture(scope="module")
def merged() -> Stand:
    """Three linears of different widths on one input; slot 0 leaves the middle one alone, slot 6 has mixed ranks."""
    stand = Stand(300, (144, 32, 48), torch.float16)
    stand.write(0, {"l0": 8, "l2": 16})
    stand.write(6, {"l0": 16, "l1": 64, "l2": 1})
    stand.table.refresh()
    return stand


@pytest.mark.parametrize("slots", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_kernels_equal_the_plain_loop(
    stands: dict[torch.dtype, Stand], slots: Sequence[int], rounding: Rounding, dtype: torch.dtype
) -> None:
    stand = stands[dtype]
    x, y = randn(len(slots), 340, dtype=dtype), randn(len(slots), 200, dtype=dtype, seed=1)
    bias = randn(200, dtype=dtype, seed=2)
    expected = stand.expected(y, x, slots, bias, rounding)
    found = triton_ops.add_lora(y.clone(), x, stand.linear(rounding), stand.tiles(slots), bias)
    agree(found, expected)
    changed = (found != y).any(dim=1).tolist()
    assert changed == [slot != -1 for slot in slots]


def test_linears_that_share_an_input_share_a_shrink(merged: Stand) -> None:
    slots = [0, 6, -1, 1, 6, 3, 0]
    x, y = randn(7, 300, dtype=torch.float16), randn(7, 224, dtype=torch.float16, seed=1)
    linear, tiles = merged.linear(), merged.tiles(slots)
    partial = triton_ops.shrink(x, linear, tiles)
    assert partial.shape == (2, 3, 7, 128)
    bias = randn(224, dtype=torch.float16, seed=2)
    found = triton_ops.expand(y.clone(), partial, linear, tiles, bias)
    agree(found, merged.expected(y, x, slots, bias, Rounding.DELTA))
    assert torch.equal(found[0, 144:176], y[0, 144:176])  # the site that slot 0 leaves alone


def test_outputs_without_a_bias_and_inputs_that_are_slices(merged: Stand) -> None:
    slots = [1, 5, 0]
    x = randn(3, 400, dtype=torch.float16)[:, 64:364]
    y = randn(3, 224, dtype=torch.float16, seed=1)
    found = triton_ops.add_lora(y.clone(), x, merged.linear(), merged.tiles(slots))
    agree(found, merged.expected(y, x, slots, None, Rounding.DELTA))


def test_a_planted_row_swap_is_seen(merged: Stand) -> None:
    x, y = randn(2, 300, dtype=torch.float16), randn(2, 224, dtype=torch.float16, seed=1)
    found = triton_ops.add_lora(y.clone(), x, merged.linear(), merged.tiles([3, 0]))
    expected = merged.expected(y, x, [0, 3], None, Rounding.DELTA)
    assert not torch.allclose(found.cpu().float(), expected.float(), rtol=0.1, atol=0.1)


def test_a_row_has_the_same_bits_alone_in_any_batch_and_in_tiles_of_either_size(merged: Stand) -> None:
    x, y = randn(19, 300, dtype=torch.float16), randn(19, 224, dtype=torch.float16, seed=1)
    linear, slots = merged.linear(), [3] * 17 + [0, 4]
    batch = triton_ops.add_lora(y.clone(), x, linear, merged.tiles(slots))
    long = triton_ops.add_lora(y.clone(), x, linear, merged.tiles(slots, 32))
    assert torch.equal(batch, long)
    for row in (0, 16, 17):
        one = slice(row, row + 1)
        alone = triton_ops.add_lora(y[one].clone(), x[one], linear, merged.tiles(slots[one]))
        assert torch.equal(alone[0], batch[row])


def test_one_program_for_all_chunks_sums_in_the_order_of_many(
    merged: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = randn(2, 300, dtype=torch.float16), randn(2, 224, dtype=torch.float16, seed=1)
    linear, tiles = merged.linear(), merged.tiles([3, 0])
    many = triton_ops.add_lora(y.clone(), x, linear, tiles)
    monkeypatch.setattr("adapters.ops.launch.SHORT_ROWS", 0)
    assert triton_ops.shrink(x, linear, tiles).shape[0] == 1
    assert torch.equal(triton_ops.add_lora(y.clone(), x, linear, tiles), many)


def test_memory_that_nobody_wrote_and_rows_that_are_not_finite_reach_no_other_row(merged: Stand) -> None:
    slots = [3, 3, -1, 0, 4]
    x, y = randn(5, 300, dtype=torch.float16), randn(5, 224, dtype=torch.float16, seed=1)
    clean = triton_ops.add_lora(y.clone(), x, merged.linear(), merged.tiles(slots))
    x[1] = float("nan")
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        found = triton_ops.add_lora(y.clone(), x, merged.linear(), merged.tiles(slots))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[1].isnan().all()
    others = [0, 2, 3, 4]
    assert torch.equal(found[others], clean[others])


def test_tables_follow_swaps_and_batches_in_place() -> None:
    stand = Stand(128, (64,), torch.float16)
    linear = stand.linear()
    tiles = TileTable(4, NUM_SLOTS, DEVICE)
    addresses = linear.entries.data_ptr(), tiles.tiles.data_ptr(), tiles.rows.data_ptr()
    x, y = randn(4, 128, dtype=torch.float16), randn(4, 64, dtype=torch.float16, seed=1)

    def agrees(slots: Sequence[int]) -> None:
        tiles.fill(slots)
        found = triton_ops.add_lora(y.clone(), x, linear, tiles)
        agree(found, stand.expected(y, x, [*slots, *[-1] * (4 - len(slots))], None, Rounding.DELTA))

    agrees([0, 1, 0, 2])
    assert not stand.table.refresh()
    stand.write(0, {"l0": 32}, seed=1)  # a rank that nobody had
    stand.write(1, {"l0": 64}, seed=2)  # plain in place of DoRA
    stand.bank.clear(3)
    assert stand.table.refresh()
    agrees([1, 0, -1, 2])
    agrees([2, 0])
    assert addresses == (linear.entries.data_ptr(), tiles.tiles.data_ptr(), tiles.rows.data_ptr())


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=90), st.sampled_from([16, 32]), st.integers(0, 9))
def test_each_row_of_an_adapter_is_in_one_tile_of_its_slot(
    slots: list[int], tile_rows: int, spare: int
) -> None:
    table = TileTable(len(slots) + spare, 6, torch.device("cpu"), tile_rows)
    table.fill([5] * table.num_rows)  # what was there before must not matter
    table.fill(slots)
    found: dict[int, int] = {}
    for slot, first, count, _ in table.tiles.view(-1, TILE_FIELDS).tolist():
        assert 0 <= count <= tile_rows
        rows = table.rows[first : first + count].tolist()
        assert not set(rows) & set(found)
        found |= dict.fromkeys(rows, slot)
    assert found == {row: slot for row, slot in enumerate(slots) if slot != -1}


def test_the_most_tiles_are_reached_and_never_more() -> None:
    for num_rows in range(1, 70):
        for num_slots in (1, 3, 80):
            used = min(num_rows, num_slots)
            counts = [1] * used
            for _ in range((num_rows - used) // 16):  # one row beyond full tiles is a tile more
                counts[0] += 16
            assert sum(-(-count // 16) for count in counts) == max_tiles(num_rows, num_slots, 16)


def test_what_does_not_fit_a_table_is_refused() -> None:
    table = TileTable(2, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="3 rows do not fit a table of 2"):
        table.fill([0, 0, 0])
    with pytest.raises(ValueError, match="slots are -1 to 2"):
        table.fill([3])
    stand = Stand(64, (16, 16), torch.float16)
    with pytest.raises(ValueError, match="not side by side"):
        stand.table.entries(["l1", "l0"])
    with pytest.raises(ValueError, match="rows of"):
        triton_ops.shrink(randn(3, 64, dtype=torch.float16), stand.linear(), TileTable(2, 8, DEVICE))
