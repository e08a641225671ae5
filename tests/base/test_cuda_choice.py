"""A GPU's kernels, tried and used here in Triton's interpreter: those that agree are chosen, and no others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from base import cuda_attention, cuda_linear
from base.config import BaseConfig
from base.cuda_attention import DECODES, PROMPTS, Heads, choose_attention, try_attention
from base.cuda_linear import settle_cuda_linears
from base.errors import KernelRefused
from base.kernel_check import error_of
from base.linear import dequantised_weight, four_bit_names
from base.loader import load_base
from base.memory import memory_by_part
from base.merged_linear import LinearPart, MergedLinear
from base.ops import nf4, nf4_ops
from base.ops.attention_ops import attend_decodes, rotate_and_store
from base.ops.nf4_ahead import DequantiseAhead
from base.ops.nf4_linear import Nf4Linear
from base.torch_attention import TorchAttention
from base.triton_attention import TritonAttention
from tests.base.test_triton_nf4 import four_bit
from tests.base.test_triton_step import plain_varlen

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these, compiled")

CPU = torch.device("cpu")
HEADS = Heads(6, 2, 32)


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a second for what a GPU does at once: the same kinds of cases, smaller ones."""
    monkeypatch.setattr(cuda_linear, "TRIED_ROWS", (1, 3, 17))
    monkeypatch.setattr(cuda_linear, "FUSED_ROWS", 4)
    small = (((1, 1),), ((1, 70), (1, 33), (1, 16)), ((1, 40), (19, 19), (1, 9), (5, 30)))
    monkeypatch.setattr(cuda_attention, "DECODES", small)


def two_layers() -> nn.Module:
    """Linears of two shapes, one with a bias, and one that is not in 4 bits."""
    return nn.ModuleDict({
        "q": four_bit(128, 80, bias=True),
        "down": four_bit(192, 128, bias=False),
        "other_q": four_bit(128, 80, bias=True, seed=3),
        "plain": nn.Linear(128, 16),
    })  # fmt: skip


def test_linears_that_agree_take_bitsandbytes_places_and_their_memory() -> None:
    module = two_layers()
    plain = copy.deepcopy(module)
    before = memory_by_part(module)
    assert settle_cuda_linears(module, "auto", CPU) == "triton"
    assert not four_bit_names(module)
    for name in ("q", "down", "other_q"):
        ours, theirs = module.get_submodule(name), plain.get_submodule(name)
        assert isinstance(ours, Nf4Linear) and ours.is_quantised and ours.is_fused
        assert torch.equal(dequantised_weight(ours), dequantised_weight(theirs))
        for num_rows in (1, 5, 130):  # the last of them from a copy made ahead
            x = torch.randn(num_rows, ours.in_features, dtype=torch.float16)
            assert error_of(ours(x), theirs(x)) <= 1
    assert type(module.get_submodule("plain")) is nn.Linear
    after = memory_by_part(module)
    assert after["language"] == before["language"]
    # eight bytes a row more, and a table of codes each, shared or not
    assert after["copies"] == 2 * 2 * 192 * 128  # two of the largest, in 16 bits, however many share them
    assert before["language_4bit"] <= after["language_4bit"] <= before["language_4bit"] + 8 * 288 + 4096


def test_torch_and_a_module_without_four_bits_change_nothing() -> None:
    module = two_layers()
    assert settle_cuda_linears(module, "torch", CPU) == "bitsandbytes"
    assert len(four_bit_names(module)) == 3
    assert settle_cuda_linears(nn.ModuleDict({"plain": nn.Linear(4, 4)}), "triton", CPU) == "none"


def off_by_a_block(
    x: Tensor, weight: object, bias: Tensor | None = None, *, real: Callable[..., Tensor] = nf4_ops.matmul
) -> Tensor:
    """A product whose mask lost the last 64 inputs."""
    lost = x.clone()
    lost[:, -64:] = 0
    return real(lost, weight, bias)


def raising(*_: object, **__: object) -> Tensor:
    raise RuntimeError("no PTX for this device")


