"""The engine on a CUDA device against transformers and PEFT on the same device. Skipped where there is none.

Run on a machine with a GPU: ``python -m pytest tests/gpu``. Kernels are chosen by shape there, so tokens are compared
where the oracle's lead over the runner-up is larger than rounding.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig

from adapters.layer import MultiLoraLinear
from base.merged_linear import MergedLinear
from base.ops.nf4_linear import Nf4Linear
from base.pocket import CHECKPOINT
from engine.config import EngineConfig
from tests.support.oracle import Oracle, Reference, load_stock, same_where_certain
from tests.support.packages import peft_adapter
from tests.support.scenes import scene
from tests.support.serving import Answer, Ask, Rig
from tests.support.zoo import EVERYTHING, LANGUAGE

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MARGIN = 0.25
"""Logits apart: bf16 has 8 bits, and these logits reach 32."""

CONFIGS = {
    "language": LoraConfig(r=8, lora_alpha=24, target_modules=LANGUAGE),
    "everywhere": LoraConfig(r=16, lora_alpha=24, use_dora=True, target_modules=EVERYTHING),
}
RED, BLUE = scene("red", "circle"), scene("blue", "square", (150, 110))
ASKS = tuple(
    Ask(text, adapter, images)
    for adapter in (None, "language", "everywhere")
    for text, images in (
        ("Who are you?", ()),
        ("Describe the picture.", (RED,)),
        ("What color is the square?", (RED, BLUE)),
        ("Tell me of the sea, the sky and the birds in it. " * 40, ()),
    )
)


@dataclass(frozen=True)
class Pair:
    rig: Rig
    references: tuple[Reference, ...]

    def num_same(self, answers: Sequence[Answer]) -> int:
        pairs = zip(answers, self.references, strict=True)
        return sum(same_where_certain(ours.token_ids, theirs, MARGIN) for ours, theirs in pairs)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The pocket base with one plain adapter and one DoRA that changes every part, in two slots."""
    root = tmp_path_factory.mktemp("cuda")
    model, packages = load_stock(CHECKPOINT, quantized=False), {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        packages[name] = root / name
        peft_adapter(model, config, packages[name], seed).unload()
    rig = Rig(str(CHECKPOINT), root / "state", EngineConfig(num_slots=2), device=DEVICE)
    rig.register(packages)
    oracle = Oracle(CHECKPOINT, adapters=packages, device=DEVICE)
    references = tuple(oracle.generate(rig.prompt(ask), ask.num_tokens, ask.adapter) for ask in ASKS)
    yield Pair(rig, references)
    rig.close()


def test_everything_that_a_step_touches_is_on_the_device_and_in_its_type(pair: Pair) -> None:
    base = pair.rig.base
    assert (base.device.type, base.dtype) == ("cuda", torch.bfloat16)
    assert all(tensor.is_cuda for tensor in (*base.module.parameters(), *base.module.buffers()))
    wrapped = [child.base for child in base.module.modules() if isinstance(child, MultiLoraLinear)]
    products = [linear.product if isinstance(linear, MergedLinear) else linear for linear in wrapped]
    four_bit = [linear for linear in products if isinstance(linear, Linear4bit | Nf4Linear)]
    assert len(four_bit) == (4 if base.kernels["linear"] == "triton" else 7) * base.spec.num_layers
    types = {one.dtype if isinstance(one, Nf4Linear) else one.compute_dtype for one in four_bit}
    assert types == {torch.bfloat16}


def test_a_mixed_batch_equals_transformers_and_peft_run_alone(pair: Pair) -> None:
    assert pair.num_same(asyncio.run(pair.rig.answers(ASKS))) == len(ASKS)
    assert sum(each.num_certain(MARGIN) for each in pair.references) >= 3 * len(ASKS)


def test_one_at_a_time_equals_them_too(pair: Pair) -> None:
    assert pair.num_same(asyncio.run(pair.rig.alone(ASKS))) == len(ASKS)


def test_an_adapter_that_left_its_slot_and_came_back_answers_the_same(pair: Pair) -> None:
    """Slots are written by copies that the host does not wait for: what is read must be what was written."""

    async def churn(times: int) -> list[Answer]:
        for _ in range(times):
            for name in CONFIGS:
                await pair.rig.engine.unload_adapter(pair.rig.registry.resolve(name))
                await pair.rig.engine.load_adapter(pair.rig.registry.resolve(name))
        return await pair.rig.answers(ASKS)

    asyncio.run(churn(1))
    before = torch.cuda.memory_allocated()
    assert pair.num_same(asyncio.run(churn(20))) == len(ASKS)
    assert torch.cuda.memory_allocated() <= 1.01 * before


def test_sampling_with_a_seed_repeats_itself(pair: Pair) -> None:
    params = {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 7,
        "logprobs": 3,
        "repetition_penalty": 1.1,
    }
    ask = Ask("Describe the picture.", "language", (RED,))

    async def twice() -> list[Answer]:
        return [await pair.rig.answer(ask, **params) for _ in range(2)]

    first, second = asyncio.run(twice())
    assert first.token_ids == second.token_ids
