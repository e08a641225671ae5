"""Triton: one new token a sequence attends to its paged keys, split over them; and rotate-and-store.

``attend`` takes the query heads of one key-value head as one tile of 16 rows, so that keys are read once for all of
them, and one split of the keys, as long as the device says; ``join`` adds the splits in their order. ``rotate_store``
turns a step's queries and keys by their positions and writes keys and values to their places in the cache; nothing that
it reads is changed.

Lengths, block tables and places are read on the device, so that a captured graph follows them.
"""

import triton
import triton.language as tl

from base.ops.kernels.rounding import rounded

HEADS = tl.constexpr(16)
"""Rows of a tile: a tensor core's least, and more than any model's query heads of one key-value head."""
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def attend(
    q_ptr,  # [S, heads, DIM]
    keys_ptr,  # [blocks, block_size, kv_heads, DIM]
    values_ptr,
    tables_ptr,  # [S, max_blocks] int32
    lengths_ptr,  # [S] int32: keys of each sequence, its new one among them; 0 for a row that is not used
    sums_ptr,  # [S, heads, SPLITS, DIM] float32: not yet divided by their weights
    tops_ptr,  # [2, S, heads, SPLITS] float32: the largest score (in powers of 2), and the sum of weights below it
    max_blocks,
    num_heads,
    stride_q,
    scale,  # of scores, times log2(e)
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,  # kv_heads * DIM; a constant, so that the compiler knows how rows are aligned
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (S, kv_heads, SPLITS)."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)
    heads = tl.arange(0, HEADS)
    is_head = heads < GROUP
    place = (row * num_heads + kv_head * GROUP + heads) * SPLITS + split
    num_places = tl.num_programs(0) * num_heads * SPLITS
    if begin >= end:
        tl.store(tops_ptr + place, NOTHING, mask=is_head)
        tl.store(tops_ptr + num_places + place, 0.0, mask=is_head)
        return
    dims = tl.arange(0, DIM)
    q_rows = q_ptr + row.to(tl.int64) * stride_q + (kv_head * GROUP + heads)[:, None] * DIM + dims[None, :]
    q = tl.load(q_rows, mask=is_head[:, None], other=0.0)
    table = tables_ptr + row * max_blocks
    keys, values = keys_ptr + kv_head * DIM + dims, values_ptr + kv_head * DIM + dims
    top = tl.full((HEADS,), NOTHING, tl.float32)
    weight = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, DIM), tl.float32)
    if UPCAST:  # the interpreter has no range over numbers of the device
        first = begin
        while first < end:
            top, weight, acc = _step(
                q, keys, values, table, first, end, scale, top, weight, acc,
                DTYPE, STRIDE_SLOT, BLOCK_SIZE, BLOCK_N, UPCAST,
            )  # fmt: skip
            first += BLOCK_N
    else:
        for first in range(begin, end, BLOCK_N):
            top, weight, acc = _step(
                q, keys, values, table, first, end, scale, top, weight, acc,
                DTYPE, STRIDE_SLOT, BLOCK_SIZE, BLOCK_N, UPCAST,
            )  # fmt: skip
    tl.store(tops_ptr + place, top, mask=is_head)
    tl.store(tops_ptr + num_places + place, weight, mask=is_head)
    tl.store(sums_ptr + place[:, None].to(tl.int64) * DIM + dims[None, :], acc, mask=is_head[:, None])


@triton.jit
def _step(
    q, keys, values, table, first, end, scale, top, weight, acc, DTYPE: tl.constexpr,
    STRIDE_SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys more: scores in powers of 2, the largest so far, the weights below it, and the weighted values."""
    ns = first + tl.arange(0, BLOCK_N)
    is_key = ns < end
    block = tl.load(table + ns // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
    slots = (block * BLOCK_SIZE + ns % BLOCK_SIZE)[:, None] * STRIDE_SLOT
    k = tl.load(keys[None, :] + slots, mask=is_key[:, None], other=0.0)
    v = tl.load(values[None, :] + slots, mask=is_key[:, None], other=0.0)
    if UPCAST:
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(is_key[None, :], scores * scale, NOTHING)
    new_top = tl.maximum(top, tl.max(scores, 1))
    shrunk = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    weight = weight * shrunk + tl.sum(weights, 1)
    weights = rounded(weights, DTYPE, UPCAST)
    acc = acc * shrunk[:, None]
    if UPCAST:
        acc = tl.dot(weights.to(tl.float32), v.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(weights, v, acc, input_precision="ieee")
    return new_top, weight, acc


@triton.jit
def join(
    sums_ptr,  # as attend's
    tops_ptr,
    out_ptr,  # [S, heads, DIM]
    num_places,  # S * heads * SPLITS
    DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (S * heads). Zeros for a row without keys."""
    head = tl.program_id(0)
    dims = tl.arange(0, DIM)
    top = NOTHING
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(tops_ptr + head * SPLITS + split))
    total = tl.zeros((DIM,), tl.float32)
    weight = 0.0
    for split in tl.static_range(SPLITS):
        place = head * SPLITS + split
        part_weight = tl.load(tops_ptr + num_places + place)
        is_used = part_weight > 0
        factor = tl.where(is_used, tl.exp2(tl.load(tops_ptr + place) - top), 0.0)
        is_dim = dims < tl.where(is_used, DIM, 0)
        sums = tl.load(sums_ptr + place.to(tl.int64) * DIM + dims, mask=is_dim, other=0.0)
        total += sums * factor
        weight += part_weight * factor
    result = tl.where(weight > 0, total / weight, 0.0)
    tl.store(out_ptr + head.to(tl.int64) * DIM + dims, rounded(result, DTYPE, UPCAST))


