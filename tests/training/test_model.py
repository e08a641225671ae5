"""AdaptedBase: what it computes, what learns, and that the base is what it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from base.model import BaseModel
from tests.training.learnable import base_state, batch_of, make_base, pictured, texts
from training.model import AdaptedBase
from training.recipe import Recipe
from training.targets import resolve_targets


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return make_base()


def adapt(base: BaseModel, **fields: object) -> AdaptedBase:
    recipe = Recipe(**{"preset": ("all",), "r": 4, "dropout": 0.0, **fields})  # type: ignore[arg-type]
    return AdaptedBase(base, resolve_targets(recipe, base.module), recipe)


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


def test_the_base_is_bitwise_what_it_was_after_learning_and_detaching(base: BaseModel) -> None:
    before = base_state(base)
    model = adapt(base, activation_checkpointing=True).train()
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1)
    batch = batch_of(base, pictured(2))
    losses = []
    for _ in range(2):
        loss = model(batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.total))
    assert losses[1] != losses[0]
    model.detach()
    after = base_state(base)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
