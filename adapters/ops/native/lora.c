/* add_lora on a CPU: the adapters of a whole batch added to the output of linears that share an input, in one call.
 *
 * Memory is read once and in place: no row is gathered or padded, no weight copied, no row of x widened twice. For each
 * run of rows of one slot, h = x A^T (shrink), then y += h B^T (expand), rounded as PEFT does (adapters.ops.torch_ops).
 *
 * A row has the same bits in every batch: each number of h and y is one thread's sum, in one fixed order (eight partial
 * sums over the input in steps of eight, then a tree; over the ranks one after another), whatever rows stand beside it
 * and however the work is cut. Hence fused multiply-adds are written out, and contraction is off. Nor does it matter
 * to the bits whether a slot's A and B are kept in float32 or, where that loses nothing, in bfloat16.
 *
 * Nothing here is Python's: it is loaded through ctypes, after torch, whose OpenMP runtime (and so its threads) it
 * uses.
 */
#include "vectors.h"

#ifdef LORIKEET_HAS_KERNELS

enum { MOST_ROWS = 64, RANKS_TRANSPOSED = 64 }; /* of a panel; at once */
enum { RANKS_AT_ONCE = 8, COLUMNS_AT_ONCE = 16 };
/* Of B at a time: long stretches are read faster. */
enum { FEWEST_COLUMNS = 256, MOST_COLUMNS = 2048, UNITS_A_THREAD = 4 };
/* Weights come from memory once a step: half as fast without a hint, from the first line of a unit on. */
enum { PREFETCHED_BYTES = 256, COLUMNS_AHEAD = 64 };
enum { ROUND_DELTA = 0, ROUND_SUM = 1 };

/* What a slot holds at a site: addresses of A [rank, in], of B [out, rank], of DoRA's scale (0 without), the padded
 * rank (0 where the slot leaves the site alone), and the type of A and B. */
typedef struct {
  int64_t a, b, scale;
  int32_t rank, type;
} Entry;

/* One of the linears: its columns of y, and the address of its bias (0 without), which only DoRA asks for. */
typedef struct {
  int64_t first_column, width, bias, bias_type;
} Site;

/* All that is the same for every step; entries [num_sites, num_slots] is adapters.ops.entries' table. */
typedef struct {
  const Entry *entries;
  const Site *sites;
  int64_t num_sites, num_slots, num_in, rounding;
} Linears;

/* At most MOST_ROWS rows of one slot: order[start .. start + count) are their places in x and y. */
typedef struct {
  int32_t slot, start, count;
} Panel;

/* Of eight columns: a vector a rank, a vector a row. */
typedef __m256 Weights[RANKS_TRANSPOSED];
typedef __m256 Deltas[MOST_ROWS];

typedef struct {
  const Linears *linears;
  const Panel *panels;
  const int32_t *order;
  int64_t num_panels, num_rows;
  char *y;
  int64_t y_stride, y_type;
  const char *x;
  int64_t x_stride, x_type;
  float *wide;   /* [num_rows, num_in], in the rows' order; only where x is not float32 */
  float *hidden; /* [num_rows, hidden_stride] */
  int64_t hidden_stride;
  int64_t num_columns; /* of a unit of expand */
} Step;

INLINE void prefetch(const char *from, int64_t num_bytes) {
  for (int64_t at = 0; at < num_bytes; at += BYTES_A_LINE) _mm_prefetch(from + at, _MM_HINT_T0);
}

INLINE __m256i tail_mask(int64_t left) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)left), lane);
}

INLINE float sum_of(__m256 v) {
  const __m256 v8[8] = {v, v, v, v, v, v, v, v};
  return _mm256_cvtss_f32(sums_of(v8));
}

/* As ``load``; halves by one shuffle within each half of a register, which has the eight of them twice. */
INLINE __m256 load_weights(const char *from, const int type) {
  if (type == TYPE_FLOAT32) return _mm256_loadu_ps((const float *)from);
  const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, /* the first four */
                                          -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, places));
}

