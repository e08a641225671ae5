"""Log-probabilities to report: log_softmax of the model's own logits, before penalties, bias, masks and temperature.

Each row's softmax is taken from a copy at a fixed alignment, so that a figure does not depend on where in a batch or a
chunk its row stood. (Ranking is exact anyway.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import NumericalError
from engine.messages import TokenLogprob
from engine.ranking import ranked_ids

GROUP = 32  # rows ranked together: bounds the memory that a long prompt's log-probabilities take
FLOOR = -9999.0  # for a token of probability 0; minus infinity has no JSON (vLLM's figure)


def score_tokens(
    rows: Sequence[Tensor], token_ids: Sequence[int], nums_top: Sequence[int]
) -> list[TokenLogprob]:
    """For each row ([V] float32, finite) the log-probability of its token and of its ``num_top`` likeliest tokens."""
    results: list[TokenLogprob] = []
    for start in range(0, len(rows), GROUP):
        part = slice(start, start + GROUP)
        results += _score_group(rows[part], token_ids[part], nums_top[part])
    return results


def _score_group(
    rows: Sequence[Tensor], token_ids: Sequence[int], nums_top: Sequence[int]
) -> list[TokenLogprob]:
    device, width = rows[0].device, min(max(nums_top), len(rows[0]))
    ids = torch.tensor(token_ids, device=device).unsqueeze(-1)
    if width > 0:
        ids = torch.cat([ids, ranked_ids(torch.stack(list(rows)), width)], dim=-1)
    values = torch.stack([_logprobs(row)[own] for row, own in zip(rows, ids, strict=True)])
    return [
        TokenLogprob(own[0], scores[0], tuple(zip(own[1 : num + 1], scores[1 : num + 1], strict=True)))
        for own, scores, num in zip(ids.tolist(), values.tolist(), nums_top, strict=True)
    ]


def _logprobs(row: Tensor) -> Tensor:
    return torch.log_softmax(row.clone(), dim=-1).clamp_(min=FLOOR)


@torch.inference_mode()
def score_prompt(rows: Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """[N, V] float32 logits and the N tokens that they predict. Raises NumericalError when a row is not finite."""
    if len(targets) == 0:
        return []
    if not bool(torch.isfinite(rows.amax(-1)).all()):
        raise NumericalError("the model gave no finite probabilities for this prompt")
    return score_tokens(list(rows), targets, [num_top] * len(targets))
