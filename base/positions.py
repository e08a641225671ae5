"""Multimodal rotary positions of one prompt. Pure: no model, no shared state.

Text advances all three axes (time, height, width) together; an image lays its merged grid over height and width,
and the text after it goes on from the largest position used. Formula of ``Qwen2_5_VLModel.get_rope_index``
(transformers 5.23), with which a test compares this.

Place in a request's way: step 3, called by the processor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from base.errors import InvalidImageCount
from base.prompt import Grid


def mrope_positions(
    ids: Sequence[int], image_token_id: int, grids: Sequence[Grid], merge_size: int
) -> tuple[Tensor, int]:
    """Positions [3, T] int64 of ``ids`` (T), and the delta that continues them.

    ``grids`` holds each image's patches in order of appearance; its tokens are consecutive ``image_token_id``.
    Raises InvalidImageCount when placeholders and grids do not match.
    """
    pieces: list[Tensor] = []
    start, index = 0, 0  # the next position; the next id
    for number, grid in enumerate(grids):
        begin = _find(ids, image_token_id, index)
        t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
        num_tokens = t * h * w
        if begin is None or list(ids[begin : begin + num_tokens]) != [image_token_id] * num_tokens:
            raise InvalidImageCount(number, len(grids))
        pieces.append(_text_positions(start, begin - index))
        start += begin - index
        pieces.append(_image_positions(start, (t, h, w)))
        start += max(h, w)
        index = begin + num_tokens
    if _find(ids, image_token_id, index) is not None:
        raise InvalidImageCount(len(grids) + 1, len(grids))
    pieces.append(_text_positions(start, len(ids) - index))
    positions = torch.cat(pieces, dim=1)
    delta = int(positions.max()) + 1 - len(ids) if len(ids) else 0
    return positions, delta


def _find(ids: Sequence[int], token_id: int, start: int) -> int | None:
    return next((i for i in range(start, len(ids)) if ids[i] == token_id), None)


def _text_positions(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length).expand(3, length)


def _image_positions(start: int, grid: Grid) -> Tensor:
    """[3, t*h*w] of a merged grid. Still images: the time axis counts whole steps of one."""
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    return torch.stack(axes).reshape(3, -1) + start
