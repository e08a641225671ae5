/* add_lora on a CPU: the adapters of a whole batch added to the output of linears that share an input, in one call.
 *
 * Memory is read once and in place: no row is gathered or padded, no weight copied, no row of x widened twice. For each
 * run of rows of one slot, h = x A^T (shrink), then y += h B^T (expand), rounded as PEFT does (adapters.ops.torch_ops).
 *
 * A row has the same bits in every batch: each number of h and y is one thread's sum, in one fixed order (eight partial
 * sums over the input in steps of eight, then a tree; over the ranks one after another), whatever rows stand beside it
 * and however the work is cut. Hence fused multiply-adds are written out, and contraction is off.
 *
 * Nothing here is Python's: it is loaded through ctypes, after torch, whose OpenMP runtime (and so its threads) it
 * uses.
 */
#include "vectors.h"

#ifdef LORIKEET_HAS_KERNELS

enum { MOST_ROWS = 64, RANKS_TRANSPOSED = 64 }; /* of a panel; at once */
enum { RANKS_AT_ONCE = 8, FLOATS_A_LINE = 16 };
/* Of B at a time: long stretches are read faster. */
enum { FEWEST_COLUMNS = 256, MOST_COLUMNS = 2048, UNITS_A_THREAD = 4 };
/* Weights come from memory once a step: half as fast without a hint. */
enum { PREFETCHED_FLOATS = 128, GROUPS_AHEAD = 8 };
enum { ROUND_DELTA = 0, ROUND_SUM = 1 };
enum { FIELD_A, FIELD_B, FIELD_SCALE, FIELD_RANK, NUM_FIELDS };

/* One of the linears: its columns of y, and the address of its bias (0 without), which only DoRA asks for. */
typedef struct {
  int64_t first_column, width, bias, bias_type;
} Site;

/* All that is the same for every step; entries [num_sites, num_slots, 4] is adapters.ops.entries' table. */
typedef struct {
  const int64_t *entries;
  const Site *sites;
  int64_t num_sites, num_slots, num_in, rounding;
} Linears;

/* At most MOST_ROWS rows of one slot: order[start .. start + count) are their places in x and y. */
typedef struct {
  int32_t slot, start, count;
} Panel;

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

INLINE __m256i tail_mask(int64_t left) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)left), lane);
}

INLINE float sum_of(__m256 v) {
  const __m256 v8[8] = {v, v, v, v, v, v, v, v};
  return _mm256_cvtss_f32(sums_of(v8));
}

/* ---- shrink: hidden = x A^T ------------------------------------------------------------------------------------ */

/* num_rows rows by num_ranks rows of A, num_rows x num_ranks at most 8: as many independent sums as hide the
 * latency. */
INLINE void shrink_tile(const int num_rows, const int num_ranks, const float *const *x, const float *a, int64_t num_in,
                        float *const *out) {
  __m256 sums[8];
  UNROLL for (int i = 0; i < num_rows * num_ranks; i++) sums[i] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + LANES <= num_in; k += LANES) {
    __m256 rows[4];
    UNROLL for (int row = 0; row < num_rows; row++) rows[row] = _mm256_loadu_ps(x[row] + k);
    UNROLL for (int rank = 0; rank < num_ranks; rank++) {
      const __m256 weights = _mm256_loadu_ps(a + rank * num_in + k);
      _mm_prefetch((const char *)(a + rank * num_in + k + PREFETCHED_FLOATS), _MM_HINT_T0);
      UNROLL for (int row = 0; row < num_rows; row++) {
        __m256 *sum = &sums[row * num_ranks + rank];
        *sum = _mm256_fmadd_ps(rows[row], weights, *sum);
      }
    }
  }
  if (k < num_in) {
    const __m256i mask = tail_mask(num_in - k);
    UNROLL for (int row = 0; row < num_rows; row++) {
      const __m256 values = _mm256_maskload_ps(x[row] + k, mask);
      UNROLL for (int rank = 0; rank < num_ranks; rank++) {
        const __m256 weights = _mm256_maskload_ps(a + rank * num_in + k, mask);
        __m256 *sum = &sums[row * num_ranks + rank];
        *sum = _mm256_fmadd_ps(values, weights, *sum);
      }
    }
  }
  UNROLL for (int row = 0; row < num_rows; row++)
    UNROLL for (int rank = 0; rank < num_ranks; rank++) out[row][rank] = sum_of(sums[row * num_ranks + rank]);
}

