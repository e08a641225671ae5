/* One token a row, from logits, as engine/selection.py says it, which is the plain twin: to the bit, since sums are of
 * integers and the exponential is the one of engine/exponential.py, operation by operation. So no order of addition, no
 * number of threads and no other row changes a choice.
 *
 * A row is one thread's. What top_k and top_p cut off is found without sorting the row: its tokens are counted and
 * summed in bins of equal width, from the likeliest down, and only the bins in which something is sought are sorted.
 */
#include "vectors.h"

#include <math.h>

#ifdef LORIKEET_HAS_KERNELS

enum { NO_TOKEN = -1, NO_MEMORY = -2 };
enum { DOUBLES = 4, VECTORS = 4, STEP = DOUBLES * VECTORS };
enum { BLOCKS = 256, BINS = 2048, DIGITS = 256, BITS_A_DIGIT = 8, BITS_OF_AN_ID = 32 };
static const double LOWEST = -32.0, WEIGHT_ONE = 0x1p40;

/* What is asked of a row; temperature 0 takes the likeliest. */
typedef struct {
  double temperature, top_p, min_p, top_k, uniform;
} Ask;

typedef struct {
  const float *logits;
  int64_t width;
  double best, temperature, min_p;
  float lowest; /* what is below weighs nothing, whatever was rounded */
} Row;

/* Eight logits; minus infinity behind the end. */
INLINE __m256 load_logits(const float *logits, int64_t at, int64_t width) {
  if (at + LANES <= width) return _mm256_loadu_ps(logits + at);
  float last[LANES];
  for (int i = 0; i < LANES; i++) last[i] = at + i < width ? logits[at + i] : -INFINITY;
  return _mm256_loadu_ps(last);
}

INLINE __m128 half_of(__m256 v, int which) { return which ? _mm256_extractf128_ps(v, 1) : _mm256_castps256_ps128(v); }

/* ---- the likeliest ----------------------------------------------------------------------------------------------- */

/* 0 where the row holds NaN or plus infinity, or nothing but minus infinity. */
FAST static int find_best(const float *logits, int64_t width, float *best) {
  __m256 most = _mm256_set1_ps(-INFINITY), unordered = _mm256_setzero_ps();
  for (int64_t k = 0; k < width; k += LANES) {
    const __m256 v = load_logits(logits, k, width);
    most = _mm256_max_ps(most, v);
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  float lanes[LANES];
  _mm256_storeu_ps(lanes, most);
  *best = lanes[0];
  for (int i = 1; i < LANES; i++)
    if (lanes[i] > *best) *best = lanes[i];
  return !_mm256_movemask_ps(unordered) && isfinite(*best);
}

/* The first that has this value; one does. */
FAST static int64_t place_of(float best, const float *logits, int64_t width) {
  const __m256 sought = _mm256_set1_ps(best);
  for (int64_t k = 0;; k += LANES) {
    const int found = _mm256_movemask_ps(_mm256_cmp_ps(load_logits(logits, k, width), sought, _CMP_EQ_OQ));
    if (found) return k + __builtin_ctz((unsigned)found);
  }
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

/* How far below the best, in temperatures: from -32 to 0. */
INLINE __m256d ratios_of(__m128 logits, const Row *row) {
  const __m256d below = _mm256_sub_pd(_mm256_cvtps_pd(logits), _mm256_set1_pd(row->best));
  return _mm256_max_pd(_mm256_div_pd(below, _mm256_set1_pd(row->temperature)), _mm256_set1_pd(LOWEST));
}

/* e^x for x from -32 to 0: engine/exponential.py. Several at a time, since each operation waits for the one before. */
INLINE void relative_exp(__m256d x[VECTORS]) {
  static const double terms[] = {1 / 6227020800., 1 / 479001600., 1 / 39916800., 1 / 3628800., 1 / 362880.,
                                 1 / 40320.,      1 / 5040.,      1 / 720.,      1 / 120.,     1 / 24.,
                                 1 / 6.,          1 / 2.,         1.,            1.};
  __m256d n[VECTORS], total[VECTORS];
  UNROLL for (int i = 0; i < VECTORS; i++) {
    n[i] = _mm256_round_pd(_mm256_mul_pd(x[i], _mm256_set1_pd(1.4426950408889634)),
                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x[i] = _mm256_sub_pd(x[i], _mm256_mul_pd(n[i], _mm256_set1_pd(6.93147180369123816490e-01)));
    x[i] = _mm256_sub_pd(x[i], _mm256_mul_pd(n[i], _mm256_set1_pd(1.90821492927058770002e-10)));
    total[i] = _mm256_set1_pd(terms[0]);
  }
  _Pragma("GCC unroll 16") for (int term = 1; term < 14; term++)
      UNROLL for (int i = 0; i < VECTORS; i++)
          total[i] = _mm256_add_pd(_mm256_mul_pd(total[i], x[i]), _mm256_set1_pd(terms[term]));
  /* times 2^n, by the exponent: the sum is between 0.7 and 1.5 */
  UNROLL for (int i = 0; i < VECTORS; i++) {
    const __m256i power = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n[i])), 52);
    x[i] = _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(total[i]), power));
  }
}

