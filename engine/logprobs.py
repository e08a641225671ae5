"""Log-probabilities to report: log_softmax of the model's own logits, before penalties, bias, masks and temperature.

Rows are scored one by one from a copy at a fixed alignment, so that a figure does not depend on where in a batch or a
chunk its row stood.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import NumericalError
from engine.messages import TokenLogprob
from engine.ranking import ranked_ids

FLOOR = -9999.0  # for a token of probability 0; minus infinity has no JSON (vLLM's figure)


def score_tokens(
    rows: Sequence[Tensor], token_ids: Sequence[int], nums_top: Sequence[int]
) -> list[TokenLogprob]:
    """For each row ([V] float32, finite) the log-probability of its token and of its ``num_top`` likeliest tokens."""
    scored = [_score(row, i, num) for row, i, num in zip(rows, token_ids, nums_top, strict=True)]
    if not scored:
        return []
    values = torch.cat([value for value, _ in scored]).tolist()
    ids = torch.cat([ids for _, ids in scored]).tolist()
    results, start = [], 0
    for _, own_ids in scored:
        end = start + len(own_ids)
        top = tuple(zip(ids[start + 1 : end], values[start + 1 : end], strict=True))
        results.append(TokenLogprob(ids[start], values[start], top))
        start = end
    return results


def _score(row: Tensor, token_id: int, num_top: int) -> tuple[Tensor, Tensor]:
    """[1 + num_top] values and ids: the token itself, then the likeliest."""
    logits = row.clone()
    logprobs = torch.log_softmax(logits, dim=-1).clamp_(min=FLOOR)
    top = ranked_ids(logits, min(num_top, len(logits)))
    ids = torch.cat([torch.tensor([token_id], device=row.device), top])
    return logprobs[ids], ids


@torch.inference_mode()
def score_prompt(rows: Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """[N, V] float32 logits and the N tokens that they predict. Raises NumericalError when a row is not finite."""
    if len(targets) == 0:
        return []
    if not bool(torch.isfinite(rows.amax(-1)).all()):
        raise NumericalError("the model gave no finite probabilities for this prompt")
    return score_tokens(list(rows), targets, [num_top] * len(targets))
