"""shrink and expand: many adapters' two products over one batch, in Triton.

A program works on one tile: up to BLOCK_M rows of one slot (adapters.ops.tiles). What the slot holds at a site it
reads from the device (adapters.ops.entries), so that a captured graph follows swaps. Ranks run in pages of 16 columns:
a slot costs what its own rank costs, whatever its neighbours'.

Sums are taken in one fixed order: within a chunk of the input by the tensor core, chunk after chunk in fp32. So neither
the number of programs nor the tile that a row stands in changes the order, and there are no atomics.

No product has more than 32 rows on its left, so none becomes a wgmma with a register operand, which ptxas before
13.3 miscompiles on sm90.
"""

import torch
import triton
import triton.language as tl

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether these kernels run in Triton's interpreter on a CPU: settled for a process by TRITON_INTERPRET."""
ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
RANK_PAGE = tl.constexpr(16)
ENTRY_FIELDS = tl.constexpr(4)
TILE_FIELDS = tl.constexpr(4)


@triton.jit
def rounded(values, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 values rounded to DTYPE; the interpreter cuts them to bfloat16, so there they are rounded by hand."""
    if UPCAST and DTYPE == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def shrink(
    x_ptr,  # [T, in]
    partial_ptr,  # [PARTS, NUM_SITES, T, MAX_RANK] float32, written where a tile has rows and the site a rank
    tiles_ptr,  # [tiles, 4] int32: slot, first place, number of rows
    rows_ptr,  # [T] int32: the row of x at each place
    entries_ptr,  # [NUM_SITES, num_slots, 4] int64: address of A, of B, of the scale; padded rank below, type above
    num_slots,
    num_places,  # T
    A_TYPE: tl.constexpr,
    NUM_IN: tl.constexpr,
    STRIDE_X: tl.constexpr,
    NUM_SITES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,  # inputs summed apart; a multiple of BLOCK_K
    CHUNKS_PER_PART: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter has no bfloat16 product
):
    """Grid (tiles, PARTS, NUM_SITES). partial[part, site, place] = x[row] @ A.T over the part's chunks."""
    tile, part, site = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tiles_ptr + tile * TILE_FIELDS)
    first = tl.load(tiles_ptr + tile * TILE_FIELDS + 1)
    count = tl.load(tiles_ptr + tile * TILE_FIELDS + 2)
    entry = entries_ptr + (site * num_slots + slot) * ENTRY_FIELDS
    rank = tl.load(entry + 3, mask=count > 0, other=0).to(tl.int32)  # the lower half
    if rank == 0:
        return
    a_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(A_TYPE)), 16)
    place = tl.arange(0, BLOCK_M)
    is_row = place < count
    row = tl.load(rows_ptr + first + place, mask=is_row, other=0).to(tl.int64)
    x_rows = x_ptr + row[:, None] * STRIDE_X
    ks = tl.arange(0, BLOCK_K)
    out = partial_ptr + (part * NUM_SITES + site) * (num_places * MAX_RANK)
    page = 0
    while page < rank:
        ranks = page + tl.arange(0, RANK_PAGE)
        a_rows = a_ptr + ranks[:, None] * NUM_IN
        total = tl.zeros((BLOCK_M, RANK_PAGE), tl.float32)
        for chunk in range(CHUNKS_PER_PART):
            begin = (part * CHUNKS_PER_PART + chunk) * CHUNK
            acc = tl.zeros((BLOCK_M, RANK_PAGE), tl.float32)
            for k in range(0, CHUNK, BLOCK_K):
                columns = begin + k + ks
                x = tl.load(
                    x_rows + columns[None, :], mask=is_row[:, None] & (columns < NUM_IN)[None, :], other=0.0
                )
                a = tl.load(
                    a_rows + columns[None, :],
                    mask=(ranks < rank)[:, None] & (columns < NUM_IN)[None, :],
                    other=0.0,
                )
                x = x.to(A_TYPE)
                if UPCAST:
                    acc = tl.dot(x.to(tl.float32), tl.trans(a.to(tl.float32)), acc, input_precision="ieee")
                else:
                    acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
            total += acc
        target = out + (first + place)[:, None] * MAX_RANK + ranks[None, :]
        tl.store(target, total, mask=is_row[:, None] & (ranks < rank)[None, :])
        page += RANK_PAGE


