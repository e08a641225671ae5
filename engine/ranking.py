"""The order of a row's tokens: by logit, and by id where logits are equal. Exact, and the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_WORD = 0xFFFFFFFF


def ranked_ids(logits: Tensor, num: int) -> Tensor:
    """[..., V] float32 without NaN -> [..., num] int64: the ``num`` best ids, best first, in ties the lowest id first.

    Logit and id are packed into one integer, so that no two keys are equal and no sort has a choice.
    """
    bits = (logits.contiguous() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one value
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = logits.shape[-1] - 1
    reversed_ids = last - torch.arange(last + 1, device=logits.device)
    keys = (ascending << 32) + reversed_ids
    best = torch.topk(keys, num, dim=-1).values
    return last - (best & _LOW_WORD)