@pytest.mark.parametrize("kernel", [off_by_a_block, raising])
def test_a_wrong_or_raising_product_leaves_bitsandbytes(
    kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nf4_ops, "matmul", kernel)
    module = two_layers()
    assert settle_cuda_linears(module, "auto", CPU) == "bitsandbytes"
    assert len(four_bit_names(module)) == 3
    assert "kernels.refused kind=linear" in caplog.text
    with pytest.raises(KernelRefused, match="linear kernel"):
        settle_cuda_linears(module, "triton", CPU)
    assert len(four_bit_names(module)) == 3


def projections() -> nn.Module:
    """Linears of one input, and one beside them."""
    widths = {"q_proj": 96, "k_proj": 32, "v_proj": 48}
    parts = {name: four_bit(128, width, bias=True, seed=width) for name, width in widths.items()}
    return nn.ModuleDict({**parts, "o_proj": four_bit(64, 128, bias=False)})


def test_linears_of_one_input_become_one_product() -> None:
    module = projections()
    plain = copy.deepcopy(module)
    assert settle_cuda_linears(module, "auto", CPU) == "triton"
    merged = module.get_submodule("qkv_proj")
    assert isinstance(merged, MergedLinear) and isinstance(merged.product, Nf4Linear)
    assert isinstance(module.get_submodule("o_proj"), Nf4Linear)
    names = ("q_proj", "k_proj", "v_proj")
    for num_rows in (1, 5, 130):  # the last of them from a copy made ahead
        x = torch.randn(num_rows, 128, dtype=torch.float16)
        expected = torch.cat([plain.get_submodule(name)(x) for name in names], 1)
        assert error_of(merged(x), expected) <= 1
        assert torch.equal(torch.cat([module.get_submodule(name)(x) for name in names], 1), merged(x))
    for name in names:
        ours, theirs = module.get_submodule(name), plain.get_submodule(name)
        assert isinstance(ours, LinearPart)
        assert torch.equal(dequantised_weight(ours), dequantised_weight(theirs))


def test_parts_in_another_order_are_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = nf4.side_by_side
    monkeypatch.setattr(nf4, "side_by_side", lambda weights: real(list(reversed(weights))))
    module = projections()
    assert settle_cuda_linears(module, "auto", CPU) == "bitsandbytes"
    assert "kernels.refused kind=linear" in caplog.text
    assert len(four_bit_names(module)) == 4


def test_copies_that_come_too_late_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The product still serves; its copies are made when they are wanted."""
    real = DequantiseAhead.take
    monkeypatch.setattr(DequantiseAhead, "take", lambda self, weight: torch.zeros_like(real(self, weight)))
    module = two_layers()
    assert settle_cuda_linears(module, "auto", CPU) == "triton"
    assert "kernels.refused kind=copies" in caplog.text
    ours = module.get_submodule("q")
    x = torch.randn(130, 128, dtype=torch.float16)
    assert ours(x).abs().max() > 0


def test_attention_that_agrees_is_used() -> None:
    attention, kernels = choose_attention(HEADS, torch.float16, "auto", CPU)
    assert isinstance(attention, TritonAttention)
    assert kernels["attention"] == "triton"


def test_prompts_that_disagree_go_without_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch's ``varlen_attn`` raises, so this is what happens without the patch, too."""
    monkeypatch.setattr(cuda_attention, "DECODES", (((1, 1),),))
    monkeypatch.setattr(cuda_attention, "PROMPTS", (((1, 4), (9, 9), (5, 20)),))
    monkeypatch.setattr(cuda_attention, "find_varlen", lambda: raising)
    assert choose_attention(HEADS, torch.float16, "auto", CPU)[1] == {
        "attention": "triton",
        "prompts": "torch",
    }
    monkeypatch.setattr(cuda_attention, "find_varlen", lambda: lambda *args: plain_varlen(*args) * 1.05)
    assert choose_attention(HEADS, torch.float16, "auto", CPU)[1] == {
        "attention": "triton",
        "prompts": "torch",
    }
    monkeypatch.setattr(cuda_attention, "find_varlen", lambda: plain_varlen)
    assert choose_attention(HEADS, torch.float16, "auto", CPU)[1] == {
        "attention": "triton",
        "prompts": "varlen",
    }
    assert choose_attention(HEADS, torch.float32, "auto", CPU)[1] == {
        "attention": "triton",
        "prompts": "torch",
    }
    monkeypatch.setattr(cuda_attention, "find_varlen", lambda: raising)
    with pytest.raises(KernelRefused, match="prompts kernel"):
        choose_attention(HEADS, torch.float16, "triton", CPU)


