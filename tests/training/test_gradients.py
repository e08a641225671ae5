"""gradient_table: what would learn nothing is named before step 1."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from base.model import BaseModel
from tests.training.learnable import adapt, batch_of, make_base, pictured, texts
from training.model.gradients import DeadModules, gradient_table
from training.model.model import AdaptedBase


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return make_base()


@pytest.fixture
def model(base: BaseModel) -> Iterator[AdaptedBase]:
    made = adapt(base, dropout=0.1).train()
    yield made
    made.detach()


def test_every_part_of_a_fresh_adapter_is_alive(base: BaseModel, model: AdaptedBase) -> None:
    table = gradient_table(model, batch_of(base, pictured(2)))
    table.check()
    assert [row.part for row in table.rows] == ["language", "vision", "merger"]
    assert [row.num_tensors for row in table.rows] == [56, 40, 4]
    assert sum(row.num_parameters for row in table.rows) == model.targets.num_parameters
    assert all(row.norm > 0 and not row.dead for row in table.rows)
    assert table.num_images == 2


def test_a_cut_graph_is_named_module_by_module(base: BaseModel, model: AdaptedBase) -> None:
    merger = base.module.model.visual.merger
    handle = merger.register_forward_hook(lambda *args: args[2].detach())
    table = gradient_table(model, batch_of(base, pictured(2)))
    handle.remove()
    dead = {row.part: row.dead for row in table.rows}
    assert dead["language"] == ()
    assert len(dead["vision"]) == 20
    assert dead["merger"] == ("model.visual.merger.mlp.0", "model.visual.merger.mlp.2")
    with pytest.raises(
        DeadModules, match=r"22 modules of the adapter get no gradient: model\.visual"
    ) as caught:
        table.check()
    assert caught.value.table is table
    assert "and 15 more" in table.text()


def test_text_alone_excuses_what_sees(base: BaseModel, model: AdaptedBase) -> None:
    table = gradient_table(model, batch_of(base, texts()))
    table.check()
    excuses = {row.part: row.excuse for row in table.rows}
    assert excuses == {
        "language": "",
        "vision": "no picture in this batch",
        "merger": "no picture in this batch",
    }
    assert "no picture" in table.text()


def test_only_what_learns_is_judged(base: BaseModel, model: AdaptedBase) -> None:
    model.set_trained_parts(["merger"])
    table = gradient_table(model, batch_of(base, pictured(1)))
    assert [row.part for row in table.rows] == ["merger"]
    table.check()


def test_asking_changes_nothing(base: BaseModel, model: AdaptedBase) -> None:
    batch, before = batch_of(base, pictured(1)), model.state()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    gradient_table(model, batch)
    assert torch.equal(torch.rand(3), expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_table_goes_into_the_record(base: BaseModel, model: AdaptedBase) -> None:
    table = gradient_table(model, batch_of(base, pictured(1)))
    record = json.loads(json.dumps(table.as_json()))
    assert [row["part"] for row in record["rows"]] == ["language", "vision", "merger"]
    assert record["num_labels"] == table.num_labels
    lines = table.text().splitlines()
    assert lines[0].split() == ["part", "tensors", "numbers", "norm", "dead"]
    assert len(lines) == 4
