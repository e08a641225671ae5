"""add_lora: the adapters of a whole batch added to a linear's output, by batched products over neighbouring slots.

Rounding is PEFT's (peft/tuners/lora/layer.py, bnb.py, dora.py), so that greedy tokens equal transformers + PEFT:
products are in the bank's dtype (fp32 on a CPU, as PEFT autocasts adapters), and the sum is rounded once, by
``Rounding``.

On a CPU a row's result is the same to the bit whatever the other rows, slots and ranks: see adapters.routing. One
batched product per group was measured, in microseconds on one AVX2 core, 16 rows over 16 adapters, shrink and expand
together, against a loop over slots and against gathering the weights first:

    hidden x out, rank   batched   loop   gather
    256 x 256, 16             49    261       86
    896 x 4864, 16           391    657      754
    2048 x 11008, 16        2848   3992     6522
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import torch
from torch import Tensor

from adapters.routing import Group, RoutePlan
from adapters.slots import PageKey, Pages


class Rounding(StrEnum):
    """When the adapter's part becomes the base's dtype. DoRA always rounds the sum."""

    DELTA = "delta"  # before it is added: beside a 4-bit linear
    SUM = "sum"  # after it was added in the wider dtype: beside a plain linear


def pad_rows(x: Tensor, plan: RoutePlan, dtype: torch.dtype) -> Tensor:
    """x [T, in] -> [P, in] in the bank's dtype: the plan's padded rows, for all sites that have this input and plan."""
    return (x if plan.gather is None else x.index_select(0, plan.gather)).to(dtype)


def add_lora(
    y: Tensor,
    padded: Tensor,
    plan: RoutePlan,
    pages: Mapping[PageKey, Pages],
    scale: Tensor | None,
    bias: Tensor | None,
    rounding: Rounding,
) -> Tensor:
    """The base's output with every touched row's adapter applied, in place; returns it. Other rows keep their bits.

    y [T, out] is the base's output, rows may lie apart; padded ``pad_rows`` of the linear's input; scale
    [num_slots, out] DoRA's; bias [out] the base's.
    """
    delta = _delta(padded, plan, pages, y.shape[1])
    touched = y if plan.rows is None else y.index_select(0, plan.rows)
    _add_plain(touched[: plan.num_plain], delta[: plan.num_plain], rounding)
    if plan.num_plain < touched.shape[0]:
        if scale is None:
            raise ValueError("a DoRA slot without a column scale")
        scales = scale.index_select(0, plan.dora_slots)
        _add_dora(touched[plan.num_plain :], delta[plan.num_plain :], scales, bias)
    return y if plan.rows is None else y.index_copy_(0, plan.rows, touched)


def _delta(padded: Tensor, plan: RoutePlan, pages: Mapping[PageKey, Pages], num_out: int) -> Tensor:
    """[N, out] in the bank's dtype: what each touched row's adapter adds."""
    parts = [_product(padded, group, pages[group.form.key]) for group in plan.groups]
    delta = parts[0] if len(parts) == 1 else torch.cat(parts)
    if plan.valid is not None:
        delta = delta.index_select(0, plan.valid)
    return delta[:, :num_out]


def _product(padded: Tensor, group: Group, pages: Pages) -> Tensor:
    """[group's rows, out_padded]: shrink by A, expand by B, both widened here where they are kept in less."""
    first, num_slots = group.first_slot, group.num_slots
    rows = padded[group.start : group.stop].view(num_slots, group.rows_per_slot, -1)
    a, b = (each.narrow(0, first, num_slots).to(rows.dtype) for each in (pages.a, pages.b))
    return torch.bmm(torch.bmm(rows, a.mT), b.mT).flatten(0, 1)


def _add_plain(base: Tensor, delta: Tensor, rounding: Rounding) -> None:
    if rounding is Rounding.DELTA:
        base.add_(delta.to(base.dtype))
    else:
        base.copy_(base + delta)


def _add_dora(base: Tensor, delta: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """PEFT's order: base + ((m - 1) (base - bias) + m delta), m [N, out] float32."""
    unbiased = base if bias is None else base - bias
    base.copy_(base + ((scale - 1) * unbiased + scale * delta))
