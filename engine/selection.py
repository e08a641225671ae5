"""From logits to one token a row: temperature, min_p, top_k, top_p, and the draw.

Probabilities become integers (a share of 2**40 of the likeliest token's), so that every sum below is exact: no result
depends on the order of an addition, hence none on the device's scan, the width of a sort, or a batch's other rows.
The one inexact operation is ``exp``. On a CPU it is engine.exponential's, whose bits are the same on every processor
and in every place of an array; torch's own has a vectorised body and a scalar tail, which differ in the last bit.
engine.native_selection has a compiled twin of all this for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.exponential import relative_exp
from engine.ranking import NO_TOKEN, best_of, ranked_ids
from engine.sampling import SamplingParams
from engine.upload import upload

Select = Callable[[Tensor, Sequence[SamplingParams], Sequence[float]], Tensor]
"""``select_tokens`` and what takes its place."""
WEIGHT_ONE = 2**40  # V * 2**40 stays below 2**63 for any vocabulary below 8 million
FIRST_WIDTH = 256  # tokens that are sorted at first for top_p; a row that needs more gets 16 times as many
WIDENING = 16


def is_truncated(params: SamplingParams, vocab_size: int) -> bool:
    """Does top_k or top_p leave anything out?"""
    return 0 < params.top_k < vocab_size or params.top_p < 1.0


def asks_device(params: SamplingParams, vocab_size: int) -> bool:
    """May drawing have to look at what the device found, and so to wait for it? Only top_p over a flat distribution."""
    return not params.is_greedy and params.top_p < 1.0 and not 0 < params.top_k < vocab_size


def select_tokens(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """[S, V] float32, one uniform in [0, 1) a row -> [S] int64 token ids, NO_TOKEN where a row is not sound."""
    best, ids = best_of(logits)
    drawn = [i for i, p in enumerate(params) if not p.is_greedy]
    cut = {i for i in drawn if is_truncated(params[i], logits.shape[-1])}
    for choose, group in ((draw, [i for i in drawn if i not in cut]), (draw_truncated, sorted(cut))):
        if group:
            index = upload(group, torch.int64, logits.device)
            chosen = choose(logits[index], [params[i] for i in group], [uniforms[i] for i in group])
            ids.index_copy_(0, index, chosen)
    return ids.masked_fill_(~torch.isfinite(best), NO_TOKEN)


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """[S, V] float32, one uniform in [0, 1) a row -> [S] int64 token ids. No truncation but min_p."""
    weights = token_weights(logits, params)
    return _pick(weights, _column(uniforms, logits))


def draw_truncated(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """As ``draw``, among the tokens that top_k and then top_p keep (vLLM's order: min_p, top_k, top_p)."""
    vocab_size = logits.shape[-1]
    weights = token_weights(logits, params)
    limits = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    shares = _column(uniforms, logits)
    width = min(vocab_size, max(FIRST_WIDTH if limit == vocab_size else limit for limit in limits))
    ids, kept, is_enough = _kept(logits, weights, limits, params, width)
    chosen = _gathered(ids, kept, shares)
    while width < max(limits) and (rows := _lacking(is_enough)):
        width = min(width * WIDENING, vocab_size)
        some = ([limits[i] for i in rows], [params[i] for i in rows])
        ids, kept, enough = _kept(logits[rows], weights[rows], *some, width)
        chosen[rows] = _gathered(ids, kept, shares[rows])
        is_enough[rows] = enough
    return chosen


def _gathered(ids: Tensor, kept: Tensor, shares: Tensor) -> Tensor:
    return ids.gather(-1, _pick(kept, shares).unsqueeze(-1)).squeeze(-1)


def _lacking(is_enough: Tensor) -> list[int]:
    """The rows that need more tokens sorted; asks the device, which only top_p over a flat distribution needs."""
    return [i for i, enough in enumerate(is_enough.tolist()) if not enough]


def token_weights(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[S, V] int64: probabilities relative to the row's largest, at the row's temperature; 0 below min_p."""
    exact = logits.double()
    temperatures = _column([p.temperature for p in params], logits)
    relative = _exp((exact - exact.amax(-1, keepdim=True)) / temperatures)
    # a row that is not finite fails elsewhere; here it must only not throw
    relative = relative.nan_to_num(nan=0.0)
    if any(p.min_p > 0 for p in params):
        relative = relative.masked_fill(relative < _column([p.min_p for p in params], logits), 0.0)
    return (relative * WEIGHT_ONE).long()


def _exp(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return torch.from_numpy(relative_exp(values.numpy()))
    return torch.exp(values)


def _kept(
    logits: Tensor, weights: Tensor, limits: Sequence[int], params: Sequence[SamplingParams], width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``width`` best ids [S, width], their weights with those left out at 0, and [S] bool: is nothing missing?"""
    ids = ranked_ids(logits, width)
    ranks = torch.arange(width, device=logits.device)
    limit = upload(limits, torch.int64, logits.device).unsqueeze(-1)
    best = weights.gather(-1, ids) * (ranks < limit)
    is_limited = limit < logits.shape[-1]
    total = torch.where(is_limited, best.sum(-1, keepdim=True), weights.sum(-1, keepdim=True))
    nucleus = _column([p.top_p for p in params], logits) * total.double()
    up_to = best.cumsum(-1)
    is_kept = ((up_to - best).double() < nucleus) | (ranks == 0)
    is_enough = (limit <= width) | (up_to[:, -1:].double() >= nucleus)
    is_enough |= total == 0  # a row that is not finite
    return ids, best * is_kept, is_enough.squeeze(-1)


def _pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """[S, K] int64, [S, 1] float64 -> [S] int64: the index at which the running sum passes the uniform's share."""
    up_to = weights.cumsum(-1)
    total = up_to[:, -1:].contiguous()
    share = torch.minimum((uniforms * total.double()).long(), total - 1)
    return torch.searchsorted(up_to, share, right=True).squeeze(-1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[S, 1] float64 on the device of ``like``."""
    return upload(values, torch.float64, like.device).unsqueeze(-1)
