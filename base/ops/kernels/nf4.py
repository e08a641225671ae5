"""Triton: a product with a 4-bit weight for few rows, and the weight's 16-bit copy for many.

The weight is laid out by base.ops.nf4. A program takes BLOCK_N outputs and a part of the input, 64 inputs at a time
(one scale an output): the 64 codes become two tiles of 32 inputs in 16 bits, exactly bitsandbytes' numbers, which meet
the matching halves of x. Parts are summed in order by ``add_parts``, so there are no atomics and a row's bits do not
depend on the rows beside it.

Codes become numbers in one of two ways that are equal to the bit. The plain one looks each up in a table. The other
(base.ops.permute) makes for each scale its 16 possible results, rounded, and picks them by byte permutation.

x stands on the left with its rows as they come from memory, and the weight goes through shared memory: so no wgmma gets
an operand from registers, which ptxas before 13.3 miscompiles on sm90.
"""

import triton
import triton.language as tl

from base.ops.kernels.rounding import rounded

BLOCK = tl.constexpr(64)
HALF = tl.constexpr(32)


@triton.jit
def load_scales(
    scales_ptr, outer_code_ptr, outer_ptr, starts, offsets, block, ns, is_n, num_out, NESTED: tl.constexpr
):
    """[BLOCK_N] float32: one block's scale of each output."""
    quantised = tl.load(scales_ptr + block.to(tl.int64) * num_out + ns, mask=is_n, other=0)
    if NESTED:
        inner = tl.load(outer_code_ptr + quantised.to(tl.int32))
        scales = inner * tl.load(outer_ptr + (starts + block) // 256, mask=is_n, other=0.0) + offsets
    else:
        scales = quantised
    return scales


@triton.jit
def decode(
    codes,
    scales,
    code_ptr,
    DTYPE: tl.constexpr,
    TABLE: tl.constexpr,
    LOOKUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """codes [BLOCK_N, 32] uint8, scales [BLOCK_N] float32 -> the blocks' first and second 32 inputs, [BLOCK_N, 32].

    The lookup takes four neighbouring bytes of a row at once and the row's planes with them. That a thread's registers
    hold such fours is the layout's doing; tests/gpu/test_compiled.py reads it from what the compiler made.
    """
    if TABLE != "":
        l0, l1, l2, l3, h0, h1, h2, h3 = tl.inline_asm_elementwise(
            TABLE, "=r,=r,=r,=r,=r,=r,=r,=r,r", [scales],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        planes = [
            codes, l0[:, None], l1[:, None], l2[:, None], l3[:, None],
            h0[:, None], h1[:, None], h2[:, None], h3[:, None],
        ]  # fmt: skip
        high, low = tl.inline_asm_elementwise(
            LOOKUP, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", planes,
            dtype=(DTYPE.value, DTYPE.value), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        high = rounded(tl.load(code_ptr + (codes >> 4).to(tl.int32)) * scales[:, None], DTYPE, UPCAST)
        low = rounded(tl.load(code_ptr + (codes & 15).to(tl.int32)) * scales[:, None], DTYPE, UPCAST)
    return high, low


@triton.jit
def matmul(
    x_ptr,  # [M, K]
    out_ptr,  # [PARTS, M, N] float32, or with PARTS 1 the result [M, N] itself
    codes_ptr,  # [K / 64, N, 32] uint8
    scales_ptr,  # [K / 64, N]
    code_ptr,  # [16] float32
    outer_code_ptr,
    outer_ptr,
    starts_ptr,
    offsets_ptr,
    bias_ptr,
    num_rows,
    NUM_IN: tl.constexpr,
    NUM_OUT: tl.constexpr,
    STRIDE_X: tl.constexpr,
    DTYPE: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS_PER_PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TABLE: tl.constexpr,  # assembly of base.ops.permute, or empty
    LOOKUP: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter has no bfloat16 product
):
    """Grid (blocks of N, PARTS, blocks of M)."""
    part = tl.program_id(1)
    ns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ms = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_n, is_m = ns < NUM_OUT, ms < num_rows
    ks = tl.arange(0, HALF)
    x_tile = x_ptr + ms[:, None].to(tl.int64) * STRIDE_X + ks[None, :]
    starts, offsets = 0, 0.0
    if NESTED:
        starts = tl.load(starts_ptr + ns, mask=is_n, other=0)
        offsets = tl.load(offsets_ptr + ns, mask=is_n, other=0.0)
    # a sum for each half: two products in a row on one sum are laid out apart, with all of it moved between them
    acc_high = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(BLOCKS_PER_PART):
        block = part * BLOCKS_PER_PART + step
        # bounds and not `is_n & is_block`: 3.9's interpreter makes integers of a scalar truth that meets a vector
        is_block = block * BLOCK < NUM_IN
        mask_n, mask_m = ns < tl.where(is_block, NUM_OUT, 0), ms < tl.where(is_block, num_rows, 0)
        x_high = tl.load(x_tile + block * BLOCK, mask=mask_m[:, None], other=0.0)
        x_low = tl.load(x_tile + block * BLOCK + HALF, mask=mask_m[:, None], other=0.0)
        tile = codes_ptr + (block.to(tl.int64) * NUM_OUT + ns[:, None]) * HALF + ks[None, :]
        codes = tl.load(tile, mask=mask_n[:, None], other=0)
        scales = load_scales(
            scales_ptr, outer_code_ptr, outer_ptr, starts, offsets, block, ns, mask_n, NUM_OUT, NESTED
        )
        w_high, w_low = decode(codes, scales, code_ptr, DTYPE, TABLE, LOOKUP, UPCAST)
        if UPCAST:
            x_high, x_low = x_high.to(tl.float32), x_low.to(tl.float32)
            w_high, w_low = w_high.to(tl.float32), w_low.to(tl.float32)
        acc_high = tl.dot(x_high, tl.trans(w_high), acc_high, input_precision="ieee")
        acc_low = tl.dot(x_low, tl.trans(w_low), acc_low, input_precision="ieee")
    acc = acc_high + acc_low
    mask = is_m[:, None] & is_n[None, :]
    target = ms[:, None].to(tl.int64) * NUM_OUT + ns[None, :]
    if PARTS == 1:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + ns, mask=is_n, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + target, rounded(acc, DTYPE, UPCAST), mask=mask)
    else:
        tl.store(out_ptr + part.to(tl.int64) * num_rows * NUM_OUT + target, acc, mask=mask)


@triton.jit
def add_parts(
    parts_ptr,  # [PARTS, M, N] float32
    out_ptr,  # [M, N]
    bias_ptr,
    num_values,  # M * N
    NUM_OUT: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (blocks of M * N): the parts' sum in their order, and the bias, rounded once."""
    values = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    is_value = values < num_values
    total = tl.zeros((SIZE,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * num_values + values, mask=is_value, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + values % NUM_OUT, mask=is_value, other=0.0).to(tl.float32)
    tl.store(out_ptr + values, rounded(total, DTYPE, UPCAST), mask=is_value)


@triton.jit
def dequantise(
    out_ptr,  # [N, K]
    codes_ptr,
    scales_ptr,
    code_ptr,
    outer_code_ptr,
    outer_ptr,
    starts_ptr,
    offsets_ptr,
    NUM_IN: tl.constexpr,
    NUM_OUT: tl.constexpr,
    DTYPE: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TABLE: tl.constexpr,
    LOOKUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (K / 64, blocks of N): neighbouring programs write neighbouring inputs of the same rows."""
    block = tl.program_id(0)
    ns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = ns < NUM_OUT
    ks = tl.arange(0, HALF)
    starts, offsets = 0, 0.0
    if NESTED:
        starts = tl.load(starts_ptr + ns, mask=is_n, other=0)
        offsets = tl.load(offsets_ptr + ns, mask=is_n, other=0.0)
    tile = codes_ptr + (block.to(tl.int64) * NUM_OUT + ns[:, None]) * HALF + ks[None, :]
    codes = tl.load(tile, mask=is_n[:, None], other=0)
    scales = load_scales(
        scales_ptr, outer_code_ptr, outer_ptr, starts, offsets, block, ns, is_n, NUM_OUT, NESTED
    )
    high, low = decode(codes, scales, code_ptr, DTYPE, TABLE, LOOKUP, UPCAST)
    target = out_ptr + ns[:, None].to(tl.int64) * NUM_IN + block * BLOCK + ks[None, :]
    tl.store(target, high, mask=is_n[:, None])
    tl.store(target + HALF, low, mask=is_n[:, None])