@triton.jit
def expand(
    y_ptr,  # [T, widths side by side], changed in place
    partial_ptr,  # as shrink's
    tiles_ptr,
    rows_ptr,
    entries_ptr,
    bias_ptr,  # [widths side by side], the base's, or anything without HAS_BIAS
    num_slots,
    num_places,
    A_TYPE: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    NUM_SITES: tl.constexpr,  # 1, 2 or 3
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUNDS_DELTA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (blocks of all sites, tiles). y[row] changed by the slot's adapter, rounded as ``Rounding`` says."""
    block, tile = tl.program_id(0), tl.program_id(1)
    blocks_0: tl.constexpr = (WIDTH_0 + BLOCK_N - 1) // BLOCK_N
    blocks_1: tl.constexpr = (WIDTH_1 + BLOCK_N - 1) // BLOCK_N
    site, start, width, before = 0, 0, WIDTH_0, 0
    if NUM_SITES > 1:
        if block >= blocks_0:
            site, start, width, before = 1, WIDTH_0, WIDTH_1, blocks_0
    if NUM_SITES > 2:
        if block >= blocks_0 + blocks_1:
            site, start, width, before = 2, WIDTH_0 + WIDTH_1, WIDTH_2, blocks_0 + blocks_1
    slot = tl.load(tiles_ptr + tile * TILE_FIELDS)
    first = tl.load(tiles_ptr + tile * TILE_FIELDS + 1)
    count = tl.load(tiles_ptr + tile * TILE_FIELDS + 2)
    entry = entries_ptr + (site * num_slots + slot) * ENTRY_FIELDS
    rank = tl.load(entry + 3, mask=count > 0, other=0).to(tl.int32)  # the lower half
    if rank == 0:
        return
    rank = rank // 8 * 8  # a multiple of 8 always: said so that B's rows are read 16 bytes at a time
    b_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(A_TYPE)), 16)
    scale_address = tl.load(entry + 2)
    place = tl.arange(0, BLOCK_M)
    is_row = place < count
    row = tl.load(rows_ptr + first + place, mask=is_row, other=0).to(tl.int64)
    columns = (block - before) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < width
    delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    page = 0
    while page < rank:
        ranks = page + tl.arange(0, RANK_PAGE)
        is_rank = ranks < rank
        b = tl.load(
            b_ptr + columns[:, None] * rank + ranks[None, :],
            mask=is_column[:, None] & is_rank[None, :],
            other=0.0,
        )
        source = partial_ptr + (first + place)[:, None] * MAX_RANK + ranks[None, :]
        h = tl.zeros((BLOCK_M, RANK_PAGE), tl.float32)
        for part in tl.static_range(PARTS):
            h += tl.load(
                source + (part * NUM_SITES + site) * (num_places * MAX_RANK),
                mask=is_row[:, None] & is_rank[None, :],
                other=0.0,
            )
        delta = _product(h, b, delta, A_TYPE, UPCAST)
        page += RANK_PAGE
    target = y_ptr + row[:, None] * STRIDE_Y + (start + columns)[None, :]
    mask = is_row[:, None] & is_column[None, :]
    y = tl.load(target, mask=mask, other=0.0)
    base = y.to(tl.float32)
    if scale_address != 0:
        scale_ptr = tl.multiple_of(scale_address.to(tl.pointer_type(tl.float32)), 16)
        scale = tl.load(scale_ptr + columns, mask=is_column, other=1.0)[None, :]
        unbiased = base
        if HAS_BIAS:
            bias = tl.load(bias_ptr + start + columns, mask=is_column, other=0.0).to(tl.float32)
            unbiased = rounded(base - bias[None, :], y.dtype, UPCAST).to(tl.float32)
        result = base + ((scale - 1.0) * unbiased + scale * delta)
    elif ROUNDS_DELTA:
        result = base + rounded(delta, y.dtype, UPCAST).to(tl.float32)
    else:
        result = base + delta
    tl.store(target, rounded(result, y.dtype, UPCAST), mask=mask)


@triton.jit
def _product(h, b, acc, A_TYPE: tl.constexpr, UPCAST: tl.constexpr):
    """acc + h @ b.T. h [M, 16] float32 goes as two parts of A_TYPE, so that none of its 24 bits is lost on the way."""
    if A_TYPE == tl.float32:
        return tl.dot(h, tl.trans(b), acc, input_precision="ieee")
    high = rounded(h, A_TYPE, UPCAST)
    low = rounded(h - high.to(tl.float32), A_TYPE, UPCAST)
    if UPCAST:
        acc = tl.dot(low.to(tl.float32), tl.trans(b.to(tl.float32)), acc, input_precision="ieee")
        return tl.dot(high.to(tl.float32), tl.trans(b.to(tl.float32)), acc, input_precision="ieee")
    acc = tl.dot(low, tl.trans(b), acc)
    return tl.dot(high, tl.trans(b), acc)
