"""The vision tower computes what transformers' own does, windows of equal size at once."""

from __future__ import annotations

import pytest
import torch

from base.model import BaseModel
from base.windows import lay_out

CPU = torch.device("cpu")
GRIDS = {
    "one group": [(1, 2, 2)],
    "one window": [(1, 8, 8)],
    "whole windows": [(1, 16, 24)],
    "cut windows": [(1, 14, 22)],
    "one row": [(1, 2, 34)],
    "two frames": [(2, 10, 12)],
    "several images": [(1, 14, 22), (1, 8, 8), (1, 16, 16), (1, 14, 22), (1, 2, 6)],
}


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("which", ["tiny_dequantised", "odd_dequantised", "odd_float32"])
def test_embeddings_are_transformers(
    which: str, grids: list[tuple[int, int, int]], request: pytest.FixtureRequest
) -> None:
    base: BaseModel = request.getfixturevalue(which)
    torch.manual_seed(3)
    patch_dim = 3 * 2 * base.spec.patch_size**2
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), patch_dim)
    ours = base.embed_images(pixels, grids)
    assert torch.equal(ours, base.reference_embed_images(pixels, grids))


def test_another_place_of_a_patch_changes_the_embeddings(odd_dequantised: BaseModel) -> None:
    """The control of the test above: it can fail."""
    base = odd_dequantised
    pixels = torch.randn(14 * 22, 3 * 2 * base.spec.patch_size**2)
    assert not torch.equal(base.embed_images(pixels, [(1, 14, 22)]), base.embed_images(pixels, [(1, 22, 14)]))


def test_a_layout_covers_each_group_once_and_keeps_images_apart() -> None:
    layout = lay_out([(1, 14, 22), (2, 8, 6)], merge=2, window=4, device=CPU)
    first = 7 * 11
    assert sorted(layout.order[:first].tolist()) == list(range(first))
    assert sorted(layout.order[first:].tolist()) == list(range(first, first + 2 * 12))
    for spans in (layout.windows, layout.frames):
        rows = torch.cat([span.rows for span in spans if span.rows is not None])
        assert sorted(rows.tolist()) == list(range(14 * 22 + 2 * 48))
    assert {span.length for span in layout.windows} == {64, 48, 36} | {4 * 4 * 3}
    assert [span.length for span in layout.frames] == [48, 308]


def test_equal_windows_need_no_gathering() -> None:
    layout = lay_out([(1, 16, 16), (1, 16, 16)], merge=2, window=4, device=CPU)
    assert [(span.rows, span.length) for span in layout.windows] == [(None, 64)]
    assert [(span.rows, span.length) for span in layout.frames] == [(None, 256)]