def neighbours(query: Tensor, *args: object, real: Callable[..., Tensor]) -> Tensor:
    """Each row attends as the one beside it."""
    return real(query, *args).roll(1, 0)


@pytest.mark.parametrize("kernel", [neighbours, raising])
def test_wrong_or_raising_attention_leaves_torchs(
    kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from base import triton_attention

    real = attend_decodes
    planted = kernel if kernel is raising else lambda query, *args: neighbours(query, *args, real=real)
    monkeypatch.setattr(triton_attention, "attend_decodes", planted)
    attention, kernels = choose_attention(HEADS, torch.float16, "auto", CPU)
    assert isinstance(attention, TorchAttention)
    assert kernels == {"attention": "torch", "prompts": "torch"}
    assert "kernels.refused kind=attention" in caplog.text


def test_a_wrong_turn_leaves_torchs_attention(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from base import triton_attention

    def backwards(
        query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor
    ) -> Tensor:
        return rotate_and_store(query, key, value, cos, -sin, *rest)

    monkeypatch.setattr(triton_attention, "rotate_and_store", backwards)
    monkeypatch.setattr(
        cuda_attention, "DECODES", (((1, 1),),)
    )  # whose query does not matter, but its key does
    assert isinstance(choose_attention(HEADS, torch.float16, "auto", CPU)[0], TorchAttention)
    assert "kernels.refused kind=attention reason='the keys of 1 sequences" in caplog.text


def test_heads_that_the_kernel_does_not_take_leave_torchs(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(choose_attention(Heads(17, 1, 32), torch.float16, "auto", CPU)[0], TorchAttention)
    assert "17 query heads" in caplog.text


def test_a_trial_has_single_rows_pieces_and_batches() -> None:
    sizes = {len(segments) for segments in DECODES}
    assert {1, 3, 17} <= sizes
    assert any(1 < rows < keys for segments in PROMPTS for rows, keys in segments)
    cases = [what for what, _, _ in try_attention(None, DECODES[:1], HEADS, torch.float16, CPU)]
    assert cases[1:] == [f"the keys of {cases[0]}", f"the values of {cases[0]}"]


def test_a_loaded_base_over_these_kernels_computes_as_over_bitsandbytes_and_torch(tiny_folder: Path) -> None:
    """The decoder, whole: a mixed step through settled linears and Triton's attention."""
    config = BaseConfig(source=str(tiny_folder), cpu_linear="unpacked")
    plain, ours = load_base(config), load_base(config)
    assert settle_cuda_linears(ours.module.model.language_model, "auto", CPU) == "triton"
    spec = ours.spec
    heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    attention, _ = choose_attention(heads, ours.dtype, "auto", CPU)
    assert isinstance(attention, TritonAttention)
    ours.decoder.attention = attention
    segments = ((1, 20), (7, 7), (1, 3), (5, 21))
    num_rows = sum(rows for rows, _ in segments)
    embeds = plain.embed_tokens(torch.arange(num_rows))
    positions = torch.arange(num_rows).expand(3, -1).contiguous()
    results = []
    for base in (ours, plain):
        plan = cuda_attention._plan(segments, heads, base.dtype, CPU, 0)
        layers = (plan.key_cache * spec.num_layers, plan.value_cache * spec.num_layers)
        deep = replace(plan, key_cache=layers[0], value_cache=layers[1])
        results.append(base.forward(embeds, positions, deep))
    assert any(isinstance(one, Nf4Linear) for one in ours.module.modules())
    assert not any(isinstance(one, Linear4bit) for one in ours.module.modules())
    apart = (results[0] - results[1]).float().norm(dim=1) / results[1].float().norm(dim=1)
    assert float(apart.max()) < 0.03
