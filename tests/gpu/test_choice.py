"""On a CUDA device the loaded engine serves by all our kernels, and answers as by torch's and bitsandbytes'."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig
from torch import nn

from adapters.layer import MultiLoraLinear
from base.config import CudaKernels
from base.linear import dequantised_weight
from base.merged_linear import MergedLinear
from base.ops.nf4_linear import Nf4Linear
from base.pocket import CHECKPOINT
from base.torch_attention import TorchAttention
from base.triton_attention import TritonAttention, find_varlen
from engine.config import EngineConfig
from tests.support.oracle import load_stock
from tests.support.packages import peft_adapter
from tests.support.scenes import scene
from tests.support.serving import Ask, Rig
from tests.support.zoo import EVERYTHING, LANGUAGE

pytestmark = pytest.mark.gpu

ASKS = tuple(
    Ask(text, adapter, images)
    for adapter in (None, "language", "everywhere")
    for text, images in (
        ("Who are you?", ()),
        ("Describe the picture.", (scene("red", "circle"),)),
        ("Tell me of the sea, the sky and the birds in it. " * 40, ()),
    )
)


@pytest.fixture(scope="module")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[CudaKernels, Rig]]:
    """Ours, where a refusal is an error, and torch's; over the same base and adapters."""
    root = tmp_path_factory.mktemp("choice")
    model, packages = load_stock(CHECKPOINT, quantized=False), {}
    configs = {
        "language": LoraConfig(r=8, lora_alpha=24, target_modules=LANGUAGE),
        "everywhere": LoraConfig(r=16, lora_alpha=24, use_dora=True, target_modules=EVERYTHING),
    }
    for seed, (name, config) in enumerate(configs.items()):
        packages[name] = root / name
        peft_adapter(model, config, packages[name], seed).unload()
    ways: tuple[CudaKernels, ...] = ("triton", "torch")
    made = {
        way: Rig(str(CHECKPOINT), root / way, EngineConfig(num_slots=2), device="cuda", cuda_kernels=way)
        for way in ways
    }
    for rig in made.values():
        rig.register(packages)
    yield made
    for rig in made.values():
        rig.close()


def linears(rig: Rig) -> dict[str, MultiLoraLinear]:
    named = rig.base.module.named_modules()
    return {name: child for name, child in named if isinstance(child, MultiLoraLinear)}


def products(rig: Rig) -> list[nn.Module]:
    """What multiplies, merged or not."""
    bases = [one.base for one in linears(rig).values()]
    return [base.product if isinstance(base, MergedLinear) else base for base in bases]


def adders(rig: Rig) -> set[str]:
    """The modules of those who add adapters."""
    return {one._add.__module__ for one in linears(rig).values()}


def test_every_kind_serves_by_our_kernels_and_none_where_torch_is_asked_for(
    rigs: dict[CudaKernels, Rig],
) -> None:
    ours, plain = rigs["triton"], rigs["torch"]
    prompts = "torch" if find_varlen() is None else "varlen"
    expected = {"linear": "triton", "attention": "triton", "prompts": prompts, "adapters": "triton"}
    assert dict(ours.engine.status().kernels) == expected
    assert isinstance(ours.base.decoder.attention, TritonAttention)
    assert not any(isinstance(one, Linear4bit) for one in products(ours))
    num_layers = ours.base.spec.num_layers
    assert sum(isinstance(one, Nf4Linear) for one in products(ours)) == 4 * num_layers
    assert adders(ours) == {"adapters.triton_lora"}

    assert dict(plain.engine.status().kernels) == {
        "linear": "bitsandbytes", "attention": "torch", "prompts": "torch", "adapters": "torch",
    }  # fmt: skip
    assert isinstance(plain.base.decoder.attention, TorchAttention)
    assert sum(isinstance(one, Linear4bit) for one in products(plain)) == 7 * num_layers
    assert adders(plain) == {"adapters.ops.site_group"}


def test_the_weights_behind_them_are_equal_to_the_bit_and_as_small(rigs: dict[CudaKernels, Rig]) -> None:
    ours, theirs = linears(rigs["triton"]), linears(rigs["torch"])
    assert set(theirs) < set(ours)  # parts of merged linears are there, too
    assert all(
        torch.equal(dequantised_weight(ours[name].base), dequantised_weight(one.base))
        for name, one in theirs.items()
    )
    sizes = [rigs[way].base.memory_by_part["language_4bit"] for way in ("triton", "torch")]
    assert sizes[0] <= 1.1 * sizes[1]


def test_a_mixed_batch_has_the_same_tokens_either_way(rigs: dict[CudaKernels, Rig]) -> None:
    """Greedy tokens part only where two logits are as close as rounding: so nearly all are equal, and most answers."""
    ours, plain = (asyncio.run(rigs[way].answers(ASKS)) for way in ("triton", "torch"))
    pairs = [(one.token_ids, other.token_ids) for one, other in zip(ours, plain, strict=True)]
    assert all(one[0] == other[0] for one, other in pairs)
    assert sum(one == other for one, other in pairs) >= 0.7 * len(pairs)
