"""The fused 4-bit product and the fused copy to 16 bits, started on laid-out weights.

``matmul_plain`` and ``nf4.dequantise`` are their plain twins. Everything runs on the current stream, and memory comes
from torch's allocator, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from base.ops import nf4
from base.ops.nf4 import Nf4Weight
from base.ops.nf4_launch import Nf4Launch, nf4_launch
from base.ops.permute import has_assembly, lookup_assembly, table_assembly


def matmul_plain(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None) -> Tensor:
    """Dequantise, then multiply: what the fused product equals, up to the order of its sums."""
    return functional.linear(x, nf4.dequantise(weight, x.dtype), bias)


def matmul(
    x: Tensor,
    weight: Nf4Weight,
    bias: Tensor | None = None,
    *,
    launch: Nf4Launch | None = None,
    permutes: bool | None = None,
) -> Tensor:
    """x [M, K] times the weight, plus bias [N]: [M, N] in x's dtype; float32 sums, rounded once.

    permutes: whether codes are looked up by byte permutation; by default where the device can.
    """
    from base.ops.kernels import nf4 as kernels
    from base.ops.kernels.rounding import ELEMENTS, IS_INTERPRETED

    num_rows, num_in = x.shape
    if num_in != weight.num_in or x.stride(1) != 1:
        raise ValueError(
            f"x of [rows, {weight.num_in}] with its inputs side by side expected, not {tuple(x.shape)}"
        )
    sizes = launch or nf4_launch(num_rows, num_in, weight.num_out)
    parts = sizes.parts
    out = torch.empty((num_rows, weight.num_out), dtype=x.dtype, device=x.device)
    shape = (parts, num_rows, weight.num_out)
    sums = out if parts == 1 else torch.empty(shape, dtype=torch.float32, device=x.device)
    grid = (-(-weight.num_out // sizes.block_n), parts, -(-num_rows // sizes.block_m))
    kernels.matmul[grid](
        x,
        sums,
        *_weight_arguments(weight),
        out if bias is None else bias,
        num_rows,
        NUM_IN=num_in,
        NUM_OUT=weight.num_out,
        STRIDE_X=x.stride(0),
        DTYPE=ELEMENTS[x.dtype],
        NESTED=weight.outer is not None,
        HAS_BIAS=bias is not None,
        PARTS=parts,
        BLOCKS_PER_PART=-(-(num_in // nf4.BLOCK) // parts),
        BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n,
        **_assembly(weight, x.dtype, permutes),
        UPCAST=IS_INTERPRETED,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
        enable_fp_fusion=False,
    )
    if parts > 1:
        kernels.add_parts[(-(-out.numel() // 1024),)](
            sums,
            out,
            out if bias is None else bias,
            out.numel(),
            NUM_OUT=weight.num_out,
            DTYPE=ELEMENTS[x.dtype],
            HAS_BIAS=bias is not None,
            PARTS=parts,
            SIZE=1024,
            UPCAST=IS_INTERPRETED,
        )
    return out


def dequantise(
    weight: Nf4Weight, dtype: torch.dtype, out: Tensor | None = None, *, permutes: bool | None = None
) -> Tensor:
    """[N, K] in ``dtype``, to the bit nf4.dequantise's; written into ``out`` if given, any N * K numbers of it."""
    from base.ops.kernels import nf4 as kernels
    from base.ops.kernels.rounding import ELEMENTS, IS_INTERPRETED

    shape = (weight.num_out, weight.num_in)
    made = torch.empty(shape, dtype=dtype, device=weight.codes.device) if out is None else out.view(shape)
    block_n = 64
    kernels.dequantise[(weight.num_in // nf4.BLOCK, -(-weight.num_out // block_n))](
        made,
        *_weight_arguments(weight),
        NUM_IN=weight.num_in,
        NUM_OUT=weight.num_out,
        DTYPE=ELEMENTS[dtype],
        NESTED=weight.outer is not None,
        BLOCK_N=block_n,
        UPCAST=IS_INTERPRETED,
        **_assembly(weight, dtype, permutes),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return made


def _weight_arguments(weight: Nf4Weight) -> tuple[Tensor, ...]:
    """The kernels' seven pointers; what a weight without nested scales does not have is never read."""
    outer = weight.outer
    if outer is None:
        return (weight.codes, weight.scales, weight.code, *(weight.code,) * 4)
    return (weight.codes, weight.scales, weight.code, outer.code, outer.scales, outer.starts, outer.offsets)


def _assembly(weight: Nf4Weight, dtype: torch.dtype, permutes: bool | None) -> dict[str, str]:
    """PTX for the weight's table of codes, empty for the plain lookup; baked into the kernel, once a kind of 4 bits."""
    name = str(dtype).removeprefix("torch.")
    if permutes is None:
        permutes = weight.codes.is_cuda and torch.version.hip is None and has_assembly(name)
    if not permutes:
        return {"TABLE": "", "LOOKUP": ""}
    return {"TABLE": table_assembly(weight.values, name), "LOOKUP": lookup_assembly()}