/* As ``load``, where only the first ``left`` of eight are there to be read; zeros for the others. */
INLINE __m256 load_end(const char *from, int64_t left, int64_t type) {
  if (type == TYPE_FLOAT32) return _mm256_maskload_ps((const float *)from, tail_mask(left));
  uint16_t end[LANES] = {0};
  memcpy(end, from, left * sizeof *end);
  return load((const char *)end, type);
}

/* ---- shrink: hidden = x A^T ------------------------------------------------------------------------------------ */

/* Eight inputs more, from the k-th on; ``a`` is there already. */
INLINE void shrink_lanes(const int num_rows, const int num_ranks, const int type, const float *const *x, const char *a,
                         int64_t stride, int64_t k, __m256 *sums) {
  __m256 rows[4];
  UNROLL for (int row = 0; row < num_rows; row++) rows[row] = _mm256_loadu_ps(x[row] + k);
  UNROLL for (int rank = 0; rank < num_ranks; rank++) {
    const __m256 weights = load_weights(a + rank * stride, type);
    UNROLL for (int row = 0; row < num_rows; row++) {
      __m256 *sum = &sums[row * num_ranks + rank];
      *sum = _mm256_fmadd_ps(rows[row], weights, *sum);
    }
  }
}

/* num_rows rows by num_ranks rows of A, num_rows x num_ranks at most 8: as many independent sums as hide the
 * latency. */
INLINE void shrink_tile(const int num_rows, const int num_ranks, const int type, const float *const *x, const char *a,
                        int64_t num_in, float *const *out) {
  const int64_t size = size_of(type), stride = num_in * size;
  __m256 sums[8];
  UNROLL for (int i = 0; i < num_rows * num_ranks; i++) sums[i] = _mm256_setzero_ps();
  for (int rank = 0; rank < num_ranks; rank++) prefetch(a + rank * stride, PREFETCHED_BYTES);
  int64_t k = 0;
  for (; k + BYTES_A_LINE / size <= num_in; k += BYTES_A_LINE / size) {
    UNROLL for (int rank = 0; rank < num_ranks; rank++)
      _mm_prefetch(a + rank * stride + k * size + PREFETCHED_BYTES, _MM_HINT_T0);
    UNROLL for (int64_t lanes = 0; lanes < BYTES_A_LINE / size; lanes += LANES)
      shrink_lanes(num_rows, num_ranks, type, x, a + (k + lanes) * size, stride, k + lanes, sums);
  }
  for (; k + LANES <= num_in; k += LANES)
    shrink_lanes(num_rows, num_ranks, type, x, a + k * size, stride, k, sums);
  if (k < num_in) {
    const __m256i mask = tail_mask(num_in - k);
    UNROLL for (int row = 0; row < num_rows; row++) {
      const __m256 values = _mm256_maskload_ps(x[row] + k, mask);
      UNROLL for (int rank = 0; rank < num_ranks; rank++) {
        const __m256 weights = load_end(a + rank * stride + k * size, num_in - k, type);
        __m256 *sum = &sums[row * num_ranks + rank];
        *sum = _mm256_fmadd_ps(values, weights, *sum);
      }
    }
  }
  UNROLL for (int row = 0; row < num_rows; row++)
    UNROLL for (int rank = 0; rank < num_ranks; rank++) out[row][rank] = sum_of(sums[row * num_ranks + rank]);
}

/* Eight rows of A for up to four rows of x. */
INLINE void shrink_rows(int num_rows, const int type, const float *const *x, const char *a, int64_t num_in,
                        float *const *out) {
  const int64_t stride = num_in * size_of(type);
  float *at[4];
  switch (num_rows) {
  case 1:
    shrink_tile(1, 8, type, x, a, num_in, out);
    return;
  case 2:
    for (int rank = 0; rank < RANKS_AT_ONCE; rank += 4) {
      for (int row = 0; row < 2; row++) at[row] = out[row] + rank;
      shrink_tile(2, 4, type, x, a + rank * stride, num_in, at);
    }
    return;
  case 3:
    for (int rank = 0; rank < RANKS_AT_ONCE; rank += 2) {
      for (int row = 0; row < 3; row++) at[row] = out[row] + rank;
      shrink_tile(3, 2, type, x, a + rank * stride, num_in, at);
    }
    return;
  default:
    for (int rank = 0; rank < RANKS_AT_ONCE; rank += 2) {
      for (int row = 0; row < 4; row++) at[row] = out[row] + rank;
      shrink_tile(4, 2, type, x, a + rank * stride, num_in, at);
    }
  }
}

