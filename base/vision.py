"""VisionTower: images to language embeddings, with the weights of transformers' modules.

It computes what ``Qwen2_5_VisionTransformerPretrainedModel.forward`` does, with the same roundings, but attends to all
windows of equal size in one call; transformers' loop has one for each (64 for a picture of 1024 x 768, in 28 of 32
blocks). The original stays as the reference: ``BaseModel.reference_embed_images``.

Owns: the order of operations. Linears are looked up at each call, so adapters may be attached and detached around them.
An image's rows do not depend on the other images of the call: a window, like an image, is a batch entry of its own.

Place in a request's way: step 8, under the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from base.children import child
from base.merged_linear import Projection
from base.norm import Norm
from base.prompt import Grid
from base.windows import Spans, lay_out

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel


class VisionBlock:
    """One block's modules."""

    def __init__(self, module: nn.Module, num_heads: int) -> None:
        self._attention = module.get_submodule("attn")._modules
        self._mlp = module.get_submodule("mlp")._modules
        self._gate_up = Projection(module.get_submodule("mlp"), "gate_up_proj")
        self._norm_before_attention = Norm(module.get_submodule("norm1"))
        self._norm_before_mlp = Norm(module.get_submodule("norm2"))
        self._num_heads = num_heads

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, spans: Sequence[Spans]) -> Tensor:
        """hidden [P, H], cos and sin [P, 1, D] float32 -> a new [P, H]."""
        hidden = self._attend(self._norm_before_attention(hidden), cos, sin, spans).add_(hidden)
        gate, up = self._gate_up(self._norm_before_mlp(hidden))
        return child(self._mlp, "down_proj")(child(self._mlp, "act_fn")(gate).mul_(up)).add_(hidden)

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, spans: Sequence[Spans]) -> Tensor:
        heads = child(self._attention, "qkv")(x).view(x.shape[0], 3, self._num_heads, -1)
        heads[:, :2] = _rotate(heads[:, :2], cos, sin)
        attended = _attend_spans(heads, spans)
        return child(self._attention, "proj")(attended.flatten(1))


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[P, 2, heads, D], turned in float32 as transformers does; cos and sin [P, 1, 1, D]."""
    wide = heads.float()
    half = wide.shape[-1] // 2
    turned = torch.cat([-wide[..., half:], wide[..., :half]], dim=-1)
    return (wide * cos + turned * sin).to(heads.dtype)


def _attend_spans(heads: Tensor, spans: Sequence[Spans]) -> Tensor:
    """heads [P, 3, heads, D], queries, keys and values -> [P, heads, D]; each span attends to itself."""
    if len(spans) == 1 and spans[0].rows is None:
        return _attend_equal(heads, spans[0].length)
    output = torch.empty_like(heads[:, 0])
    for span in spans:
        if span.rows is None:
            raise ValueError("spans of all rows are not alone")
        output.index_copy_(0, span.rows, _attend_equal(heads.index_select(0, span.rows), span.length))
    return output


def _attend_equal(heads: Tensor, length: int) -> Tensor:
    """heads [N * length, 3, heads, D] -> [N * length, heads, D]."""
    query, key, value = heads.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)  # each [N, heads, length, D]
    attended = functional.scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).flatten(0, 1)


class VisionTower:
    """All blocks and the merger."""

    def __init__(self, visual: Qwen2_5_VisionTransformerPretrainedModel) -> None:
        settings = visual.config
        if not isinstance(settings.patch_size, int):
            raise TypeError(f"the vision tower's patches are {settings.patch_size}, which are no squares")
        self._visual = visual
        self._blocks = [VisionBlock(block, settings.num_heads) for block in visual.blocks]
        self._full_attention = frozenset(settings.fullatt_block_indexes)
        self._merge = settings.spatial_merge_size
        self._window = settings.window_size // settings.patch_size // settings.spatial_merge_size
        self._merger_norm = Norm(visual.merger.ln_q)

    def forward(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """pixels [P, patch_dim], one grid each -> [P / merge**2, H] in the images' order."""
        layout = lay_out(grids, self._merge, self._window, pixels.device)
        unit = self._merge**2
        patches: Tensor = self._visual.patch_embed(pixels)
        hidden = patches.unflatten(0, (-1, unit)).index_select(0, layout.order).flatten(0, 1)
        cos, sin = self._rotary(layout.positions)
        for index, block in enumerate(self._blocks):
            spans = layout.frames if index in self._full_attention else layout.windows
            hidden = block(hidden, cos, sin, spans)
        merged: Tensor = self._visual.merger.mlp(self._merger_norm(hidden).view(hidden.shape[0] // unit, -1))
        return torch.empty_like(merged).index_copy_(0, layout.order, merged)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [2, P] -> cos and sin [P, 1, 1, D] float32: heights, widths, and both again."""
        frequencies = self._visual.rotary_pos_emb.inv_freq.to(positions.device, torch.float32)
        angles = (positions.unsqueeze(-1).float() * frequencies).transpose(0, 1).flatten(1)  # [P, D / 2]
        doubled = torch.cat([angles, angles], dim=-1)[:, None, None, :]
        return doubled.cos(), doubled.sin()
