"""CPU ways of computing a 4-bit linear: the dequantised one equals bitsandbytes' unpacked one to the bit."""

from __future__ import annotations

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn

from base.linear import (
    DequantisedLinear,
    can_pack,
    dequantised_weight,
    quant_state,
    settle_cpu_linears,
    unpack,
)


def four_bit(
    in_features: int, out_features: int, *, bias: bool, double: bool = True, seed: int = 0
) -> Linear4bit:
    torch.manual_seed(seed)
    plain = nn.Linear(in_features, out_features, bias=bias, dtype=torch.bfloat16)
    linear = Linear4bit(
        in_features,
        out_features,
        bias,
        compute_dtype=torch.bfloat16,
        compress_statistics=double,
        quant_type="nf4",
    )
    linear.weight = Params4bit(
        plain.weight.data, False, compress_statistics=double, quant_type="nf4", module=linear
    )
    linear.bias = plain.bias
    linear = linear.to("cpu")
    linear.support_avx512bf16_for_cpu = False
    linear.eval().requires_grad_(False)
    return linear


def settled(linear: Linear4bit, how: str) -> nn.Module:
    holder = nn.ModuleDict({"linear": linear})
    settle_cpu_linears(holder, how)  # type: ignore[arg-type]
    return holder["linear"]


@pytest.mark.parametrize("shape", [(128, 256), (448, 64), (64, 108), (1024, 32)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_dequantised_equals_unpacked_to_the_bit(shape: tuple[int, int], bias: bool, rows: int) -> None:
    linear = four_bit(*shape, bias=bias)
    x = torch.randn(rows, shape[0], dtype=torch.bfloat16)
    expected: Tensor = linear(x)
    weight = dequantised_weight(linear)
    kept = settled(linear, "dequantised")
    assert isinstance(kept, DequantisedLinear)
    assert kept.is_quantised
    assert (kept.in_features, kept.out_features) == shape
    assert torch.equal(kept(x), expected)
    assert torch.equal(kept(x.unsqueeze(0))[0], expected)
    assert kept(x.float()).dtype == torch.float32
    assert torch.equal(dequantised_weight(kept), weight)


@pytest.mark.parametrize("shape", [(128, 256), (448, 64), (64, 32)])
@pytest.mark.parametrize("double", [True, False])
def test_the_weight_behind_packed_codes_is_recovered_exactly(shape: tuple[int, int], double: bool) -> None:
    linear = four_bit(*shape, bias=False, double=double)
    original = linear.weight.data.clone()
    state = quant_state(linear)
    packed, _ = bitsandbytes.functional._convert_weight_packed_for_cpu(linear.weight.data, state)
    assert not torch.equal(packed.reshape(-1), original.reshape(-1))
    assert torch.equal(unpack(packed, shape[1], shape[0]).reshape(-1), original.reshape(-1))


def test_a_linear_packed_behind_our_back_is_refused() -> None:
    linear = four_bit(128, 64, bias=False)
    bitsandbytes.functional._convert_weight_packed_for_cpu(linear.weight.data, quant_state(linear))
    with pytest.raises(ValueError, match="packed"):
        dequantised_weight(linear)


@pytest.mark.parametrize("how", ["unpacked", "packed", "dequantised", "auto"])
def test_every_way_stays_near_the_unpacked_result_and_gives_the_exact_weight(how: str) -> None:
    linear = four_bit(128, 256, bias=True)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    expected, weight = linear(x), dequantised_weight(linear)
    way = settled(linear, how)
    assert (way(x) - expected).abs().max() <= (0.02 if how == "packed" else 0.0) * expected.abs().max()
    assert torch.equal(dequantised_weight(way), weight)


def test_shapes_that_the_packed_kernel_crashes_on_are_never_packed() -> None:
    assert not can_pack(four_bit(64, 108, bias=False))
    assert not can_pack(four_bit(96, 64, bias=False))


def test_plain_linears_give_their_weight_and_other_modules_are_refused() -> None:
    linear = nn.Linear(8, 4, dtype=torch.bfloat16)
    assert torch.equal(dequantised_weight(linear), linear.weight.float())
    with pytest.raises(TypeError):
        dequantised_weight(nn.LayerNorm(4))


def test_rows_do_not_depend_on_their_number_to_the_bit() -> None:
    """What a request's independence of its neighbours rests on: measured, not guaranteed, by torch's CPU kernels."""
    for shape in [(128, 256), (448, 64), (896, 512)]:
        linear = settled(four_bit(*shape, bias=True), "dequantised")
        x = torch.randn(40, shape[0], dtype=torch.bfloat16)
        whole: Tensor = linear(x)
        for begin, end in [(0, 1), (3, 5), (7, 40), (0, 16)]:
            assert torch.equal(linear(x[begin:end]), whole[begin:end])