INLINE void shrink_panel(const Step *step, const Panel *panel, const Entry *entry, const int type, int64_t first_rank,
                         int64_t hidden_column) {
  const int64_t num_in = step->linears->num_in;
  const char *a = (const char *)(intptr_t)entry->a + first_rank * num_in * size_of(type);
  for (int start = 0; start < panel->count; start += 4) {
    const int num_rows = panel->count - start < 4 ? panel->count - start : 4;
    const float *x[4];
    float *out[4];
    for (int row = 0; row < num_rows; row++) {
      const int64_t place = panel->start + start + row;
      x[row] = step->x_type == TYPE_FLOAT32 ? (const float *)step->x + step->order[place] * step->x_stride
                                            : step->wide + place * num_in;
      out[row] = step->hidden + place * step->hidden_stride + hidden_column + first_rank;
    }
    shrink_rows(num_rows, type, x, a, num_in, out);
  }
}

FAST static void shrink_floats(const Step *step, const Panel *panel, const Entry *entry, int64_t first_rank,
                               int64_t hidden_column) {
  shrink_panel(step, panel, entry, TYPE_FLOAT32, first_rank, hidden_column);
}

FAST static void shrink_halves(const Step *step, const Panel *panel, const Entry *entry, int64_t first_rank,
                               int64_t hidden_column) {
  shrink_panel(step, panel, entry, TYPE_BFLOAT16, first_rank, hidden_column);
}

/* ---- expand: y = round(y + hidden B^T) --------------------------------------------------------------------------- */

/* DoRA: y + ((scale - 1) (y - bias) + scale delta), y - bias in the wider dtype of both; as adapters.ops.torch_ops. */
INLINE __m256 with_dora(__m256 y, __m256 delta, const float *scale, const char *bias, int64_t bias_type, int64_t type) {
  const __m256 m = _mm256_loadu_ps(scale);
  __m256 unbiased = y;
  if (bias) unbiased = _mm256_sub_ps(y, load(bias, bias_type));
  if (bias && type == TYPE_BFLOAT16 && bias_type == TYPE_BFLOAT16) unbiased = rounded(unbiased);
  const __m256 kept = _mm256_mul_ps(_mm256_sub_ps(m, _mm256_set1_ps(1.0f)), unbiased);
  return _mm256_add_ps(y, _mm256_add_ps(kept, _mm256_mul_ps(m, delta)));
}

