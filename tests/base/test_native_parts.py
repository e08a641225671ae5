"""Between the compiled linears: compiled norms, gates and decode attention are their plain twins, and a row's are its
own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from base.attention import AttentionPlan
from base.config import BaseConfig
from base.cuda_attention import Heads, _plan, _projected
from base.gate import Gate
from base.kernel_check import error_of
from base.loader import load_base
from base.native_attention import CHUNK, NativeAttention
from base.native_parts import native_parts
from base.native_rows import NativeGate, NativeNorm
from base.norm import Norm
from base.ops.native_library import has_native_library
from base.rotary import Rotary
from base.torch_attention import TorchAttention
from tests.base.test_decoder import SHAPES, both_ways
from tests.support.rotaries import random_turns

pytestmark = pytest.mark.skipif(not has_native_library(), reason="the compiled kernels are not here")
DTYPES = (torch.bfloat16, torch.float32)
CPU = torch.device("cpu")
HEADS = (Heads(14, 2, 64), Heads(4, 2, 32), Heads(28, 4, 128), Heads(17, 1, 80), Heads(2, 2, 16))
"""Seven heads a key head; few; the 7B's; more than are computed at once, and no multiple of 64; one a key head."""
STEPS = {
    "one key": [(1, 1)],
    "around a chunk": [(1, CHUNK - 1), (1, CHUNK), (1, CHUNK + 1), (1, 3 * CHUNK + 9)],
    "many lengths": [(1, 1 + 13 * place) for place in range(17)],
    "prompts and their pieces between": [(1, 40), (19, 19), (1, 9), (5, 300), (1, 700)],
    "no decode": [(19, 19), (5, 300)],
}
"""(rows, visible keys) of each sequence."""


class RmsNorm(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width).to(dtype), requires_grad=False)
        self.variance_epsilon = 1e-6


class Mlp(nn.Module):
    def __init__(self, width: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, width)
        self.act_fn = activation or nn.SiLU()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 24, 104, 896, 3584])
def test_a_norm_is_its_plain_twin_and_a_row_has_its_own_bits(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    module = RmsNorm(width, dtype)
    plain, ours = Norm(module), NativeNorm(module)
    hidden, delta = torch.randn(2, 130, width).to(dtype) * 3
    sums, expected = plain.after(hidden, delta.clone())
    before = hidden.clone()
    ours_sums, found = ours.after(hidden, delta.clone())
    assert torch.equal(ours_sums, sums) and torch.equal(hidden, before)
    epsilon = torch.finfo(dtype).eps
    assert bool(((found - expected).abs() <= 4 * epsilon * expected.abs()).all())
    assert float((found != expected).float().mean()) < (0.01 if dtype == torch.bfloat16 else 1)
    assert torch.equal(ours(sums), found) and torch.equal(ours.after(sums, None)[1], found)
    for row in (0, 7, 129):
        one = slice(row, row + 1)
        assert torch.equal(ours.after(hidden[one], delta[one].clone())[1], found[one])


def test_every_bfloat16_is_gated_as_torch_gates_it() -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16).view(-1, 1024)
    mlp = Mlp(1024)
    for up in (torch.ones_like(values), torch.randn(values.shape).to(torch.bfloat16)):
        found, expected = NativeGate(mlp)(values, up), Gate(mlp)(values, up)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 1032, 4864])
def test_a_gate_is_its_plain_twin_over_halves_of_one_product(width: int, dtype: torch.dtype) -> None:
    gate, up = (torch.randn(17, 2 * width).to(dtype) * 4).split(width, -1)
    mlp = Mlp(width)
    found, expected = NativeGate(mlp)(gate, up), Gate(mlp)(gate, up)
    torch.testing.assert_close(found, expected, rtol=0 if dtype == torch.bfloat16 else 1e-6, atol=1e-12)
    assert torch.equal(NativeGate(mlp)(gate[3:4], up[3:4]), found[3:4])


def attend(
    attention: NativeAttention | TorchAttention, plan: AttentionPlan, rows: slice, heads: Heads
) -> Tensor:
    """Rows of a step of random heads, whose plan has only them."""
    dtype = plan.key_cache[0].dtype
    query, key, value = (part[rows] for part in _projected(400, heads, dtype, CPU))
    cos, sin = random_turns(400, heads.dim, dtype)
    rotary = Rotary(cos[rows], sin[rows])
    return attention.begin(plan, dtype)(0, query, key, value, rotary, heads.dim**-0.5)


def of(heads: Heads) -> NativeAttention:
    return NativeAttention(heads.num_heads, heads.num_kv_heads, heads.dim)