@triton.jit
def rotate_store(
    out_ptr,  # [T, NUM_HEADS, DIM]: the queries, rotated
    q_ptr,  # rows of NUM_HEADS * DIM, STRIDE_Q apart
    k_ptr,  # rows of NUM_KV_HEADS * DIM
    v_ptr,
    cos_ptr,  # [T, DIM]
    sin_ptr,  # [T, DIM], the first half negative
    slots_ptr,  # [T] int64: the place in the cache; -1 for a row that is not used
    keys_ptr,  # [slots, NUM_KV_HEADS, DIM]
    values_ptr,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,  # NUM_HEADS and NUM_KV_HEADS, rounded up to powers of 2
    KV_TILE: tl.constexpr,
    DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (T, 3): a row's queries, its keys, its values. Rounds where transformers' apply_rotary_pos_emb does."""
    row, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos_row, sin_row = cos_ptr + row * DIM, sin_ptr + row * DIM
    if kind == 0:
        target = out_ptr + row * (NUM_HEADS * DIM)
        _rotate(q_ptr + row * STRIDE_Q, target, cos_row, sin_row, NUM_HEADS, TILE, DIM, DTYPE, UPCAST)
    else:
        slot = tl.load(slots_ptr + row)
        if slot >= 0:
            place = slot * (NUM_KV_HEADS * DIM)
            if kind == 1:
                _rotate(
                    k_ptr + row * STRIDE_K, keys_ptr + place, cos_row, sin_row,
                    NUM_KV_HEADS, KV_TILE, DIM, DTYPE, UPCAST,
                )  # fmt: skip
            else:
                numbers = tl.arange(0, KV_TILE * DIM)
                is_number = numbers < NUM_KV_HEADS * DIM
                value = tl.load(v_ptr + row * STRIDE_V + numbers, mask=is_number)
                tl.store(values_ptr + place + numbers, value, mask=is_number)


@triton.jit
def _rotate(
    source, target, cos_row, sin_row,
    NUM: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """NUM heads of a row: x * cos + x with its halves swapped * sin, every product and sum rounded to DTYPE."""
    heads, half = tl.arange(0, TILE), tl.arange(0, DIM // 2)
    is_head = (heads < NUM)[:, None]
    places = heads[:, None] * DIM + half[None, :]
    left = tl.load(source + places, mask=is_head, other=0.0).to(tl.float32)
    right = tl.load(source + places + DIM // 2, mask=is_head, other=0.0).to(tl.float32)
    cos_left, cos_right = _halves(cos_row + half, DIM)
    sin_left, sin_right = _halves(sin_row + half, DIM)
    new_left = _times(left, cos_left, DTYPE, UPCAST) + _times(right, sin_left, DTYPE, UPCAST)
    new_right = _times(right, cos_right, DTYPE, UPCAST) + _times(left, sin_right, DTYPE, UPCAST)
    tl.store(target + places, rounded(new_left, DTYPE, UPCAST), mask=is_head)
    tl.store(target + places + DIM // 2, rounded(new_right, DTYPE, UPCAST), mask=is_head)


@triton.jit
def _halves(ptr, DIM: tl.constexpr):
    return tl.load(ptr).to(tl.float32)[None, :], tl.load(ptr + DIM // 2).to(tl.float32)[None, :]


@triton.jit
def _times(a, b, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    return rounded(a * b, DTYPE, UPCAST).to(tl.float32)
