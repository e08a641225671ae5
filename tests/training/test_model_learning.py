"""AdaptedBase against stock transformers and PEFT, and which of its parts learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from base.pocket import CHECKPOINT
from tests.training.learnable import adapt, batch_of, make_base, pictured, randomise, row, texts
from training.data.labels import IGNORED, Labeller
from training.model.batch import Batch
from training.model.collator import Collator, Examples
from training.model.loading import FrozenLinear, training_dtype
from training.model.model import AdaptedBase
from training.recipe.recipe import PartRecipe, Recipe


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return make_base()


@pytest.fixture(scope="module")
def stock() -> Qwen2_5_VLForConditionalGeneration:
    """As transformers and bitsandbytes load it, in fp32."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    model: Qwen2_5_VLForConditionalGeneration = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=settings
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)


def stock_loss(model: nn.Module, base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed cross entropy and all logits of one sequence, by the class's own forward and its own positions."""
    ids = batch.ids.unsqueeze(0)
    pictures: dict[str, Tensor] = {}
    if batch.grids:
        pictures = {
            "pixel_values": batch.pixels,
            "image_grid_thw": torch.tensor(batch.grids),
            "mm_token_type_ids": (ids == base.spec.image_token_id).int(),
        }
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pictures).logits[0]
    loss = functional.cross_entropy(logits[:-1], batch.labels[1:], ignore_index=IGNORED, reduction="sum")
    return loss, logits


