"""DequantiseAhead: 16-bit copies of 4-bit weights for products of many rows, the next made behind this one's product.

Owns two buffers as large as the largest weight, taken in turn, and a stream of its own. A copy is valid until the
second ``take`` after it. On a CPU copies are made when they are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from base.ops import nf4, nf4_ops
from base.ops.nf4 import Nf4Weight


class DequantiseAhead:
    """One thread's, on one compute stream. ``weights`` in the order in which a forward uses them; others work too."""

    def __init__(self, weights: Sequence[Nf4Weight], dtype: torch.dtype) -> None:
        size = max(weight.num_in * weight.num_out for weight in weights)
        device = weights[0].codes.device
        self._buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        self._held: list[Nf4Weight | None] = [None, None]
        self._latest = 0
        self._after = {id(one): other for one, other in pairwise(weights)}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready = [torch.cuda.Event() for _ in range(2)] if self._stream is not None else []

    @property
    def buffers(self) -> Sequence[Tensor]:
        return tuple(self._buffers)

    def take(self, weight: Nf4Weight) -> Tensor:
        """[N, K] in the dtype, ordered on the current stream; starts on the next weight in order.

        Raises ValueError for a weight larger than all that were announced.
        """
        if weight.num_in * weight.num_out > self._buffers[0].numel():
            raise ValueError(
                f"a weight of [{weight.num_out}, {weight.num_in}] does not fit the shared copies"
            )
        place = next((place for place, held in enumerate(self._held) if held is weight), 1 - self._latest)
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._ready[place])
        if self._held[place] is not weight:
            self._fill(place, weight)
        self._latest = place
        self._start(1 - place, self._after.get(id(weight)))
        return self._view(place, weight)

    def _start(self, place: int, weight: Nf4Weight | None) -> None:
        """Make a copy on the other stream, once all that was asked of this buffer so far is done."""
        if self._stream is None or weight is None or self._held[place] is weight:
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._fill(place, weight)
            self._ready[place].record(self._stream)

    def _fill(self, place: int, weight: Nf4Weight) -> None:
        self._held[place] = weight
        view = self._view(place, weight)
        if view.is_cuda:
            nf4_ops.dequantise(weight, view.dtype, view)
        else:
            view.copy_(nf4.dequantise(weight, view.dtype))

    def _view(self, place: int, weight: Nf4Weight) -> Tensor:
        return self._buffers[place][: weight.num_in * weight.num_out].view(weight.num_out, weight.num_in)
