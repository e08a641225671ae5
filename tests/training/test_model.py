"""AdaptedBase: what it computes, what learns, and that the base is what it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.registry import Registry
from adapters.sites import discover_sites
from adapters.validation import Limits
from base.config import BaseConfig
from base.loader import load_base
from base.model import BaseModel
from base.prompt import Message, PromptInputs, TextPart
from engine.offline import OfflineEngine
from tests.training.learnable import adapt, base_state, batch_of, make_base, pictured, randomise, texts
from training.data.formats import Conversation
from training.data.labels import Labeller
from training.model.loading import FrozenLinear
from training.model.model import AdaptedBase
from training.recipe.recipe import PartRecipe


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return make_base()


@pytest.fixture(scope="module")
def bf16() -> BaseModel:
    return load_base(BaseConfig(cpu_linear="unpacked", device="cpu"))


@pytest.fixture
def model(base: BaseModel) -> Iterator[AdaptedBase]:
    made = adapt(base)
    yield made
    made.detach()


@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"rslora": True, "dropout": 0.1}], ids=str)
def test_the_first_losses_are_the_bases_to_the_bit(base: BaseModel, fields: dict[str, object]) -> None:
    model = adapt(base, **fields)
    batch = batch_of(base, [*pictured(3), *texts()])
    with model.disabled():
        without = model.label_losses(batch)
    assert torch.equal(model.label_losses(batch), without)
    model.detach()


def test_a_packed_batch_loses_what_its_rows_lose_alone(base: BaseModel, model: AdaptedBase) -> None:
    rows = [*pictured(3), *texts()]
    together = model(batch_of(base, rows))
    alone = [model(batch_of(base, [row])) for row in rows]
    assert together.num_labels == sum(loss.num_labels for loss in alone)
    torch.testing.assert_close(together.total, sum(loss.total for loss in alone), rtol=1e-5, atol=0)


def test_the_base_is_bitwise_what_it_was_after_learning_serving_and_detaching(
    base: BaseModel, tmp_path: Path
) -> None:
    before, attention = base_state(base), attention_of(base)
    model = adapt(base, activation_checkpointing=True).train()
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.01)
    batch = batch_of(base, pictured(2))
    losses = []
    for _ in range(2):
        loss = model(batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.total.detach()))
        serve(model, tmp_path)
    assert losses[1] != losses[0]
    assert attention_of(base) != attention
    model.detach()
    model.detach()
    after = base_state(base)
    assert attention_of(base) == attention
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in base.module.parameters())
    assert not any(getattr(child, "gradient_checkpointing", False) for child in base.module.modules())
    assert not hasattr(base.module, "peft_config")
    with pytest.raises(RuntimeError, match="off this base"):
        model(batch)


def attention_of(base: BaseModel) -> str:
    return str(base.module.model.language_model.config._attn_implementation)


def serve(model: AdaptedBase, folder: Path) -> tuple[int, ...]:
    """The adapter's answer as served in the middle of training."""
    model.save(folder)
    prompt = model.base.processor.prepare_chat([Message("user", (TextPart("Who are you?"),))])
    with model.bare():
        assert isinstance(model.base.module.model.language_model.layers[0].mlp.up_proj, FrozenLinear)
        engine = OfflineEngine(model.base)
        [answer] = engine.generate([prompt], folder, max_tokens=4)
        engine.close()
    return answer


def test_serving_in_the_middle_of_training_changes_no_loss_and_no_gradient(
    base: BaseModel, model: AdaptedBase, tmp_path: Path
) -> None:
    randomise(model)
    model.set_trained_parts(["merger"])
    model.train()
    batch = batch_of(base, pictured(2))
    found = []
    for is_served in (False, True):
        if is_served:
            serve(model, tmp_path)
        model.zero_grad()
        loss = model(batch).total
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.trainable().values() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert model.learning == {"merger"}
    assert model.training


