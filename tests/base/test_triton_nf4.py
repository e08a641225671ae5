"""The laid-out 4-bit weight is bitsandbytes' to the bit, and the fused product the plain one up to its sums' order."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor

from base.four_bit import quant_state
from base.ops import nf4, nf4_ops
from base.ops.nf4_ahead import DequantiseAhead
from base.ops.nf4_launch import Nf4Launch, nf4_launch
from base.ops.nf4_linear import Nf4Linear, nf4_linear
from base.ops.permute import lookup_assembly, table_assembly

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((144, 192), (40, 320), (128, 64))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantised(
    num_out: int, num_in: int, dtype: torch.dtype, *, nested: bool = True, kind: str = "nf4", seed: int = 0
) -> tuple[Tensor, QuantState]:
    weight = torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed)) / num_in**0.5
    packed, state = quantize_4bit(
        weight.to(DEVICE, dtype), compress_statistics=nested, quant_type=kind, blocksize=64
    )
    return packed, state


def randn(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def agree(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Sums of exact products, rounded once: half a last bit, and what fp32 sums lose."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    epsilon = torch.finfo(found.dtype).eps
    error = (found.double() - exact).abs()
    assert (error <= 0.51 * epsilon * exact.abs() + 1e-5).all(), error.max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("nested", "kind"), [(True, "nf4"), (False, "nf4"), (True, "fp4")])
def test_the_weight_is_bitsandbytes_to_the_bit(
    shape: tuple[int, int], dtype: torch.dtype, nested: bool, kind: str
) -> None:
    packed, state = quantised(*shape, dtype, nested=nested, kind=kind)
    weight = nf4.lay_out(packed, state)
    expected = dequantize_4bit(packed, state)
    assert torch.equal(nf4.dequantise(weight, dtype), expected)
    assert torch.equal(nf4_ops.dequantise(weight, dtype), expected)


@pytest.mark.parametrize("num_rows", [1, 5, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_fused_product_is_the_plain_one(num_rows: int, dtype: torch.dtype, has_bias: bool) -> None:
    packed, state = quantised(144, 320, dtype)
    weight = nf4.lay_out(packed, state)
    x = randn(num_rows, 320, dtype=dtype)
    bias = randn(144, dtype=dtype, seed=2) if has_bias else None
    agree(nf4_ops.matmul(x, weight, bias), x, dequantize_4bit(packed, state), bias)
    if dtype is torch.float32:
        torch.testing.assert_close(nf4_ops.matmul_plain(x, weight, bias), nf4_ops.matmul(x, weight, bias))


@pytest.mark.parametrize(
    "launch", [Nf4Launch(16, 32, 1, 4, 2), Nf4Launch(16, 64, 3, 4, 2), Nf4Launch(32, 128, 5, 4, 2)], ids=str
)
def test_every_launch_gives_the_product(launch: Nf4Launch) -> None:
    packed, state = quantised(72, 320, torch.float16)
    x, bias = randn(3, 320, dtype=torch.float16), randn(72, dtype=torch.float16, seed=2)
    found = nf4_ops.matmul(x, nf4.lay_out(packed, state), bias, launch=launch)
    agree(found, x, dequantize_4bit(packed, state), bias)


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it() -> None:
    packed, state = quantised(72, 320, torch.float16)
    weight, x = nf4.lay_out(packed, state), randn(16, 320, dtype=torch.float16)
    together = nf4_ops.matmul(x, weight)
    for row in (0, 7, 15):
        assert torch.equal(nf4_ops.matmul(x[row : row + 1], weight)[0], together[row])


def test_a_planted_swap_of_the_codes_halves_is_seen() -> None:
    packed, state = quantised(40, 64, torch.float32)
    weight = nf4.lay_out(packed, state)
    weight.codes.copy_((weight.codes << 4) | (weight.codes >> 4))
    x = randn(2, 64, dtype=torch.float32)
    with pytest.raises(AssertionError):
        agree(nf4_ops.matmul(x, weight), x, dequantize_4bit(packed, state), None)


def test_weights_side_by_side_are_the_weights_one_after_the_other() -> None:
    """Rows whose scales begin within a block of 256 scales, and offsets that differ."""
    parts = [quantised(num_out, 192, torch.float16, seed=seed) for seed, num_out in enumerate((100, 28, 40))]
    assert len({float(state.offset) for _, state in parts}) == 3
    weight = nf4.side_by_side([nf4.lay_out(*part) for part in parts])
    expected = torch.cat([dequantize_4bit(*part) for part in parts])
    assert torch.equal(nf4.dequantise(weight, torch.float16), expected)
    x = randn(2, 192, dtype=torch.float16)
    agree(nf4_ops.matmul(x, weight), x, expected, None)
    with pytest.raises(ValueError, match="same kind of 4 bits"):
        nf4.side_by_side([nf4.lay_out(*parts[0]), nf4.lay_out(*quantised(8, 192, torch.float16, kind="fp4"))])


def test_what_cannot_be_laid_out_is_refused() -> None:
    packed, state = quantised(64, 32, torch.float16)  # a block is two rows
    assert not nf4.can_lay_out(state)
    with pytest.raises(ValueError, match="cannot be laid out"):
        nf4.lay_out(packed, state)


def test_bytes_are_those_of_the_floor() -> None:
    packed, state = quantised(512, 2048, torch.bfloat16)
    weight = nf4.lay_out(packed, state)
    assert weight.num_bytes / (512 * 2048) < 0.5159 + 8 / 2048 + 1e-4


def four_bit(num_in: int, num_out: int, *, bias: bool, seed: int = 0) -> Linear4bit:
    torch.manual_seed(seed)
    linear = Linear4bit(num_in, num_out, bias, compute_dtype=torch.float16, quant_type="nf4")
    linear.weight = Params4bit(
        linear.weight.data.half(), False, compress_statistics=True, quant_type="nf4", module=linear
    )
    linear = linear.to(DEVICE).half().requires_grad_(False)
    linear.support_avx512bf16_for_cpu = False
    return linear


@pytest.mark.parametrize("is_fused", [True, False])
def test_the_linear_is_bitsandbytes_linear_for_few_rows_and_many(is_fused: bool) -> None:
    sources = [four_bit(128, 48, bias=True), four_bit(128, 32, bias=True, seed=1)]
    linear = nf4_linear(sources, is_fused=is_fused)
    assert linear.is_quantised and (linear.in_features, linear.out_features) == (128, 80)
    expected = torch.cat([dequantize_4bit(one.weight.data, quant_state(one)) for one in sources])
    assert torch.equal(linear.dequantised_weight(), expected)
    linear.fused_rows = 4
    for shape in ((1, 4, 128), (2, 3, 128)):
        x = randn(*shape, dtype=torch.float16)
        found = linear(x)
        assert found.shape == (*shape[:-1], 80)
        agree(found.flatten(0, 1), x.flatten(0, 1), expected, linear.bias)
        assert linear(x.float()).dtype == torch.float32


def test_a_linear_must_be_quantised_and_biases_all_or_none() -> None:
    with pytest.raises(ValueError, match="must be quantised"):
        nf4_linear([Linear4bit(64, 16)])
    with pytest.raises(ValueError, match="either all"):
        nf4_linear([four_bit(64, 16, bias=True), four_bit(64, 16, bias=False)])


def test_copies_made_ahead_are_the_weights_in_any_order() -> None:
    sources = [quantised(rows, 128, torch.float16, seed=rows) for rows in (32, 64, 48)]
    weights = [nf4.lay_out(*source) for source in sources]
    expected = [dequantize_4bit(*source) for source in sources]
    ahead = DequantiseAhead(weights, torch.float16)
    linears = [Nf4Linear(weight, None, torch.float16, copies=ahead, fused_rows=0) for weight in weights]
    x = randn(9, 128, dtype=torch.float16)
    for place in (0, 1, 2, 0, 2, 2, 1, 0, 1, 2):
        assert torch.equal(ahead.take(weights[place]), expected[place])
        assert torch.equal(linears[place](x), torch.nn.functional.linear(x, expected[place]))
    with pytest.raises(ValueError, match="does not fit"):
        ahead.take(nf4.lay_out(*quantised(80, 128, torch.float16)))


@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 64, 128])
@pytest.mark.parametrize(("num_in", "num_out"), [(2048, 2560), (11008, 2048), (3584, 37888), (64, 32)])
def test_a_launch_covers_the_weight(num_rows: int, num_in: int, num_out: int) -> None:
    launch = nf4_launch(num_rows, num_in, num_out)
    blocks = num_in // 64
    per_part = -(-blocks // launch.parts)
    assert (launch.parts - 1) * per_part < blocks <= launch.parts * per_part
    assert launch.block_m % 16 == 0


# ---- the assembly, run instruction by instruction


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, ``prmt`` in its default mode: bit 3 of a nibble would repeat the byte's sign."""
    both = (a & 0xFFFFFFFF) | (b << 32)
    picked = 0
    for place in range(4):
        nibble = selector >> (4 * place) & 0xF
        assert nibble < 8, "a selector that repeats signs"
        picked |= (both >> (8 * nibble) & 0xFF) << (8 * place)
    return picked


