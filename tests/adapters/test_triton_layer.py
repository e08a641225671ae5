"""Layers that Triton computes answer as those that batched products compute, step after step and swap after swap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.lora import Bench, make_weights

pytest.importorskip("triton")

WIDTHS = {"l": (128, 64), "m": (128, 96)}


class Twins:
    """The same linears and adapters, computed both ways."""

    def __init__(self) -> None:
        self.ours = Bench(WIDTHS, num_slots=4, max_rank=16, dtype=torch.float32, kernel="triton")
        self.plain = Bench(WIDTHS, num_slots=4, max_rank=16, dtype=torch.float32)

    def write(
        self, slot: int, rank: int, *, names: tuple[str, ...] = ("l", "m"), is_dora: bool = False
    ) -> None:
        for bench in (self.ours, self.plain):
            weights = make_weights(10 * slot + rank, dict.fromkeys(names, rank), bench.sites, is_dora=is_dora)
            bench.bank.write(slot, weights)

    def agree(self, segments: list[tuple[int, int]]) -> Tensor:
        num_rows = sum(count for count, _ in segments)
        x = torch.randn(1, num_rows, 128, generator=torch.Generator().manual_seed(num_rows))
        for name in WIDTHS:
            found = self.ours.run(name, x, segments)
            torch.testing.assert_close(found, self.plain.run(name, x, segments), rtol=1e-5, atol=1e-5)
        return found


def test_layers_by_triton_equal_layers_by_batched_products() -> None:
    twins = Twins()
    twins.write(0, 16)
    twins.write(2, 4, names=("m",))
    twins.write(3, 8, is_dora=True)
    for segments in ([(1, 0)], [(3, 3), (1, -1), (18, 0)], [(2, 2), (1, 3)], [(4, -1)], [(1, 0)]):
        twins.agree(segments)


def test_swaps_and_changed_batches_of_one_size_are_followed() -> None:
    twins = Twins()
    twins.write(0, 16)
    twins.write(1, 4)
    first = twins.agree([(1, 0), (1, 1)])
    twins.write(0, 8)
    second = twins.agree([(1, 0), (1, 1)])
    assert not torch.allclose(first[0, 0], second[0, 0])
    assert torch.equal(first[0, 1], second[0, 1])
    third = twins.agree([(1, 1), (1, 0)])
    assert not torch.allclose(third, second)


def test_rows_of_an_empty_slot_and_other_numbers_of_rows_are_refused() -> None:
    twins = Twins()
    twins.write(0, 4)
    with pytest.raises(ValueError, match="slot 1, which holds no adapter"):
        twins.ours.run("l", torch.zeros(1, 128), [(1, 1)])
    with pytest.raises(ValueError, match="l got 2 rows, and routing for 1"):
        twins.ours.run("l", torch.zeros(2, 128), [(1, 0)])


def test_a_site_that_nobody_touches_keeps_the_bases_bits() -> None:
    twins = Twins()
    twins.write(0, 4, names=("m",))
    x = torch.randn(2, 128)
    assert torch.equal(twins.ours.run("l", x, [(2, 0)]), twins.ours.base("l", x))


def test_a_replays_preparation_refills_the_same_tables() -> None:
    twins = Twins()
    twins.write(0, 4)
    twins.write(1, 8)
    assert twins.ours.triton is not None and twins.plain.triton is None
    routing = twins.ours.routing.language
    routing.fill([(5, 0)])
    table = twins.ours.triton.prepare(routing)
    before = table.tiles.clone()
    routing.fill([(2, 1), (3, 0)])
    assert twins.ours.triton.prepare(routing) is table
    assert not torch.equal(table.tiles, before)