def test_an_engine_left_on_the_bare_base_is_reported(base: BaseModel, tmp_path: Path) -> None:
    model = adapt(base)
    randomise(model)
    model.save(tmp_path)
    prompt = base.processor.prepare_text("Who")
    engine = OfflineEngine(base)
    with pytest.raises(RuntimeError, match="still wrapped by a serving engine"), model.bare():
        engine.last_logits(prompt, tmp_path)
    engine.close()
    with pytest.raises(RuntimeError, match="off this base"):
        model(batch_of(base, texts()))
    model.detach()
    assert not hasattr(base.module, "peft_config")


def test_disabled_is_the_base_and_leaves_what_learns_as_it_was(base: BaseModel, model: AdaptedBase) -> None:
    batch = batch_of(base, pictured(2))
    plain = model.label_losses(batch)
    randomise(model)
    model.set_trained_parts(["language"])
    learning = set(model.trainable())
    changed = model.label_losses(batch)
    with model.disabled():
        assert torch.equal(model.label_losses(batch), plain)
    assert not torch.equal(changed, plain)
    assert torch.equal(model.label_losses(batch), changed)
    assert set(model.trainable()) == learning


def test_a_second_adapter_on_the_same_base_is_refused(base: BaseModel, model: AdaptedBase) -> None:
    with pytest.raises(ValueError, match="wrapped already"):
        adapt(base)


def test_weights_of_another_adapter_are_refused(base: BaseModel, model: AdaptedBase) -> None:
    state = model.state()
    with pytest.raises(ValueError, match="another adapter: 1 tensors differ"):
        model.load_state({**state, "extra": torch.zeros(1)})
    name = next(iter(state))
    with pytest.raises(ValueError, match="another adapter"):
        model.load_state({**state, name: state[name][:1]})


@pytest.mark.parametrize(
    "fields",
    [{"alpha": 12.0}, {"dora": True}, {"rslora": True, "merger": PartRecipe(r=16, alpha=6.0)}],
    ids=["lora", "dora", "rslora, ranks by part"],
)
def test_logits_are_those_of_the_engine_with_the_saved_package_to_the_bit(
    bf16: BaseModel, tmp_path: Path, fields: dict[str, object]
) -> None:
    """On the base that serves, in bf16; one prompt, since the engine too sees it alone. The ranks are those that the
    server does not pad: a padded product may round otherwise."""
    model = adapt(bf16, **{"r": 8, **fields})
    randomise(model)
    model.save(tmp_path)
    rows = [*pictured(1), *texts()[:1]]
    ours = [model.logits(batch_of(bf16, [each]))[-1] for each in rows]
    with model.disabled():
        without = [model.logits(batch_of(bf16, [each]))[-1] for each in rows]
    with model.bare():
        engine = OfflineEngine(
            bf16, cpu_adapters="torch"
        )  # the compiled kernel sums in another order than PEFT
        for each, trained, untrained in zip(rows, ours, without, strict=True):
            assert torch.equal(trained, engine.last_logits(prompt_of(bf16, each), tmp_path))
            assert torch.equal(untrained, engine.last_logits(prompt_of(bf16, each), None))
            assert not torch.equal(trained, untrained)
        engine.close()
    model.detach()


def prompt_of(base: BaseModel, row: Conversation) -> PromptInputs:
    """The whole sequence as a prompt."""
    [example] = Labeller(base.processor).examples(row)
    return PromptInputs(tuple(example.ids.tolist()), example.images, example.positions, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_saved_folder_is_one_that_our_server_takes(
    base: BaseModel, model: AdaptedBase, tmp_path: Path, dtype: torch.dtype
) -> None:
    randomise(model)
    model.save(tmp_path, dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    registry = Registry(tmp_path / "state", discover_sites(base.module), Limits(), [base.spec.name])
    registry.register("trained", tmp_path)
    registry.close()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.spec.name
    assert config["inference_mode"]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    state = model.state()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name].to(dtype)) for name in state)
