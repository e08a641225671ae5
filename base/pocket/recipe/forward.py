"""The model's forward pass for a training batch: transformers' own modules, batched over pictures of one grid.

Owns: the arithmetic of one training step. Vision blocks run on [P, N, D] with a mask for the windows, instead of one
attention call per window; the language model runs on rows with positions and visibility given. A test holds both
equal to transformers' forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
    Qwen2_5_VLVisionBlock,
)

from base.pocket.recipe.pixels import MERGE
from base.pocket.recipe.rows import IGNORED, TEXT, Batch

WINDOW = 2  # merged tokens along a window's side: 56 / 14 / 2


@dataclass(frozen=True, slots=True)
class Output:
    """What one pass gives."""

    logits: Tensor  # [K, V] at the K labelled tokens
    labels: Tensor  # [K] int64
    answers: Tensor  # [K] int64
    seen: Tensor  # [P, M, H] picture tokens as the language model receives them
    middle: Tensor  # [B, L, H] the language model's states after its second layer
    late: Tensor  # [B, L, H] and after its third


def see(visual: Qwen2_5_VisionTransformerPretrainedModel, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Picture tokens [P, M, H] of patches [P, N, 1176], N = down * across, M = N / 4."""
    down, across = grid
    weight = visual.patch_embed.proj.weight
    hidden = F.linear(pixels.to(weight.dtype), weight.flatten(1))
    rows, columns = _coordinates(down, across)
    cos, sin = visual.rotary_pos_emb(hidden, torch.stack((rows, columns), dim=1))
    window = (rows // (MERGE * WINDOW)) * across + columns // (MERGE * WINDOW)
    same_window = window[:, None] == window[None, :]
    for index, block in enumerate(cast("list[Qwen2_5_VLVisionBlock]", visual.blocks)):
        mask = None if index in visual.fullatt_block_indexes else same_window
        hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin, mask)
        hidden = hidden + block.mlp(block.norm2(hidden))
    merged: Tensor = visual.merger(hidden)
    return merged.view(len(pixels), down * across // MERGE**2, -1)


def _coordinates(down: int, across: int) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, in merged order: [N], [N]."""
    index = (
        torch.arange(down * across)
        .view(down // MERGE, MERGE, across // MERGE, MERGE)
        .transpose(1, 2)
        .flatten()
    )
    return index // across, index % across


def _attend(
    attention: Qwen2_5_VLVisionAttention, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
) -> Tensor:
    pictures, patches, width = hidden.shape
    qkv = attention.qkv(hidden).view(pictures, patches, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    projected: Tensor = attention.proj(mixed.transpose(1, 2).reshape(pictures, patches, width))
    return projected


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def run(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, seen: Tensor | None = None) -> Output:
    """One pass over a batch; `seen` replaces what the vision tower would see."""
    if seen is None:
        seen = see(model.model.visual, batch.pixels, batch.grid)
    language = model.model.language_model
    embeds = _placed(language.embed_tokens(batch.ids), seen, batch)
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: states.append(out)) for layer in language.layers[1:3]
    ]
    mask = {"full_attention": batch.sees}
    hidden = language(
        inputs_embeds=embeds, position_ids=batch.positions, attention_mask=mask, use_cache=False
    )
    for hook in hooks:
        hook.remove()
    wanted = batch.labels != IGNORED
    logits = model.lm_head(hidden.last_hidden_state[wanted])
    return Output(logits, batch.labels[wanted], batch.answers[wanted], seen, states[0], states[1])


def _placed(embeds: Tensor, seen: Tensor, batch: Batch) -> Tensor:
    """Embeddings with the picture tokens put in their places."""
    rows, columns = (batch.picture != TEXT).nonzero(as_tuple=True)
    return embeds.index_put((rows, columns), seen[rows, batch.picture[rows, columns]].to(embeds.dtype))


def exact(output: Output, num_answers: int) -> Tensor:
    """Which answers are right to the last token: [num_answers] bool. Greedy decoding gives the same."""
    wrong = output.logits.argmax(-1) != output.labels
    misses = torch.zeros(num_answers).index_add_(0, output.answers, wrong.float())
    return misses == 0
