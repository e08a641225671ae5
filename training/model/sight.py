"""Sight: a batch's pictures to the embeddings that stand at its image tokens, with no more graph than what learns.

Three cases. Nothing in the visual module learns: no graph, and each picture is computed once a run. The merger alone
learns: the tower before it has no graph and is computed once a picture. The tower learns: everything under grad.

A frozen tower sees one picture at a time, kept or not, so that keeping changes no bit. Owns: these cases. Does not
know: tokens, losses. Place in a training run: first thing of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from base.model import BaseModel
from base.prompt import Grid
from training.model.vision_store import VisionStore
from training.recipe.recipe import Part


class Sight:
    """The visual module of one base, adapters and all."""

    def __init__(self, base: BaseModel, max_store_bytes: int) -> None:
        self._base = base
        self.store: Final = VisionStore(max_store_bytes)

    def embed(
        self,
        pixels: Tensor,  # [P, patch_dim]
        grids: Sequence[Grid],
        digests: Sequence[str],
        learning: Collection[Part],
        variant: str,
    ) -> Tensor:
        """[sum of image tokens, H] in the base's dtype; ``variant`` names the adapter's state, which is part of what
        an entry of the store came from."""
        if "vision" in learning:
            return self._whole(pixels, grids)
        if "merger" in learning:
            towers = self._each(pixels, grids, digests, f"{variant} tower", self._tower)
            merged: Tensor = self._base.module.model.visual.merger(towers)
            return merged
        return self._each(pixels, grids, digests, f"{variant} merged", self._whole)

    def _each(
        self,
        pixels: Tensor,
        grids: Sequence[Grid],
        digests: Sequence[str],
        kind: str,
        compute: Callable[[Tensor, Sequence[Grid]], Tensor],
    ) -> Tensor:
        """Picture by picture, from the store where it is there; no graph."""
        sizes = [t * h * w for t, h, w in grids]
        found = []
        with torch.no_grad():
            for piece, grid, digest in zip(pixels.split(sizes), grids, digests, strict=True):
                kept = self.store.get((kind, digest), pixels.device)
                if kept is None:
                    kept = compute(piece, [grid])
                    self.store.put((kind, digest), kept)
                found.append(kept)
            return torch.cat(found)

    def _whole(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tower and merger: [tokens, H]."""
        visual = self._base.module.model.visual
        grid_thw = torch.tensor(grids, dtype=torch.int64, device=pixels.device).reshape(-1, 3)
        embeds: Tensor = visual(pixels.to(self._base.dtype), grid_thw=grid_thw).pooler_output
        return embeds

    def _tower(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """What the merger is given, in the order of the image tokens: [tokens * merge_size**2, vision width].

        The tower works in windows, and the merger's rows are put in order behind it. A hook catches the merger's input
        and answers with row numbers; so what comes back is that order, however this transformers computes it.
        """
        inputs: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs.append(args[0])
            return torch.arange(output.shape[0], device=output.device).unsqueeze(1)

        merger = self._base.module.model.visual.merger
        was_training = merger.training
        merger.eval()  # its output is thrown away: a dropout drawn for it would shift what the step draws
        handle = merger.register_forward_hook(catch)
        try:
            order = self._whole(pixels, grids).squeeze(1)
        finally:
            handle.remove()
            merger.train(was_training)
        groups = inputs[0].reshape(order.shape[0], -1, inputs[0].shape[-1])
        return groups[order].flatten(0, 1)
