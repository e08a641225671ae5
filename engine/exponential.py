"""relative_exp: e^x of what is at most 0, by operations that every processor rounds alike, so that its bits are the
same on each: numpy's own exp is the C library's on one and a vectorised one on another.

base/ops/native/selection.c has the same operations in the same order.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

LOWEST: Final = -32.0
"""What lies below counts as this: of 2**40, e^-32 is a hundredth part of one."""
_ONE_BY_LN2: Final = 1.4426950408889634
_LN2_HIGH: Final = 6.93147180369123816490e-01
_LN2_LOW: Final = 1.90821492927058770002e-10
"""ln 2 in two parts, the first so short that its product with a small integer is exact (Sun's fdlibm, e_exp.c)."""
_TERMS: Final = tuple(1 / math.factorial(k) for k in range(13, -1, -1))
"""Taylor's series: for half of ln 2 what is left out is 2**-57."""
_EXPONENT_OF_ONE: Final = 1023
_BITS_OF_FRACTION: Final = 52
_CHUNK: Final = 1 << 14
"""Numbers that stay in the second cache for all of the operations."""


def relative_exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """e^x for x from -32 to 0, to two units in the last place; e^-32 below and for NaN. Contiguous, any shape."""
    result = np.empty_like(values)
    for start in range(0, values.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        result.reshape(-1)[part] = _exp(values.reshape(-1)[part])
    return result


def _exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """x = n ln 2 + r, and e^x = 2^n e^r."""
    x = np.fmax(values, LOWEST)  # which a NaN is no number for
    n = np.rint(x * _ONE_BY_LN2)
    x -= n * _LN2_HIGH
    x -= n * _LN2_LOW
    total = x * _TERMS[0]
    for term in _TERMS[1:-1]:
        total += term
        total *= x
    total += _TERMS[-1]
    total *= (n.astype(np.int64) + _EXPONENT_OF_ONE << _BITS_OF_FRACTION).view(np.float64)  # 2^n
    return total