/* Eight rows of B, eight ranks of each -> eight vectors, one a rank. */
INLINE void transpose_floats(const float *b, int64_t stride, __m256 *to) {
  __m256 r[8], t[8];
  UNROLL for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(b + i * stride);
  UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    to[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    to[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
}

/* The same of halves: pairs of ranks are transposed as numbers of 32 bits, and taken apart at the end. */
INLINE void transpose_halves(const uint16_t *b, int64_t stride, __m256 *to) {
  __m256i r[4], t[4];
  UNROLL for (int i = 0; i < 4; i++) {
    const __m128i low = _mm_loadu_si128((const __m128i *)(b + i * stride));
    r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   _mm_loadu_si128((const __m128i *)(b + (i + 4) * stride)), 1);
  }
  UNROLL for (int i = 0; i < 4; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 2; i++) {
    r[2 * i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[2 * i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    to[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(r[i], 16));
    to[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(r[i], _mm256_set1_epi32((int)0xffff0000u)));
  }
}

INLINE void transpose(const char *b, int64_t stride, const int type, __m256 *to) {
  if (type == TYPE_FLOAT32)
    transpose_floats((const float *)b, stride, to);
  else
    transpose_halves((const uint16_t *)b, stride, to);
}

/* sums [2][num_rows] of two times eight columns, each over the ranks in order; h [num_rows, stride], b [2][num_ranks].
 * Two at once: beside a single row's sum, which waits for itself, another is under way. */
INLINE void expand_rows(const int num_rows, const float *h, int64_t stride, const Weights *b, int64_t num_ranks,
                        Deltas *sums, int at) {
  __m256 low[4], high[4];
  UNROLL for (int row = 0; row < num_rows; row++) {
    low[row] = sums[0][at + row];
    high[row] = sums[1][at + row];
  }
  for (int64_t rank = 0; rank < num_ranks; rank++) {
    const __m256 weights = b[0][rank], more = b[1][rank];
    UNROLL for (int row = 0; row < num_rows; row++) {
      const __m256 hidden = _mm256_broadcast_ss(h + row * stride + rank);
      low[row] = _mm256_fmadd_ps(hidden, weights, low[row]);
      high[row] = _mm256_fmadd_ps(hidden, more, high[row]);
    }
  }
  UNROLL for (int row = 0; row < num_rows; row++) {
    sums[0][at + row] = low[row];
    sums[1][at + row] = high[row];
  }
}

/* Two times eight columns of a panel's rows. h [num_rows, stride] are its hidden rows, b sixteen rows of B. */
INLINE void deltas_of(const float *h, int64_t stride, int num_rows, const char *b, const int type, int64_t rank,
                      Deltas *deltas) {
  const int64_t size = size_of(type);
  Weights weights[2];
  for (int half = 0; half < 2; half++) memset(deltas[half], 0, sizeof(__m256) * num_rows);
  for (int64_t first = 0; first < rank; first += RANKS_TRANSPOSED) {
    const int64_t count = rank - first < RANKS_TRANSPOSED ? rank - first : RANKS_TRANSPOSED;
    for (int64_t k = 0; k < count; k += LANES)
      UNROLL for (int half = 0; half < 2; half++)
        transpose(b + (half * LANES * rank + first + k) * size, rank, type, weights[half] + k);
    for (int row = 0; row < num_rows;) {
      const float *at = h + row * stride + first;
      const int left = num_rows - row, taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      switch (taken) {
      case 4: expand_rows(4, at, stride, weights, count, deltas, row); break;
      case 2: expand_rows(2, at, stride, weights, count, deltas, row); break;
      default: expand_rows(1, at, stride, weights, count, deltas, row);
      }
      row += taken;
    }
  }
}

/* The same of a panel of one row, as decodes are: nothing is laid down to be used again. */
INLINE void deltas_of_one(const float *h, const char *b, const int type, int64_t rank, Deltas *deltas) {
  const int64_t size = size_of(type);
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t k = 0; k < rank; k += LANES)
    UNROLL for (int half = 0; half < 2; half++) {
      __m256 weights[LANES];
      transpose(b + (half * LANES * rank + k) * size, rank, type, weights);
      UNROLL for (int i = 0; i < LANES; i++)
        sums[half] = _mm256_fmadd_ps(_mm256_broadcast_ss(h + k + i), weights[i], sums[half]);
    }
  for (int half = 0; half < 2; half++) deltas[half][0] = sums[half];
}

INLINE __m256 joined(__m256 y, __m256 delta, int64_t type, int64_t rounding) {
  if (type == TYPE_BFLOAT16 && rounding == ROUND_DELTA) delta = rounded(delta);
  return _mm256_add_ps(y, delta);
}

/* y, eight columns of one row, and what lies beside them: DoRA's scale and, for it, the bias (both 0 without). */
INLINE void add_delta(const Step *step, char *y, __m256 delta, const float *scale, const char *bias,
                      int64_t bias_type) {
  const int64_t type = step->y_type;
  const __m256 base = load(y, type);
  const __m256 sum = scale ? with_dora(base, delta, scale, bias, bias_type, type)
                           : joined(base, delta, type, step->linears->rounding);
  store(y, rounded_to(sum, type), type);
}

/* The same where only ``left`` columns are there: B's rows are padded to a multiple of 16, not so y, scale and bias. */
INLINE void add_end(const Step *step, char *y, __m256 delta, const float *scale, const char *bias, int64_t bias_type,
                    int64_t left) {
  const int64_t size = left * size_of(step->y_type);
  char y_end[32] = {0}, bias_end[32] = {0};
  float scale_end[8] = {0};
  memcpy(y_end, y, size);
  if (bias) memcpy(bias_end, bias, left * size_of(bias_type));
  if (scale) memcpy(scale_end, scale, left * sizeof(float));
  add_delta(step, y_end, delta, scale ? scale_end : 0, bias ? bias_end : 0, bias_type);
  memcpy(y, y_end, size);
}

/* Eight columns of a panel's rows; those that are there, where ``left`` are less. */
INLINE void add_deltas(const Step *step, const Panel *panel, const Site *site, const float *scale, int64_t column,
                       int64_t left, const __m256 *deltas) {
  const int64_t size = size_of(step->y_type);
  const char *bias = site->bias ? (const char *)(intptr_t)site->bias + column * size_of(site->bias_type) : 0;
  if (scale) scale += column;
  for (int row = 0; row < panel->count; row++) {
    const int64_t place = step->order[panel->start + row];
    char *y = step->y + (place * step->y_stride + site->first_column + column) * size;
    if (left < LANES)
      add_end(step, y, deltas[row], scale, bias, site->bias_type, left);
    else
      add_delta(step, y, deltas[row], scale, bias, site->bias_type);
  }
}

INLINE void expand_panel(const Step *step, const Panel *panel, const Entry *entry, const int type, const Site *site,
                         int64_t first, int64_t hidden_column) {
  const int64_t rank = entry->rank, stride = rank * size_of(type);
  const char *b = (const char *)(intptr_t)entry->b;
  const float *scale = (const float *)(intptr_t)entry->scale;
  const float *hidden = step->hidden + panel->start * step->hidden_stride + hidden_column;
  const int64_t end = first + step->num_columns < site->width ? first + step->num_columns : site->width;
  prefetch(b + first * stride, COLUMNS_AHEAD * stride);
  for (int64_t column = first; column < end; column += COLUMNS_AT_ONCE) {
    prefetch(b + (column + COLUMNS_AHEAD) * stride, COLUMNS_AT_ONCE * stride);
    Deltas deltas[2];
    if (panel->count == 1)
      deltas_of_one(hidden, b + column * stride, type, rank, deltas);
    else
      deltas_of(hidden, step->hidden_stride, panel->count, b + column * stride, type, rank, deltas);
    for (int half = 0; half < 2; half++) {
      const int64_t at = column + half * LANES, left = end - at;
      if (left > 0) add_deltas(step, panel, site, scale, at, left, deltas[half]);
    }
  }
}

FAST static void expand_floats(const Step *step, const Panel *panel, const Entry *entry, const Site *site,
                               int64_t first, int64_t hidden_column) {
  expand_panel(step, panel, entry, TYPE_FLOAT32, site, first, hidden_column);
}

FAST static void expand_halves(const Step *step, const Panel *panel, const Entry *entry, const Site *site,
                               int64_t first, int64_t hidden_column) {
  expand_panel(step, panel, entry, TYPE_BFLOAT16, site, first, hidden_column);
}

/* ---- a call ------------------------------------------------------------------------------------------------------ */

static const Entry *entry_of(const Linears *linears, int64_t site, int64_t slot) {
  return linears->entries + site * linears->num_slots + slot;
}

/* Where a site's part of a slot's hidden row begins: after those of the sites before it. */
static int64_t hidden_column_of(const Linears *linears, int64_t site, int64_t slot) {
  int64_t column = 0;
  for (int64_t before = 0; before < site; before++) column += entry_of(linears, before, slot)->rank;
  return column;
}

static void shrink_unit(const Step *step, int64_t unit, int64_t num_chunks) {
  const int64_t chunk = unit % num_chunks, site = unit / num_chunks % step->linears->num_sites;
  const Panel *panel = &step->panels[unit / num_chunks / step->linears->num_sites];
  const Entry *entry = entry_of(step->linears, site, panel->slot);
  if (chunk * RANKS_AT_ONCE >= entry->rank) return;
  const int64_t hidden_column = hidden_column_of(step->linears, site, panel->slot);
  (entry->type == TYPE_FLOAT32 ? shrink_floats : shrink_halves)(step, panel, entry, chunk * RANKS_AT_ONCE,
                                                                hidden_column);
}

static void expand_unit(const Step *step, int64_t unit, int64_t num_chunks) {
  const int64_t chunk = unit % num_chunks, site = unit / num_chunks % step->linears->num_sites;
  const Panel *panel = &step->panels[unit / num_chunks / step->linears->num_sites];
  const Entry *entry = entry_of(step->linears, site, panel->slot);
  const Site *of = &step->linears->sites[site];
  const int64_t first = chunk * step->num_columns;
  if (!entry->rank || first >= of->width) return;
  const int64_t hidden_column = hidden_column_of(step->linears, site, panel->slot);
  (entry->type == TYPE_FLOAT32 ? expand_floats : expand_halves)(step, panel, entry, of, first, hidden_column);
}

/* Whole steps, as many as leave every thread several units. */
static int64_t columns_of_a_unit(int64_t num_columns, int num_threads) {
  const int64_t share = num_columns / (num_threads * UNITS_A_THREAD) / COLUMNS_AT_ONCE * COLUMNS_AT_ONCE;
  return share < FEWEST_COLUMNS ? FEWEST_COLUMNS : share < MOST_COLUMNS ? share : MOST_COLUMNS;
}

/* hidden_stride: at least the sum of the ranks of any slot's sites. Returns 0, or 1 where there is no memory for
 * scratch. */
int lorikeet_add_adapters(const Linears *linears, const Panel *panels, int64_t num_panels, const int32_t *order,
                          int64_t num_rows, void *y, int64_t y_stride, int64_t y_type, const void *x,
                          int64_t x_stride, int64_t x_type, int64_t hidden_stride, int64_t num_threads) {
  const int64_t num_wide = x_type == TYPE_FLOAT32 ? 0 : num_rows * linears->num_in;
  float *wide = lorikeet_scratch((size_t)(num_wide + num_rows * hidden_stride)), *hidden = wide + num_wide;
  if (!wide) return 1;
  int64_t max_rank = 0, max_width = 0, products = 0;
  for (int64_t site = 0; site < linears->num_sites; site++) {
    const int64_t width = linears->sites[site].width;
    if (width > max_width) max_width = width;
    for (int64_t panel = 0; panel < num_panels; panel++) {
      const int64_t rank = entry_of(linears, site, panels[panel].slot)->rank;
      if (rank > max_rank) max_rank = rank;
      products += rank * panels[panel].count * (linears->num_in + width);
    }
  }
  if (!max_rank) return 0;
  const int64_t num_chunks = (max_rank + RANKS_AT_ONCE - 1) / RANKS_AT_ONCE;
  const int threads = threads_for(products, num_threads);
  const int64_t num_columns = columns_of_a_unit(num_panels * linears->num_sites * max_width, threads);
  const int64_t num_cuts = (max_width + num_columns - 1) / num_columns;
  const int64_t num_shrinks = num_panels * linears->num_sites * num_chunks;
  const int64_t num_expands = num_panels * linears->num_sites * num_cuts;
  const Step step = {linears, panels, order,    num_panels, num_rows, y,      y_stride,
                     y_type,  x,      x_stride, x_type,     wide,     hidden, hidden_stride, num_columns};
#pragma omp parallel num_threads(threads)
  {
    if (x_type != TYPE_FLOAT32) {
#pragma omp for schedule(static)
      for (int64_t place = 0; place < num_rows; place++)
        widen_row((const uint16_t *)x + order[place] * x_stride, wide + place * linears->num_in, linears->num_in);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < num_shrinks; unit++) shrink_unit(&step, unit, num_chunks);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < num_expands; unit++) expand_unit(&step, unit, num_cuts);
  }
  return 0;
}
#endif
