"""lora_rows: the plain loop that defines what an adapter does to a row.

Slow and exact: one row at a time, in fp64, rounded once where PEFT rounds. Every fast path is compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from adapters.ops.torch_ops import Rounding
from adapters.staging import StagedSite


def lora_rows(
    y: Tensor,
    x: Tensor,
    slots: Sequence[int],
    sites: Mapping[int, StagedSite],
    bias: Tensor | None,
    rounding: Rounding,
) -> Tensor:
    """[T, out] like y: row t of the base's output y [T, out] for input x [T, in], changed by slot ``slots[t]``.

    ``sites`` holds this site's weights by slot; a row whose slot is not in it (-1 among them) stays as it is.
    """
    result = y.clone()
    for row, slot in enumerate(slots):
        if slot in sites:
            result[row] = _row(y[row], x[row], sites[slot], bias, rounding)
    return result


def _row(y: Tensor, x: Tensor, site: StagedSite, bias: Tensor | None, rounding: Rounding) -> Tensor:
    delta = site.b.double() @ (site.a.double() @ x.double())  # [out]
    if site.scale is not None:
        unbiased = (y if bias is None else y - bias).double()  # PEFT subtracts in the base's dtype
        scale = site.scale.double()
        return (y.double() + (scale - 1) * unbiased + scale * delta).to(y.dtype)
    if rounding is Rounding.DELTA:
        return y + delta.to(y.dtype)
    return (y.double() + delta).to(y.dtype)
