"""Triton: element types, and rounding to them, also where the interpreter rounds otherwise."""

import torch
import triton
import triton.language as tl

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether these kernels run in Triton's interpreter on a CPU: settled for a process by TRITON_INTERPRET."""
ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def rounded(values, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 values rounded to DTYPE; the interpreter cuts them to bfloat16, so there they are rounded by hand."""
    if UPCAST and DTYPE == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return values.to(DTYPE)
