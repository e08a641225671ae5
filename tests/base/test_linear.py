"""CPU ways of computing a linear: the dequantised one equals bitsandbytes' unpacked one to the bit, float32 its sum."""

from __future__ import annotations

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn

import base.linear
from base.float32_linear import Float32Linear
from base.four_bit import quant_state
from base.linear import (
    DequantisedLinear,
    PackedLinear,
    can_pack,
    dequantised_weight,
    settle_cpu_linears,
    unpack,
)
from base.native_linear import NativeLinear


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


def settled(linear: nn.Module, how: str) -> nn.Module:
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


TOLERANCE = {
    Linear4bit: 0.0, DequantisedLinear: 0.0, Float32Linear: 2**-8, NativeLinear: 2**-8, PackedLinear: 0.02,
}  # fmt: skip
"""Of the largest result: sums in another order are one rounding apart, packed scales 0.3 % each."""


@pytest.mark.parametrize("how", ["unpacked", "packed", "dequantised", "float32", "auto"])
def test_every_way_stays_near_the_unpacked_result_and_gives_the_exact_weight(how: str) -> None:
    linear = four_bit(128, 256, bias=True)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    expected, weight = linear(x), dequantised_weight(linear)
    way = settled(linear, how)
    assert (way(x) - expected).abs().max() <= TOLERANCE[type(way)] * expected.abs().max()
    assert torch.equal(dequantised_weight(way), weight)


@pytest.mark.parametrize("shape", [(128, 256), (448, 64), (64, 108), (1024, 32), (1176, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_rounds_the_exact_product_once(
    shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    plain = nn.Linear(*shape, bias=bias, dtype=dtype)
    kept = settled(plain, "float32")
    assert isinstance(kept, Float32Linear)
    assert not kept.is_quantised
    assert torch.equal(dequantised_weight(kept), plain.weight.float())
    x = torch.randn(2, 5, shape[0], dtype=dtype)
    exact = x.double() @ plain.weight.double().T + (plain.bias.double() if bias else 0)
    result: Tensor = kept(x)
    assert result.dtype == dtype
    step = torch.finfo(dtype).eps * exact.abs() / 2 + 1e-5
    assert bool(((result.double() - exact).abs() <= step).all())


def test_a_linear_kept_in_float32_counts_its_bytes_and_says_what_it_came_from() -> None:
    kept = settled(four_bit(128, 64, bias=True), "float32")
    assert isinstance(kept, Float32Linear)
    assert kept.is_quantised
    assert kept.num_bytes == 4 * (128 * 64 + 64)


@pytest.mark.parametrize(
    ("has_bf16", "limit", "expected"),
    [
        (False, 1 << 20, Float32Linear),
        (False, 4 * (128 * 256 + 128 * 64), Float32Linear),
        (False, 4 * (128 * 256 + 128 * 64) - 1, DequantisedLinear),  # the plain linear counts too
        (True, 1 << 20, DequantisedLinear),
    ],
)
def test_without_the_compiled_kernel_auto_keeps_float32_where_bfloat16_is_imitated_and_it_fits(
    has_bf16: bool, limit: int, expected: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.linear, "has_native_library", lambda: False)
    monkeypatch.setattr(base.linear, "multiplies_bf16", lambda: has_bf16)
    monkeypatch.setattr(base.linear, "FLOAT32_BYTES_LIMIT", limit)
    holder = nn.ModuleDict(
        {"four": four_bit(128, 256, bias=False), "head": nn.Linear(128, 64, dtype=torch.bfloat16)}
    )
    settle_cpu_linears(holder, "auto")
    assert type(holder["four"]) is expected
    assert type(holder["head"]) is (Float32Linear if expected is Float32Linear else nn.Linear)


def test_float32_is_refused_where_torch_lacks_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.linear, "has_float32_product", lambda: False)
    with pytest.raises(ValueError, match="oneDNN"):
        settled(four_bit(128, 64, bias=False), "float32")
    assert isinstance(settled(four_bit(128, 64, bias=False), "auto"), DequantisedLinear)


def test_shapes_that_the_packed_kernel_crashes_on_are_never_packed() -> None:
    assert not can_pack(four_bit(64, 108, bias=False))
    assert not can_pack(four_bit(96, 64, bias=False))


def test_plain_linears_give_their_weight_and_other_modules_are_refused() -> None:
    linear = nn.Linear(8, 4, dtype=torch.bfloat16)
    assert torch.equal(dequantised_weight(linear), linear.weight.float())
    with pytest.raises(TypeError):
        dequantised_weight(nn.LayerNorm(4))


@pytest.mark.parametrize("how", ["dequantised", "float32"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_do_not_depend_on_their_number_to_the_bit(how: str, num_threads: int) -> None:
    """What a request's independence of its neighbours rests on: measured, not guaranteed, by torch's CPU kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for shape in [(128, 256), (448, 64), (896, 512), (1184, 448), (64, 108)]:
            linear = settled(four_bit(*shape, bias=True), how)
            x = torch.randn(280, shape[0], dtype=torch.bfloat16)
            whole: Tensor = linear(x)
            for begin, end in [(0, 1), (3, 5), (7, 40), (0, 16), (5, 22), (100, 164), (9, 280)]:
                assert torch.equal(linear(x[begin:end]), whole[begin:end])
    finally:
        torch.set_num_threads(before)