/* Eight rows of A for up to four rows of x. */
FAST static void shrink_rows(int num_rows, const float *const *x, const float *a, int64_t num_in, float *const *out) {
  float *at[4];
  switch (num_rows) {
  case 1:
    shrink_tile(1, 8, x, a, num_in, out);
    return;
  case 2:
    for (int rank = 0; rank < RANKS_AT_ONCE; rank += 4) {
      for (int row = 0; row < 2; row++) at[row] = out[row] + rank;
      shrink_tile(2, 4, x, a + rank * num_in, num_in, at);
    }
    return;
  case 3:
    for (int rank = 0; rank < RANKS_AT_ONCE; rank += 2) {
      for (int row = 0; row < 3; row++) at[row] = out[row] + rank;
      shrink_tile(3, 2, x, a + rank * num_in, num_in, at);
    }
    return;
  default:
    for (int rank = 0; rank < RANKS_AT_ONCE; rank += 2) {
      for (int row = 0; row < 4; row++) at[row] = out[row] + rank;
      shrink_tile(4, 2, x, a + rank * num_in, num_in, at);
    }
  }
}

FAST static void shrink_panel(const Step *step, const Panel *panel, const int64_t *entry, int64_t first_rank,
                              int64_t hidden_column) {
  const int64_t num_in = step->linears->num_in;
  const float *a = (const float *)(intptr_t)entry[FIELD_A] + first_rank * num_in;
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
    shrink_rows(num_rows, x, a, num_in, out);
  }
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
INLINE void transpose(const float *b, int64_t stride, __m256 *to) {
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

/* sums [num_rows] of eight columns, each over the ranks in order; h [num_rows, stride], b [num_ranks]. */
INLINE void expand_rows(const int num_rows, const float *h, int64_t stride, const __m256 *b, int64_t num_ranks,
                        __m256 *sums) {
  __m256 own[8];
  UNROLL for (int row = 0; row < num_rows; row++) own[row] = sums[row];
  for (int64_t rank = 0; rank < num_ranks; rank++) {
    const __m256 weights = b[rank];
    UNROLL for (int row = 0; row < num_rows; row++)
      own[row] = _mm256_fmadd_ps(_mm256_broadcast_ss(h + row * stride + rank), weights, own[row]);
  }
  UNROLL for (int row = 0; row < num_rows; row++) sums[row] = own[row];
}

/* Eight columns of a panel's rows. h [num_rows, stride] are its hidden rows, b eight rows of B. */
INLINE void deltas_of(const float *h, int64_t stride, int num_rows, const float *b, int64_t rank, __m256 *deltas) {
  __m256 weights[RANKS_TRANSPOSED];
  memset(deltas, 0, sizeof(__m256) * num_rows);
  for (int64_t first = 0; first < rank; first += RANKS_TRANSPOSED) {
    const int64_t count = rank - first < RANKS_TRANSPOSED ? rank - first : RANKS_TRANSPOSED;
    for (int64_t k = 0; k < count; k += LANES) transpose(b + first + k, rank, weights + k);
    for (int row = 0; row < num_rows;) {
      const float *at = h + row * stride + first;
      const int left = num_rows - row, taken = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      switch (taken) {
      case 8: expand_rows(8, at, stride, weights, count, deltas + row); break;
      case 4: expand_rows(4, at, stride, weights, count, deltas + row); break;
      case 2: expand_rows(2, at, stride, weights, count, deltas + row); break;
      default: expand_rows(1, at, stride, weights, count, deltas + row);
      }
      row += taken;
    }
  }
}

INLINE __m256 joined(__m256 y, __m256 delta, int64_t type, int64_t rounding) {
  if (type == TYPE_BFLOAT16 && rounding == ROUND_DELTA) delta = rounded(delta);
  return _mm256_add_ps(y, delta);
}

FAST static void expand_panel(const Step *step, const Panel *panel, const int64_t *entry, const Site *site,
                              int64_t first, int64_t hidden_column) {
  const int64_t rank = entry[FIELD_RANK], type = step->y_type, size = size_of(type);
  const int64_t bias_size = size_of(site->bias_type);
  const float *b = (const float *)(intptr_t)entry[FIELD_B];
  const float *scale = (const float *)(intptr_t)entry[FIELD_SCALE];
  const char *bias = (const char *)(intptr_t)site->bias;
  const float *hidden = step->hidden + panel->start * step->hidden_stride + hidden_column;
  const int64_t end = first + step->num_columns < site->width ? first + step->num_columns : site->width;
  for (int64_t column = first; column < end; column += LANES) {
    for (int64_t ahead = 0; ahead < LANES * rank; ahead += FLOATS_A_LINE)
      _mm_prefetch((const char *)(b + (column + GROUPS_AHEAD * LANES) * rank + ahead), _MM_HINT_T0);
    const int64_t left = end - column < LANES ? end - column : LANES;
    __m256 deltas[MOST_ROWS];
    deltas_of(hidden, step->hidden_stride, panel->count, b + column * rank, rank, deltas);
    for (int row = 0; row < panel->count; row++) {
      const int64_t place = panel->start + row;
      char *y = step->y + (step->order[place] * step->y_stride + site->first_column + column) * size;
      /* B's rows are padded to a multiple of 16, those of y, scale and bias are not: a short end goes through copies */
      char y_end[32] = {0}, bias_end[32] = {0};
      float scale_end[8] = {0};
      char *at = y;
      const char *bias_at = bias ? bias + column * bias_size : 0;
      const float *scale_at = scale ? scale + column : 0;
      if (left < LANES) {
        memcpy(y_end, y, left * size);
        at = y_end;
        if (bias) bias_at = memcpy(bias_end, bias_at, left * bias_size);
        if (scale) scale_at = memcpy(scale_end, scale_at, left * sizeof(float));
      }
      const __m256 base = load(at, type);
      const __m256 delta = deltas[row];
      __m256 sum = scale ? with_dora(base, delta, scale_at, bias_at, site->bias_type, type)
                         : joined(base, delta, type, step->linears->rounding);
      if (type == TYPE_BFLOAT16) sum = rounded(sum);
      store(at, sum, type);
      if (left < LANES) memcpy(y, y_end, left * size);
    }
  }
}

/* ---- a call ------------------------------------------------------------------------------------------------------ */

static const int64_t *entry_of(const Linears *linears, int64_t site, int64_t slot) {
  return linears->entries + (site * linears->num_slots + slot) * NUM_FIELDS;
}

/* Where a site's part of a slot's hidden row begins: after those of the sites before it. */
static int64_t hidden_column_of(const Linears *linears, int64_t site, int64_t slot) {
  int64_t column = 0;
  for (int64_t before = 0; before < site; before++) column += entry_of(linears, before, slot)[FIELD_RANK];
  return column;
}

static void shrink_unit(const Step *step, int64_t unit, int64_t num_chunks) {
  const int64_t chunk = unit % num_chunks, site = unit / num_chunks % step->linears->num_sites;
  const Panel *panel = &step->panels[unit / num_chunks / step->linears->num_sites];
  const int64_t *entry = entry_of(step->linears, site, panel->slot);
  if (chunk * RANKS_AT_ONCE < entry[FIELD_RANK])
    shrink_panel(step, panel, entry, chunk * RANKS_AT_ONCE, hidden_column_of(step->linears, site, panel->slot));
}

static void expand_unit(const Step *step, int64_t unit, int64_t num_chunks) {
  const int64_t chunk = unit % num_chunks, site = unit / num_chunks % step->linears->num_sites;
  const Panel *panel = &step->panels[unit / num_chunks / step->linears->num_sites];
  const int64_t *entry = entry_of(step->linears, site, panel->slot);
  const Site *of = &step->linears->sites[site];
  const int64_t first = chunk * step->num_columns;
  if (entry[FIELD_RANK] && first < of->width)
    expand_panel(step, panel, entry, of, first, hidden_column_of(step->linears, site, panel->slot));
}

/* Whole lanes, as many as leave every thread several units. */
static int64_t columns_of_a_unit(int64_t num_columns, int num_threads) {
  const int64_t share = num_columns / (num_threads * UNITS_A_THREAD) / LANES * LANES;
  return share < FEWEST_COLUMNS ? FEWEST_COLUMNS : share < MOST_COLUMNS ? share : MOST_COLUMNS;
}

/* hidden_stride: at least the sum of the ranks of any slot's sites. Returns 0, or 1 where there is no memory for
 * scratch. */
int lorikeet_add_lora(const Linears *linears, const Panel *panels, int64_t num_panels, const int32_t *order,
                       int64_t num_rows, void *y, int64_t y_stride, int64_t y_type, const void *x, int64_t x_stride,
                       int64_t x_type, int64_t hidden_stride, int64_t num_threads) {
  const int64_t num_wide = x_type == TYPE_FLOAT32 ? 0 : num_rows * linears->num_in;
  float *wide = lorikeet_scratch((size_t)(num_wide + num_rows * hidden_stride)), *hidden = wide + num_wide;
  if (!wide) return 1;
  int64_t max_rank = 0, max_width = 0, products = 0;
  for (int64_t site = 0; site < linears->num_sites; site++) {
    const int64_t width = linears->sites[site].width;
    if (width > max_width) max_width = width;
    for (int64_t panel = 0; panel < num_panels; panel++) {
      const int64_t rank = entry_of(linears, site, panels[panel].slot)[FIELD_RANK];
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