def as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def product(a: int, b: int) -> int:
    value = torch.tensor(as_float(a), dtype=torch.float32) * torch.tensor(as_float(b), dtype=torch.float32)
    return int(struct.unpack("<I", struct.pack("<f", float(value)))[0])


def rounded(high: int, low: int, dtype: torch.dtype) -> int:
    pair = torch.tensor([as_float(low), as_float(high)], dtype=torch.float32).to(dtype)
    return int(pair.view(torch.int32).item()) & 0xFFFFFFFF


OPERATIONS: Mapping[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "mul.rn.f32": product,
    "cvt.rn.bf16x2.f32": lambda high, low: rounded(high, low, torch.bfloat16),
    "cvt.rn.f16x2.f32": lambda high, low: rounded(high, low, torch.float16),
}


def run_assembly(text: str, registers: dict[str, int]) -> dict[str, int]:
    for line in re.findall(r"[^\n;{}]+(?=;)", text):
        operation, _, operands = line.strip().partition(" ")
        if operation == ".reg":
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        registers[target] = OPERATIONS[operation](*(_operand(registers, source) for source in sources))
    return registers


def _operand(registers: Mapping[str, int], source: str) -> int:
    if source.startswith("0f"):
        return int(source[2:], 16)
    if source[0].isdigit():
        return int(source, 0)
    return registers[source]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_assembly_looks_up_what_the_table_says(dtype: torch.dtype, kind: str) -> None:
    code = quantised(8, 64, torch.float32, kind=kind)[1].code.float().cpu()
    name = str(dtype).removeprefix("torch.")
    for scale in (0.0371, 1.7e-4, 3.0):
        bits = int(struct.unpack("<I", struct.pack("<f", scale))[0])
        planes = run_assembly(table_assembly(code.tolist(), name), {"$8": bits})
        expected = (code * torch.tensor(scale)).to(dtype)
        for first in range(0, 256, 4):
            codes = torch.arange(first, first + 4)
            registers = {"$4": int(sum(int(one) << (8 * place) for place, one in enumerate(codes)))}
            registers |= {f"${5 + 4 * plane}": planes[f"${plane}"] for plane in range(8)}
            found = run_assembly(lookup_assembly(), registers)
            words = torch.tensor([found[f"${place}"] for place in range(4)], dtype=torch.int64)
            numbers = torch.stack((words & 0xFFFF, words >> 16), 1).to(torch.uint16).view(dtype).view(2, 4)
            assert torch.equal(numbers[0], expected[codes >> 4])
            assert torch.equal(numbers[1], expected[codes & 15])
