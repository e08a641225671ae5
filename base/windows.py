"""Windows: which patches of a call's images attend to each other, and where each patch is. Pure; integers only.

The vision tower lays an image's patches out window by window (112 pixels, 8 x 8 patches; cut short at an edge); most
blocks attend within a window, a few within the whole image. Patches come from the processor in groups of
``merge`` x ``merge``, which stay together.

Place in a request's way: step 8, before the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base.prompt import Grid


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """N runs of rows, all of the same length, that attend each to itself."""

    rows: Tensor | None  # [N * length] int64; None: all rows of the call, in order
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """P patches of a call, M = P / merge**2 groups. Images stay in order, each over rows of its own."""

    order: Tensor  # [M] int64: the group that lies at each place
    positions: Tensor  # [2, P] int64: height and width of the patch at each place
    windows: tuple[Spans, ...]  # by length
    frames: tuple[Spans, ...]  # whole images (frames of videos), by length


def lay_out(grids: Sequence[Grid], merge: int, window: int, device: torch.device) -> Windows:
    """Windows of ``window`` groups a side for images of ``grids`` (frames, height and width in patches)."""
    orders: list[Tensor] = []
    positions: list[Tensor] = []
    window_lengths: list[int] = []
    frame_lengths: list[int] = []
    num_groups = 0
    for frames, height, width in grids:
        order, lengths = _window_order(frames, height // merge, width // merge, window)
        orders.append(order + num_groups)
        positions.append(
            _positions(frames, height, width, merge).unflatten(1, (-1, merge**2))[:, order].flatten(1)
        )
        window_lengths += [length * merge**2 for length in lengths]
        frame_lengths += [height * width] * frames
        num_groups += order.numel()
    return Windows(
        order=torch.cat(orders).to(device),
        positions=torch.cat(positions, dim=1).to(device),
        windows=_spans(window_lengths, device),
        frames=_spans(frame_lengths, device),
    )


def _window_order(frames: int, height: int, width: int, window: int) -> tuple[Tensor, list[int]]:
    """Groups of one image, window by window, and the number of groups in each window."""
    rows, columns = torch.arange(height) // window, torch.arange(width) // window
    num_columns = -(-width // window)
    of_frame = rows.unsqueeze(1) * num_columns + columns  # [height, width]
    num_windows = -(-height // window) * num_columns
    owner = (torch.arange(frames).view(-1, 1, 1) * num_windows + of_frame).flatten()
    return torch.argsort(owner, stable=True), torch.bincount(owner).tolist()


def _positions(frames: int, height: int, width: int, merge: int) -> Tensor:
    """[2, P] in the processor's order: group by group, and row by row within a group."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([rows, columns]).view(2, height // merge, merge, width // merge, merge)
    return grid.transpose(2, 3).flatten(1).repeat(1, frames)


def _spans(lengths: Sequence[int], device: torch.device) -> tuple[Spans, ...]:
    """Runs laid end to end, gathered by length."""
    if len(set(lengths)) == 1:
        return (Spans(None, lengths[0]),)
    starts: dict[int, list[int]] = {}
    begin = 0
    for length in lengths:
        starts.setdefault(length, []).append(begin)
        begin += length
    return tuple(
        Spans((torch.tensor(begins).unsqueeze(1) + torch.arange(length)).flatten().to(device), length)
        for length, begins in sorted(starts.items())
    )
