"""Attention over a packed row while training: several sequences end to end, each causal within itself.

The function is registered with transformers under ``LORIKEET_SEGMENTS`` and reached by every language layer's own
attention module; where sequences begin comes to it as a keyword argument of the forward call, also when a layer is
computed again for its gradient. Each sequence is computed on its own by the very kernel that serves a whole prompt
(`base/attention.py`), so a sequence's numbers do not depend on its neighbours, and there is no mask.

Does not know: caches, adapters, losses. Place in a training run: under the model, at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

LORIKEET_SEGMENTS: Final = "lorikeet_segments"


def register_attention() -> None:
    """Make the function known to transformers. Idempotent."""
    AttentionInterface.register(LORIKEET_SEGMENTS, attend_segments)


def attend_segments(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, T, head_dim]
    key: Tensor,  # [1, num_kv_heads, T, head_dim]
    value: Tensor,  # as key
    attention_mask: Tensor | None,
    *,
    starts: tuple[int, ...],  # S + 1 offsets into T
    scaling: float,
    **_: object,  # transformers passes what other implementations need: dropout, position_ids, sliding_window
) -> tuple[Tensor, None]:
    """One layer's attention over the packed row: [1, T, num_heads, head_dim]. Differentiable."""
    outputs = [
        functional.scaled_dot_product_attention(
            query[:, :, begin:end],
            key[:, :, begin:end],
            value[:, :, begin:end],
            is_causal=end - begin > 1,
            scale=scaling,
            enable_gqa=True,
        )
        for begin, end in pairwise(starts)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def use_segments(module: Qwen2_5_VLForConditionalGeneration) -> str:
    """From now on the language layers attend by segments. Returns what they did before."""
    register_attention()
    return set_attention(module, LORIKEET_SEGMENTS)


def set_attention(module: Qwen2_5_VLForConditionalGeneration, name: str) -> str:
    """Let the language layers attend by the function registered as ``name``. Returns the former name."""
    config = module.model.language_model.config
    former = str(config._attn_implementation)
    config._attn_implementation = name
    return former


@contextmanager
def attention(module: Qwen2_5_VLForConditionalGeneration, name: str) -> Iterator[None]:
    """``set_attention`` for a while."""
    former = set_attention(module, name)
    try:
        yield
    finally:
        set_attention(module, former)
