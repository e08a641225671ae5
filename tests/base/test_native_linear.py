"""The compiled linear: its weight is bitsandbytes' to the bit, its sums are float32's, a row's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from base.float32_linear import Float32Linear
from base.four_bit import computed_state
from base.linear import dequantised_weight, settle_cpu_linears
from base.merged_linear import MERGED, MergedLinear
from base.native_linear import FourBitRows, NativeLinear
from base.ops import native_library
from base.ops.native_library import MODULE, NativeMissing, has_native_library
from tests.base.test_linear import four_bit, settled

needs_kernels = pytest.mark.skipif(not has_native_library(), reason="the compiled kernels are not here")
SHAPES = [(64, 8), (128, 256), (448, 64), (576, 104), (1024, 32)]
"""(in, out): one block and one group; more than a few inputs at a time; more than many; a last piece of each."""
NUM_ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 16, 64, 65, 130)
"""Every count of the few, then tiles of three with one, two and four left, a whole panel, and more than one."""


def native(linear: nn.Module) -> NativeLinear:
    made = settled(linear, "native")
    assert isinstance(made, NativeLinear)
    return made


def plain(num_in: int, num_out: int, *, bias: bool) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(num_in, num_out, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


@needs_kernels
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "nf4 without double quantisation", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_rounds_the_exact_product_once_and_a_row_has_its_own_bits(
    shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    if kind == "bfloat16":
        source: nn.Module = plain(*shape, bias=True)
    else:
        source = four_bit(*shape, bias=True, double=kind == "nf4")
    weight, bias = dequantised_weight(source).double(), source.bias
    assert isinstance(bias, Tensor)
    linear = native(source)
    assert linear.is_quantised == (kind != "bfloat16")
    assert torch.equal(dequantised_weight(linear).double(), weight)
    x = torch.randn(max(NUM_ROWS), shape[0], generator=torch.Generator().manual_seed(5)).to(dtype)
    alone = torch.cat([linear(x[row : row + 1]) for row in range(len(x))])
    exact = x.double() @ weight.T + bias.double()
    step = torch.finfo(dtype).eps * exact.abs() / 2 + 2e-6 * shape[0] ** 0.5
    assert alone.dtype == dtype
    assert bool(((alone.double() - exact).abs() <= step).all())
    for num_rows in NUM_ROWS:
        assert torch.equal(linear(x[-num_rows:]), alone[-num_rows:]), num_rows


@needs_kernels
def test_a_row_that_is_not_finite_stays_alone() -> None:
    linear = native(four_bit(128, 64, bias=False))
    x = torch.randn(12, 128, dtype=torch.bfloat16)
    clean = linear(x)
    x[5] = float("nan")
    x[7, 3] = float("inf")
    found = linear(x)
    others = [row for row in range(12) if row not in (5, 7)]
    assert bool(found[5].isnan().all()) and not bool(found[7].isfinite().any())
    assert torch.equal(found[others], clean[others])


@needs_kernels
def test_inputs_may_lie_apart_have_more_dimensions_or_be_none() -> None:
    linear = native(four_bit(128, 64, bias=True))
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)[..., ::2]
    assert torch.equal(linear(x), linear(x.contiguous()))
    assert linear(x).shape == (2, 3, 64)
    half = torch.randn(4, 256, dtype=torch.bfloat16)[:, :128]
    assert torch.equal(linear(half), linear(half.contiguous()))
    assert linear(torch.empty(0, 128, dtype=torch.bfloat16)).shape == (0, 64)
    with pytest.raises(TypeError, match="float16"):
        linear(torch.randn(1, 128, dtype=torch.float16))
    with pytest.raises(ValueError, match="rows of 64 do not suit a linear of 128 inputs"):
        linear(torch.zeros(2, 64))


@needs_kernels
def test_a_swapped_code_is_seen() -> None:
    source = four_bit(128, 64, bias=False)
    expected = dequantised_weight(source)
    rows = FourBitRows.of(source.weight.data, computed_state(source))
    rows.codes[3, 1, 2, 25] ^= 1  # of output 26 in the second block: lane 4 of step 3
    different = (rows.dense().float() != expected).nonzero().tolist()
    assert different == [[26, 64 + 3 * 8 + 4]]
    x = torch.zeros(1, 128)
    x[0, 92] = 1
    assert float(NativeLinear(rows, None)(x)[0, 26]) == float(rows.dense()[26, 92]) != float(expected[26, 92])


@needs_kernels
@pytest.mark.parametrize(
    "source",
    [
        four_bit(64, 108, bias=False),  # outputs that are no multiple of eight
        nn.Linear(128, 64, dtype=torch.float32),
        nn.Linear(100, 64, dtype=torch.bfloat16),
    ],
    ids=["odd outputs", "float32", "odd inputs"],
)
def test_what_it_does_not_take_is_kept_in_float32(source: nn.Module) -> None:
    weight = dequantised_weight(source)
    kept = settled(source, "native")
    assert isinstance(kept, Float32Linear)
    assert torch.equal(dequantised_weight(kept), weight)


@needs_kernels
def test_linears_of_one_input_are_merged_and_have_their_own_bits() -> None:
    names = MERGED["qkv_proj"]
    sources = [four_bit(128, width, bias=True, seed=width) for width in (128, 32, 64)]
    apart = [native(four_bit(128, width, bias=True, seed=width)) for width in (128, 32, 64)]
    holder = nn.ModuleDict(dict(zip(names, sources, strict=True)))
    settle_cpu_linears(holder, "native")
    merged = holder["qkv_proj"]
    assert isinstance(merged, MergedLinear) and isinstance(merged.product, NativeLinear)
    for num_rows in (1, 5, 16):
        x = torch.randn(num_rows, 128, dtype=torch.bfloat16)
        assert torch.equal(merged(x), torch.cat([one(x) for one in apart], 1))
    for name, one in zip(names, apart, strict=True):
        assert torch.equal(dequantised_weight(holder[name]), dequantised_weight(one))


@needs_kernels
def test_weights_of_other_kinds_are_not_laid_side_by_side() -> None:
    source = four_bit(128, 64, bias=False)
    rows = FourBitRows.of(source.weight.data, computed_state(source))
    other = FourBitRows(rows.codes, rows.scales, rows.values.flip(0), rows.dtype)
    with pytest.raises(ValueError, match="same kind"):
        FourBitRows.side_by_side([rows, other])


@pytest.fixture
def fresh_library() -> Iterator[None]:
    native_library.native_library.cache_clear()
    yield
    native_library.native_library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
def test_where_it_was_not_compiled_the_reason_is_told_and_float32_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_library, "MODULE", MODULE + "_gone")
    with pytest.raises(NativeMissing, match="install a C compiler"):
        native_library.native_library()
    with pytest.raises(ValueError, match=r"cpu_linear native is not to be had: .*C compiler"):
        settled(four_bit(128, 64, bias=False), "native")
    monkeypatch.setattr("base.linear.multiplies_bf16", lambda: False)
    assert isinstance(settled(four_bit(128, 64, bias=False), "auto"), Float32Linear)


@pytest.mark.usefixtures("fresh_library")
def test_a_processor_without_its_vectors_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(NativeMissing, match="AVX2"):
        native_library.native_library()