/* Of ratios the weights: integers, as doubles, shares of 2^40 of the best one's. */
INLINE void weigh(__m256d v[VECTORS], const Row *row) {
  relative_exp(v);
  UNROLL for (int i = 0; i < VECTORS; i++) {
    const __m256d kept = _mm256_and_pd(v[i], _mm256_cmp_pd(v[i], _mm256_set1_pd(row->min_p), _CMP_GE_OQ));
    v[i] = _mm256_round_pd(_mm256_mul_pd(kept, _mm256_set1_pd(WEIGHT_ONE)), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  }
}

/* The ratios of STEP tokens; 0 where none of them has weight. */
INLINE int load_ratios(const Row *row, int64_t at, __m256d ratios[VECTORS]) {
  const __m256 lowest = _mm256_set1_ps(row->lowest);
  const __m256 low = load_logits(row->logits, at, row->width), high = load_logits(row->logits, at + LANES, row->width);
  const __m256 most = _mm256_max_ps(low, high);
  if (!_mm256_movemask_ps(_mm256_cmp_ps(most, lowest, _CMP_GE_OQ))) return 0;
  UNROLL for (int i = 0; i < VECTORS; i++) ratios[i] = ratios_of(half_of(i < 2 ? low : high, i & 1), row);
  return 1;
}

/* A block has at most 2^15 tokens, so that its sums stay exact in doubles. */
INLINE int64_t sum_of_block(const Row *row, int64_t first, int64_t end) {
  __m256d sum = _mm256_setzero_pd(), v[VECTORS];
  for (int64_t k = first; k < end; k += STEP) {
    if (!load_ratios(row, k, v)) continue;
    weigh(v, row);
    sum = _mm256_add_pd(sum, _mm256_add_pd(_mm256_add_pd(v[0], v[1]), _mm256_add_pd(v[2], v[3])));
  }
  double lanes[DOUBLES];
  _mm256_storeu_pd(lanes, sum);
  return (int64_t)lanes[0] + (int64_t)lanes[1] + (int64_t)lanes[2] + (int64_t)lanes[3];
}

static inline int64_t share_of(double uniform, int64_t total) {
  const int64_t share = (int64_t)(uniform * (double)total);
  return share < total ? share : total - 1;
}

/* ---- all tokens, in their own order ------------------------------------------------------------------------------ */

/* The first token of a block at which the sum, up_to so far, passes the share; one does. */
FAST static int64_t pick(const Row *row, int64_t first, int64_t up_to, int64_t share) {
  for (int64_t k = first;; k += STEP) {
    __m256d v[VECTORS];
    if (!load_ratios(row, k, v)) continue;
    weigh(v, row);
    double weights[STEP];
    UNROLL for (int i = 0; i < VECTORS; i++) _mm256_storeu_pd(weights + i * DOUBLES, v[i]);
    for (int i = 0; i < STEP; i++)
      if ((up_to += (int64_t)weights[i]) > share) return k + i;
  }
}

FAST static int64_t draw(const Row *row, double uniform) {
  const int64_t block = (row->width / BLOCKS / STEP + 1) * STEP;
  int64_t sums[BLOCKS], total = 0;
  for (int i = 0; i < BLOCKS; i++) {
    const int64_t end = (i + 1) * block;
    total += sums[i] = sum_of_block(row, i * block, end < row->width ? end : row->width);
  }
  const int64_t share = share_of(uniform, total);
  int64_t up_to = 0;
  int place = 0;
  while (up_to + sums[place] <= share) up_to += sums[place++];
  return pick(row, place * block, up_to, share);
}

/* ---- tokens by rank ---------------------------------------------------------------------------------------------- */

/* Of each bin; the last takes what weighs nothing. */
typedef struct {
  int64_t sums[BINS + 1];
  int32_t counts[BINS + 1];
} Bins;

/* What is sought from the best rank down: the first at which one of these is reached. */
typedef struct {
  int64_t count; /* so many tokens */
  double mass;   /* so much weight */
  int64_t share; /* more weight than this */
} Goal;

typedef struct {
  int64_t id, up_to; /* the sum of the weights as far as it, itself among them */
} Found;

static inline int is_reached(const Goal *goal, int64_t count, int64_t up_to) {
  return count >= goal->count || (double)up_to >= goal->mass || up_to > goal->share;
}

INLINE void bins_of(const __m256d ratios, int32_t bins[DOUBLES]) {
  _mm_storeu_si128((__m128i *)bins, _mm256_cvttpd_epi32(_mm256_mul_pd(ratios, _mm256_set1_pd(BINS / LOWEST))));
}

FAST static void fill(Bins *bins, const Row *row) {
  memset(bins, 0, sizeof *bins);
  for (int64_t k = 0; k < row->width; k += STEP) {
    __m256d v[VECTORS];
    if (!load_ratios(row, k, v)) continue;
    int32_t places[STEP];
    double weights[STEP];
    UNROLL for (int i = 0; i < VECTORS; i++) bins_of(v[i], places + i * DOUBLES);
    weigh(v, row);
    UNROLL for (int i = 0; i < VECTORS; i++) _mm256_storeu_pd(weights + i * DOUBLES, v[i]);
    for (int i = 0; i < STEP; i++) {
      bins->sums[places[i]] += (int64_t)weights[i];
      bins->counts[places[i]]++;
    }
  }
}

/* Ascending as the value does, and one for both zeros. */
static inline int32_t key_of(float logit) {
  const float value = logit + 0.0f;
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

/* By their upper 32 bits, and otherwise as they were. items and spare change places as often as digits differ. */
static uint64_t *sort(uint64_t *items, uint64_t *spare, int64_t count) {
  for (int shift = BITS_OF_AN_ID; shift < 64; shift += BITS_A_DIGIT) {
    int64_t starts[DIGITS + 1] = {0};
    for (int64_t i = 0; i < count; i++) starts[(items[i] >> shift & (DIGITS - 1)) + 1]++;
    if (starts[(items[0] >> shift & (DIGITS - 1)) + 1] == count) continue;
    for (int digit = 0; digit < DIGITS; digit++) starts[digit + 1] += starts[digit];
    for (int64_t i = 0; i < count; i++) spare[starts[items[i] >> shift & (DIGITS - 1)]++] = items[i];
    uint64_t *const sorted = spare;
    spare = items;
    items = sorted;
  }
  return items;
}

/* A bin's tokens, by id: how far the key is below the best's in the upper half, the id in the lower. */
FAST static void gather(const Row *row, int32_t bin, int64_t count, uint64_t *items) {
  const double bin_width = row->temperature * LOWEST / BINS; /* below 0 */
  /* a bin wider on both sides than it is, so that no rounding matters */
  const __m256 most = _mm256_set1_ps((float)(row->best + bin_width * (bin - 1)));
  const __m256 low = _mm256_set1_ps((float)(row->best + bin_width * (bin + 2)));
  const uint32_t best = (uint32_t)key_of((float)row->best);
  for (int64_t k = 0, num = 0; num < count; k += LANES) {
    const __m256 logits = load_logits(row->logits, k, row->width);
    const __m256 is_below = _mm256_cmp_ps(logits, most, _CMP_LE_OQ), is_above = _mm256_cmp_ps(logits, low, _CMP_GE_OQ);
    if (!_mm256_movemask_ps(_mm256_and_ps(is_below, is_above))) continue;
    int32_t bins[LANES];
    UNROLL for (int i = 0; i < 2; i++) bins_of(ratios_of(half_of(logits, i), row), bins + i * DOUBLES);
    for (int i = 0; i < LANES; i++)
      if (bins[i] == bin)
        items[num++] = (uint64_t)(best - (uint32_t)key_of(row->logits[k + i])) << BITS_OF_AN_ID | (uint64_t)(k + i);
  }
}

FAST static int64_t weight_of(float logit, const Row *row) {
  __m256d v[VECTORS];
  for (int i = 0; i < VECTORS; i++) v[i] = ratios_of(_mm_set1_ps(logit), row);
  weigh(v, row);
  return (int64_t)_mm256_cvtsd_f64(v[0]);
}

/* count and up_to: of the bins above this one, in which the goal is reached. */
static Found seek_in(const Row *row, const Bins *bins, int32_t bin, const Goal *goal, int64_t count, int64_t up_to) {
  const int64_t num = bins->counts[bin];
  uint64_t *const items = (uint64_t *)lorikeet_scratch((size_t)num * 2 * sizeof *items / sizeof(float));
  if (!items) return (Found){NO_MEMORY, 0};
  gather(row, bin, num, items);
  const uint64_t *const ranked = sort(items, items + num, num);
  float last = NAN;
  int64_t id = 0, weight = 0;
  for (int64_t i = 0; i < num && !is_reached(goal, count, up_to); i++) {
    id = (int64_t)(ranked[i] & 0xffffffffu);
    if (row->logits[id] != last) weight = weight_of(last = row->logits[id], row);
    up_to += weight;
    count++;
  }
  return (Found){id, up_to};
}

/* NO_TOKEN and the whole sum where all that weighs something does not reach the goal. */
static Found seek(const Row *row, const Bins *bins, const Goal *goal) {
  int64_t count = 0, up_to = 0;
  for (int32_t bin = 0; bin < BINS; bin++) {
    const int64_t with_count = count + bins->counts[bin], with_sum = up_to + bins->sums[bin];
    if (bins->counts[bin] && is_reached(goal, with_count, with_sum))
      return seek_in(row, bins, bin, goal, count, up_to);
    count = with_count;
    up_to = with_sum;
  }
  return (Found){NO_TOKEN, up_to};
}

static int64_t draw_truncated(const Row *row, const Ask *ask) {
  Bins bins;
  fill(&bins, row);
  const int is_limited = 0 < ask->top_k && ask->top_k < (double)row->width;
  const Goal limit = {is_limited ? (int64_t)ask->top_k : INT64_MAX, INFINITY, INT64_MAX};
  const Found best = seek(row, &bins, &limit);
  if (best.id == NO_MEMORY) return NO_MEMORY;
  const Goal nucleus = {INT64_MAX, ask->top_p * (double)best.up_to, INT64_MAX};
  const Found kept = seek(row, &bins, &nucleus);
  if (kept.id == NO_MEMORY) return NO_MEMORY;
  const Goal share = {INT64_MAX, INFINITY, share_of(ask->uniform, kept.up_to)};
  return seek(row, &bins, &share).id;
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

static int64_t choose(const float *logits, int64_t width, const Ask *ask) {
  float best;
  if (!find_best(logits, width, &best)) return NO_TOKEN;
  if (!ask->temperature) return place_of(best, logits, width);
  const float lowest = (float)(best + ask->temperature * (LOWEST - 1));
  const Row row = {logits, width, best, ask->temperature, ask->min_p, lowest};
  const int is_truncated = ask->top_p < 1.0 || (0 < ask->top_k && ask->top_k < (double)width);
  return is_truncated ? draw_truncated(&row, ask) : draw(&row, ask->uniform);
}

/* [num_rows, width] float32, rows apart by their stride -> [num_rows] ids; -1 where a row is not sound. width is below
 * 2^23. Returns 0, or 1 where there is no memory. */
int lorikeet_choose(const float *logits, int64_t stride, const Ask *asks, int64_t *ids, int64_t num_rows, int64_t width,
                    int64_t num_threads) {
  int64_t num_drawn = 0;
  for (int64_t row = 0; row < num_rows; row++) num_drawn += asks[row].temperature != 0.0;
  /* an exponential is worth some ten products; to look for the likeliest takes no longer than to wake a thread */
  const int threads = threads_for(num_drawn * width * 10, num_threads < num_drawn ? num_threads : num_drawn);
  int is_lacking = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : is_lacking)
  for (int64_t row = 0; row < num_rows; row++) {
    ids[row] = choose(logits + row * stride, width, asks + row);
    is_lacking |= ids[row] == NO_MEMORY;
  }
  return is_lacking;
}
#endif