@pytest.mark.parametrize(
    "fields",
    [{"alpha": 12.0}, {"dora": True}, {"rslora": True, "merger": PartRecipe(r=2, alpha=6.0)}],
    ids=["lora", "dora", "rslora, ranks by part"],
)
def test_loss_logits_and_gradients_are_those_of_stock_transformers_and_peft(
    base: BaseModel, stock: Qwen2_5_VLForConditionalGeneration, tmp_path: Path, fields: dict[str, object]
) -> None:
    model = adapt(base, **fields)
    randomise(model)
    model.save(tmp_path)
    reference = PeftModel.from_pretrained(stock, str(tmp_path), is_trainable=True).eval()
    for each in (pictured(1), texts()[:1]):
        batch = batch_of(base, each)
        model.zero_grad()
        reference.zero_grad()
        ours = model(batch).total
        theirs, logits = stock_loss(reference, base, batch)
        torch.testing.assert_close(model.logits(batch), logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        ours.backward()
        theirs.backward()
        _compare_gradients(model, reference)
    model.detach()
    reference.unload()


def _compare_gradients(model: AdaptedBase, reference: nn.Module) -> None:
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    ours = {name.removeprefix("peft."): p.grad for name, p in model.trainable().items()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        other = theirs[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert (gradient - other).norm() <= 1e-4 * other.norm(), name


def test_the_kept_weights_are_those_of_the_4_bit_linears_to_the_bit(base: BaseModel) -> None:
    raw = load_base(BaseConfig(dtype="float32", cpu_linear="unpacked"))
    names = [name for name, child in base.module.named_modules() if isinstance(child, FrozenLinear)]
    assert len(names) == 28
    for name in names:
        ours, theirs = base.module.get_submodule(name), raw.module.get_submodule(name)
        x = torch.randn(9, int(ours.in_features), generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
        x.requires_grad_()
        assert torch.equal(ours(x), theirs(x))
        pair = [torch.autograd.grad(linear(x).square().sum(), x)[0] for linear in (ours, theirs)]
        assert torch.equal(*pair)


@pytest.fixture
def model(base: BaseModel) -> Iterator[AdaptedBase]:
    made = adapt(base).train()
    yield made
    made.detach()


def learnt(model: AdaptedBase, batch: Batch) -> set[str]:
    """Parts whose every B got a gradient."""
    model.zero_grad()
    model(batch).total.backward()
    norms: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
            norms.setdefault(model.part_of(name), []).append(norm)
    for part in norms:
        assert all(norms[part]) or not any(norms[part]), part
    return {part for part in norms if all(norms[part])}


@pytest.mark.parametrize("parts", [("vision",), ("merger",), ("language",), ("merger", "language")], ids=str)
def test_exactly_the_trained_parts_learn(base: BaseModel, model: AdaptedBase, parts: tuple[str, ...]) -> None:
    batch = batch_of(base, pictured(2))
    model.set_trained_parts(parts)  # type: ignore[arg-type]
    assert learnt(model, batch) == set(parts)
    assert {model.part_of(name) for name in model.trainable()} == set(parts)
    model.set_trained_parts(("language", "merger", "vision"))
    assert learnt(model, batch) == {"language", "merger", "vision"}


def test_nothing_but_the_adapter_learns_and_all_of_it_is_fp32(model: AdaptedBase) -> None:
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == model.trainable().keys()
    assert all(parameter.dtype == torch.float32 for parameter in model.trainable().values())


def test_a_part_that_does_not_learn_still_acts_and_without_dropout(base: BaseModel) -> None:
    model = adapt(base, dropout=0.5)
    randomise(model)
    model.set_trained_parts(["merger"])
    model.train()
    batch = batch_of(base, texts())
    with model.disabled():
        without = float(model(batch).total)
    first, second = float(model(batch).total), float(model(batch).total)
    assert first == second != without
    model.detach()


def test_activation_checkpointing_changes_no_gradient(base: BaseModel) -> None:
    batch = batch_of(base, [*pictured(2), *texts()])
    found = []
    for is_checkpointed in (False, True):
        model = adapt(base, activation_checkpointing=is_checkpointed).train()
        randomise(model)
        calls: list[None] = []
        layer = model.base.module.model.language_model.layers[0]
        handle = layer.input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        model(batch).total.backward()
        handle.remove()
        assert len(calls) == (2 if is_checkpointed else 1)
        found.append([parameter.grad for parameter in model.trainable().values()])
        model.detach()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_skill_is_learnt_in_a_few_steps(base: BaseModel) -> None:
    model = adapt(base, preset=("language",), r=8).train()
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=3e-3)
    batch = batch_of(base, [row("Who are you?", "Zyx!"), *pictured(1)])
    losses = []
    for _ in range(12):
        loss = model(batch)
        (loss.total / loss.num_labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach()) / loss.num_labels)
    assert losses[-1] < losses[0] / 4
    model.detach()


def test_batches_that_cannot_be_learnt_are_refused(base: BaseModel, model: AdaptedBase) -> None:
    batch = batch_of(base, pictured(1))
    with pytest.raises(ValueError, match="no label in the batch of rows:1"):
        model(replace(batch, labels=torch.full_like(batch.labels, IGNORED)))
    with pytest.raises(ValueError, match="begins with a label"):
        model(replace(batch, labels=batch.ids))
    with pytest.raises(ValueError, match=r"positions are \[3, T\]"):
        model(replace(batch, positions=batch.positions[0]))
    with pytest.raises(ValueError, match="image tokens for pictures of"):
        model(replace(batch, pixels=batch.pixels[:0], grids=(), digests=()))


def test_the_same_seed_gives_the_same_adapter(base: BaseModel) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.rand(3)
        made = adapt(base, seed=seed)
        states.append(made.state())
        made.detach()
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_kept_pictures_change_no_bit_of_losses_and_gradients(base: BaseModel) -> None:
    labeller = Labeller(base.processor)
    examples = Examples(pictured(2), labeller)
    collate = Collator(labeller)
    found = []
    for mib in (0, 64):
        for parts in (("language",), ("merger", "language")):
            model = adapt(base, vision_cache_mib=mib).train()
            randomise(model)
            model.set_trained_parts(parts)  # type: ignore[arg-type]
            for drawn in ((0, 1), (1, 0)):
                loss = model(collate([examples[i] for i in drawn]))
                loss.total.backward()
            found.append([loss.total, *(p.grad for p in model.trainable().values())])
            model.detach()
    for without, with_store in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(without, with_store, strict=True))


def test_precision_is_what_the_recipe_says() -> None:
    assert training_dtype(Recipe(precision="bf16"), "cpu") == "bfloat16"
    assert training_dtype(Recipe(precision="fp32"), "cpu") == "float32"
