"""Our positions are transformers' own, for prompts of every make-up."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from base.errors import InvalidImageCount
from base.model import BaseModel
from base.positions import mrope_positions
from base.prompt import Grid

IMAGE = 9
TEXT = [1, 2, 3]
TABLE: dict[str, tuple[list[int | Grid], list[Grid]]] = {
    "text only": ([*TEXT], []),
    "one token": ([1], []),
    "one image": ([*TEXT, (1, 4, 6), *TEXT], [(1, 4, 6)]),
    "image first": ([(1, 4, 4), 1], [(1, 4, 4)]),
    "image last": ([1, (1, 8, 2)], [(1, 8, 2)]),
    "image alone": ([(1, 2, 2)], [(1, 2, 2)]),
    "several images": (
        [1, (1, 4, 6), 5, (1, 2, 10), 7, 7, (1, 6, 6), *TEXT],
        [(1, 4, 6), (1, 2, 10), (1, 6, 6)],
    ),
    "odd merged grids": ([1, (1, 6, 10), 5, (1, 14, 2), 1], [(1, 6, 10), (1, 14, 2)]),
    "equal images": ([1, (1, 4, 4), 2, (1, 4, 4), 3], [(1, 4, 4), (1, 4, 4)]),
}


def ids_of(items: list[int | Grid]) -> list[int]:
    return [
        token
        for item in items
        for token in ([item] if isinstance(item, int) else [IMAGE] * (item[0] * item[1] * item[2] // 4))
    ]


def theirs(
    module: Qwen2_5_VLForConditionalGeneration, ids: list[int], grids: list[Grid]
) -> tuple[torch.Tensor, int]:
    tensor = torch.tensor([ids])
    positions, delta = module.model.get_rope_index(
        tensor,
        mm_token_type_ids=(tensor == IMAGE).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
    return positions[:, 0], int(delta)


@pytest.mark.parametrize("name", TABLE)
def test_positions_and_delta_equal_transformers(tiny: BaseModel, name: str) -> None:
    items, grids = TABLE[name]
    ids = ids_of(items)
    positions, delta = mrope_positions(ids, IMAGE, grids, 2)
    expected, expected_delta = theirs(tiny.module, ids, grids)
    assert torch.equal(positions, expected)
    assert positions.dtype == torch.int64
    assert delta == expected_delta


def test_images_without_text_between_them_are_told_apart() -> None:
    # transformers takes such a run for one image; nothing in a chat template makes one, but ids may
    positions, delta = mrope_positions([1, *[IMAGE] * 8, 2], IMAGE, [(1, 4, 4), (1, 4, 4)], 2)
    assert positions[1].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert positions[0].tolist() == [0, 1, 1, 1, 1, 3, 3, 3, 3, 5]
    assert delta == 6 - 10


@pytest.mark.parametrize(
    "ids, grids",
    [([1, IMAGE], []), ([1, 2], [(1, 2, 2)]), ([IMAGE] * 3, [(1, 4, 4)]), ([IMAGE] * 5, [(1, 4, 4)])],
)
def test_placeholders_that_do_not_fit_the_images_are_refused(ids: list[int], grids: list[Grid]) -> None:
    with pytest.raises(InvalidImageCount):
        mrope_positions(ids, IMAGE, grids, 2)
