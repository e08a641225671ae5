"""A float32 linear gives a row the same bits for every number of rows, by oneDNN's blocks and by MKL's tiles."""

from __future__ import annotations

import pytest
import torch

from base import float32_linear
from base.float32_linear import Float32Linear, has_blocked_rows, has_float32_product

pytestmark = pytest.mark.skipif(not has_float32_product(), reason="this torch has no oneDNN")


@pytest.fixture(params=["chosen", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What serves here, and what serves where oneDNN has no blocked kernel."""
    if request.param == "tiles":
        monkeypatch.setattr(float32_linear, "has_blocked_rows", lambda: False)
    return str(request.param)


@pytest.mark.parametrize(("num_in", "num_out"), [(64, 28), (256, 128), (448, 52), (896, 1152), (1184, 36)])
def test_a_row_has_the_same_bits_for_every_number_of_rows(
    num_in: int, num_out: int, way: str, threads: int
) -> None:
    dice = torch.Generator().manual_seed(num_in)
    weight, bias = torch.randn(num_out, num_in, generator=dice), torch.randn(num_out, generator=dice)
    linear = Float32Linear(weight, bias, is_quantised=True)
    x = torch.randn(130, num_in, generator=dice)
    whole = linear(x)
    for num in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100):
        assert torch.equal(linear(x[:num]), whole[:num]), (way, num)
        assert torch.equal(linear(x[130 - num :]), whole[130 - num :]), (way, num)
    assert torch.equal(linear(x.view(2, 65, num_in)), whole.view(2, 65, num_out))
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().T + bias, rtol=1e-4, atol=1e-3)


def test_its_weight_comes_back_as_a_tensor_of_its_own(way: str) -> None:
    weight = torch.randn(48, 64)
    linear = Float32Linear(weight, None, is_quantised=False)
    for start, stop in ((0, None), (16, 32)):
        found = linear.dequantised_weight(start, stop)
        assert torch.equal(found, weight[start:stop]), way
        found.zero_()
    assert torch.equal(linear.dequantised_weight(), weight)


def test_the_way_is_what_was_tried() -> None:
    assert Float32Linear(torch.randn(16, 64), None, is_quantised=False)._is_blocked == has_blocked_rows()
