"""AttentionPlan, what one step's attention needs, and the attention function that follows it.

The function is registered with transformers under ``LORIKEET_PAGED`` and reached by every language layer's own
attention module; the plan comes to it as a keyword argument of the forward call, so nothing is kept between steps.
It first writes the step's keys and values to the cache, then lets each segment attend, causally, to its own keys
gathered by block table. Each segment is computed on its own, so a row's result does not depend on its neighbours.

Does not know: requests, adapters, who allocates blocks. Place in a request's way: step 8, under the runner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

LORIKEET_PAGED: Final = "lorikeet_paged"


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """What one step's attention needs. S segments (sequences), flattened into T tokens in segment order."""

    query_starts: tuple[int, ...]
    """S + 1 offsets into T."""
    context_lens: tuple[int, ...]
    """S: keys visible to each segment's last token, that is cached ones and this step's."""
    block_tables: tuple[tuple[int, ...], ...]
    """S rows of block ids; each covers its context length."""
    slot_mapping: (
        Tensor  # [T] int64: block id * block_size + offset, where each token's key and value are written
    )
    key_cache: tuple[Tensor, ...]  # L of [num_blocks, block_size, num_kv_heads, head_dim]; written in place
    value_cache: tuple[Tensor, ...]  # as key_cache
    block_size: int


def register_attention() -> None:
    """Make the function known to transformers. Idempotent."""
    AttentionInterface.register(LORIKEET_PAGED, attend_paged)


def attend_paged(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, T, head_dim]
    key: Tensor,  # [1, num_kv_heads, T, head_dim]
    value: Tensor,  # as key
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan,
    scaling: float,
    **_: object,  # transformers passes what other implementations need: dropout, position_ids, sliding_window
) -> tuple[Tensor, None]:
    """One layer's attention over the flattened step: [1, T, num_heads, head_dim]. Writes the layer's cache."""
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise TypeError("the attention module has no layer index")
    key_cache, value_cache = plan.key_cache[layer], plan.value_cache[layer]
    _store(key_cache, plan.slot_mapping, key)
    _store(value_cache, plan.slot_mapping, value)
    outputs = [
        _attend_segment(
            query[:, :, begin:end],
            _gather(key_cache, table, length),
            _gather(value_cache, table, length),
            scaling,
        )
        for begin, end, length, table in zip(
            plan.query_starts,
            plan.query_starts[1:],
            plan.context_lens,
            plan.block_tables,
            strict=False,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _store(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write rows [1, heads, T, dim] into the cache at flat ``slots`` [T]."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, rows[0].transpose(0, 1).to(cache.dtype))


def _gather(cache: Tensor, table: tuple[int, ...], length: int) -> Tensor:
    """One segment's first ``length`` rows of the cache: [1, heads, length, dim]."""
    num_blocks = -(-length // cache.shape[1])
    blocks = torch.tensor(table[:num_blocks], dtype=torch.int64, device=cache.device)
    rows = cache.index_select(0, blocks).flatten(0, 1)[:length]
    return rows.transpose(0, 1).unsqueeze(0)


def _attend_segment(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last ``query`` tokens over all keys: [1, num_heads, tokens, head_dim]."""
    num_new, length = query.shape[2], key.shape[2]
    mask = None
    if 1 < num_new < length:
        mask = torch.ones(num_new, length, dtype=torch.bool, device=query.device).tril(length - num_new)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=1 < num_new == length,
        scale=scaling,
        enable_gqa=True,
    )