def twin(plan: AttentionPlan) -> AttentionPlan:
    return replace(plan, key_cache=(plan.key_cache[0].clone(),), value_cache=(plan.value_cache[0].clone(),))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("segments", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_its_plain_twin(
    segments: list[tuple[int, int]], heads: Heads, dtype: torch.dtype
) -> None:
    plan = _plan(segments, heads, dtype, CPU, 3)
    copy, rows = twin(plan), slice(0, plan.query_starts[-1])
    found, expected = attend(of(heads), plan, rows, heads), attend(TorchAttention(), copy, rows, heads)
    assert torch.equal(plan.key_cache[0], copy.key_cache[0])  # rotated and stored to the bit
    assert torch.equal(plan.value_cache[0], copy.value_cache[0])
    assert error_of(found, expected) < (0.5 if dtype == torch.bfloat16 else 0.01)
    for begin, end in zip(plan.query_starts, plan.query_starts[1:], strict=False):
        if end - begin > 1:
            assert torch.equal(found[begin:end], expected[begin:end])


@pytest.mark.parametrize("threads", [1, 2, 8], indirect=True)
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("heads", HEADS[:2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_decode_has_the_same_bits_alone_and_among_others(heads: Heads, dtype: torch.dtype) -> None:
    lengths = [*range(1, 40), 255, 256, 257, 511, 513, 1030]
    plan = _plan([*((1, length) for length in lengths), (9, 60), (6, 6)], heads, dtype, CPU, 3)
    before = twin(plan)
    together = attend(of(heads), plan, slice(0, plan.query_starts[-1]), heads)
    for row, length in enumerate(lengths):
        one = replace(
            before,
            query_starts=(0, 1),
            context_lens=(length,),
            block_tables=plan.block_tables[row : row + 1],
            slot_mapping=plan.slot_mapping[row : row + 1],
        )
        assert torch.equal(attend(of(heads), one, slice(row, row + 1), heads)[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_others_left_is_not_read_and_a_bad_key_is_its_own_sequences(dtype: torch.dtype) -> None:
    heads = HEADS[0]
    plan = _plan([(1, 13), (1, 70), (1, 300)], heads, dtype, CPU, 3)
    clean = attend(of(heads), twin(plan), slice(0, 3), heads)
    for cache in (plan.key_cache[0], plan.value_cache[0]):
        for table, length in zip(plan.block_tables, plan.context_lens, strict=True):
            cache[table[-1], length % 16 :] = float("nan")
    assert torch.equal(attend(of(heads), plan, slice(0, 3), heads), clean)
    plan.key_cache[0][plan.block_tables[1][0], 5] = float("nan")
    found = attend(of(heads), plan, slice(0, 3), heads)
    assert bool(found[1].isnan().all()) and torch.equal(found[[0, 2]], clean[[0, 2]])


def test_what_does_not_suit_is_refused_by_the_kernels_and_left_to_the_twins(tiny_folder: Path) -> None:
    base = load_base(BaseConfig(source=str(tiny_folder), cpu_linear="native"))
    assert isinstance(base.decoder.attention, NativeAttention)
    parts = native_parts(base.spec)
    assert type(parts.norm(RmsNorm(12, torch.bfloat16))) is Norm
    assert type(parts.gate(Mlp(8, nn.GELU()))) is Gate and type(parts.gate(Mlp(12))) is Gate
    assert (
        type(parts.norm(RmsNorm(16, torch.bfloat16))) is NativeNorm and type(parts.gate(Mlp(8))) is NativeGate
    )
    assert isinstance(native_parts(replace(base.spec, head_dim=24)).attention, TorchAttention)
    assert isinstance(native_parts(replace(base.spec, dtype="float16")).attention, TorchAttention)
    with pytest.raises(ValueError, match="norm"):
        NativeNorm(RmsNorm(12, torch.bfloat16))
    with pytest.raises(ValueError, match="SiLU"):
        NativeGate(Mlp(8, nn.GELU()))
    plan = _plan([(1, 4)], HEADS[0], torch.bfloat16, CPU, 3)
    with pytest.raises(ValueError, match="heads"):
        attend(of(HEADS[1]), plan, slice(0, 1), HEADS[0])
    with pytest.raises(ValueError, match="float32"):
        of(HEADS[0]).begin(plan, torch.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_decoder_of_compiled_parts_is_transformers(
    shape: list[tuple[int, int]], dtype: str, odd_folder: Path
) -> None:
    base = load_base(BaseConfig(source=str(odd_folder), dtype=dtype, cpu_linear="native"))  # type: ignore[arg-type]
    hidden, expected, ours, theirs = both_ways(base, shape)
    tolerance = 2**-5 if dtype == "bfloat16" else 1e-5
    assert (hidden - expected).abs().max() <= tolerance * expected.abs().max()
    for cache, reference in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        assert (cache - reference).abs().max() <= tolerance * reference.abs().max()
