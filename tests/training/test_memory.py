"""What a step may not spend: each measure of the design shown on shapes, dtypes or graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from tests.training.learnable import adapt, batch_of, make_base, pictured, randomise, row, texts
from training.model.batch import Batch
from training.model.head import HEAD_ROWS
from training.model.model import AdaptedBase
from training.model.vision_store import VisionStore


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return make_base()


@pytest.fixture
def model(base: BaseModel) -> Iterator[AdaptedBase]:
    made = adapt(base).train()
    yield made
    made.detach()


class Shapes:
    """Rows that went into a module, call by call."""

    def __init__(self, module: nn.Module) -> None:
        self.rows: list[int] = []
        self._handle = module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.rows.append(args[0].shape[0])

    def remove(self) -> None:
        self._handle.remove()


def test_the_head_runs_on_the_rows_that_predict_a_label_and_on_no_other(
    base: BaseModel, model: AdaptedBase
) -> None:
    batch = batch_of(base, [*pictured(2), *texts()])
    shapes = Shapes(base.module.lm_head)
    loss = model(batch)
    loss.total.backward()
    shapes.remove()
    assert shapes.rows == [batch.num_labels] == [loss.num_labels]
    assert batch.num_labels < batch.num_tokens / 2


def test_many_labels_go_through_the_head_in_pieces_with_the_same_loss_and_gradient(
    base: BaseModel, model: AdaptedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    randomise(model)
    batch = batch_of(base, [row("Tell me.", "A long story of the sea. " * 60)])
    assert HEAD_ROWS < batch.num_labels < 3 * HEAD_ROWS
    shapes = Shapes(base.module.lm_head)
    found = [_loss_and_gradients(model, batch)]
    assert max(shapes.rows) == HEAD_ROWS
    assert sum(shapes.rows) == 2 * batch.num_labels  # once forward, once again for the gradient
    shapes.rows.clear()
    monkeypatch.setattr("training.model.head.HEAD_ROWS", 1 << 20)
    found.append(_loss_and_gradients(model, batch))
    assert shapes.rows == [batch.num_labels]
    shapes.remove()
    for piecewise, at_once in zip(*found, strict=True):
        torch.testing.assert_close(piecewise, at_once, rtol=1e-4, atol=1e-5)


def _loss_and_gradients(model: AdaptedBase, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    loss = model(batch).total
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.trainable().values() if p.grad is not None)]


@pytest.mark.parametrize("fields", [{}, {"dora": True, "activation_checkpointing": True}], ids=str)
def test_nothing_of_the_base_is_upcast(fields: dict[str, object]) -> None:
    """On the bf16 base, whose 4-bit linears stay in 4 bits."""
    base = load_base(BaseConfig(cpu_linear="unpacked", device="cpu"))
    before = {name: (p.dtype, p.data_ptr()) for name, p in base.module.named_parameters()}
    linears = [child for child in base.module.modules() if isinstance(child, Linear4bit)]
    model = adapt(base, **fields).train()
    model(batch_of(base, pictured(1))).total.backward()
    after = {
        name.removeprefix("peft.base_model.model.").replace(".base_layer", ""): (p.dtype, p.data_ptr())
        for name, p in model.named_parameters()
        if ".lora_" not in name
    }
    assert after == before
    assert {dtype for dtype, _ in before.values()} == {torch.bfloat16, torch.uint8}
    assert len(linears) == 28
    assert all(linear.weight.dtype == torch.uint8 for linear in linears)
    model.detach()


def graph_flags(model: AdaptedBase, batch: Batch) -> tuple[bool, bool]:
    """Whether the tower's last block, and the merger, gave an output with a graph."""
    visual = model.base.module.model.visual
    flags: list[list[bool]] = [[], []]
    handles = [
        visual.blocks[-1].mlp.register_forward_hook(lambda *a: flags[0].append(a[2].requires_grad)),
        visual.merger.mlp.register_forward_hook(lambda *a: flags[1].append(a[2].requires_grad)),
    ]
    model(batch).total.backward()
    for handle in handles:
        handle.remove()
    return any(flags[0]), any(flags[1])


def test_a_tower_that_does_not_learn_has_no_graph_even_where_the_adapter_sits_on_it(
    base: BaseModel, model: AdaptedBase
) -> None:
    batch = batch_of(base, pictured(2))
    model.set_trained_parts(["language"])
    assert graph_flags(model, batch) == (False, False)
    model.set_trained_parts(["merger", "language"])
    assert graph_flags(model, batch) == (False, True)
    model.set_trained_parts(["vision"])
    assert graph_flags(model, batch) == (True, True)


def test_a_frozen_tower_computes_each_picture_once(base: BaseModel, model: AdaptedBase) -> None:
    batch = batch_of(base, pictured(3))
    patch_embed = Shapes(base.module.model.visual.patch_embed)
    for parts, num_calls in ((["language"], 3), (["merger"], 3), (["vision"], 2)):
        model.set_trained_parts(parts)  # type: ignore[arg-type]
        for _ in range(2):
            model(batch)
        assert len(patch_embed.rows) == num_calls, parts
        patch_embed.rows.clear()
    patch_embed.remove()


def test_a_store_that_is_full_lets_the_least_recently_used_go(base: BaseModel) -> None:
    store = VisionStore(max_bytes=100)
    for key in "ab":
        store.put(key, torch.zeros(10))
    assert store.get("a", torch.device("cpu")) is not None
    store.put("c", torch.zeros(10))
    assert store.get("b", torch.device("cpu")) is None
    assert store.get("a", torch.device("cpu")) is not None
    assert (len(store), store.num_bytes) == (2, 80)
    store.put("whole", torch.zeros(26))
    assert (len(store), store.num_bytes) == (2, 80)
    store.clear()
    assert (len(store), store.num_bytes) == (0, 0)


def test_augmented_pictures_are_not_kept(base: BaseModel) -> None:
    model = adapt(base, preset=("language",), augment="ocr").train()
    patch_embed = Shapes(base.module.model.visual.patch_embed)
    batch = batch_of(base, pictured(1))
    for _ in range(2):
        model(batch)
    patch_embed.remove()
    assert len(patch_embed.rows) == 2
    model.detach()


def test_what_a_store_keeps_is_forgotten_when_the_weights_behind_it_change(
    base: BaseModel, model: AdaptedBase
) -> None:
    batch = batch_of(base, pictured(1))
    model.set_trained_parts(["language"])
    before = model(batch).total.detach()
    state = model.state()
    changed = {name: tensor + 0.05 if "visual" in name else tensor for name, tensor in state.items()}
    model.load_state(changed)
    assert not torch.equal(model(batch).total.detach(), before)
    model.load_state(state)
    assert torch.equal(model(batch).total.detach(), before)
