/* y = x W^T + bias on a CPU, W kept in 4 bits or in bfloat16 and widened on its way through the registers.
 *
 * A weight is read once a call, in the order in which it lies. In 4 bits, 64 inputs of an output (a block, one scale)
 * are 32 bytes; the 16 values that they may have, scaled and rounded to bfloat16 as bitsandbytes does, are two tables
 * of 16 bytes, from which one shuffle takes the upper and one the lower bytes of 32 weights. Few rows are multiplied
 * with the weights in registers; more with eight outputs' weights unpacked into the first-level cache, three rows by
 * four outputs at a time, and what is left of the rows one by all eight.
 *
 * Of a block, step s and lane i are input 8 s + i, which lies in byte 16 (i / 4) + 8 (s / 2 % 2) + 2 (i % 4) + s % 2,
 * in its lower half if s < 4; so shuffles that stay within 128 bits and interleave end with eight inputs in their
 * order. In bytes 16 to 31 the fourth bit of a code is inverted, since there the table begins with its ninth value.
 *
 * A row has the same bits for every number of rows and threads: each number of y is one thread's eight partial sums
 * over the input in steps of eight, then a tree. Loaded through ctypes, after torch, whose OpenMP runtime it uses.
 */
#include "vectors.h"

#ifdef LORIKEET_HAS_KERNELS

enum { OUTS = 8 };      /* outputs that are computed together, and lie together */
enum { BLOCK = 64, HALF_STEPS = 4 }; /* inputs under one scale; vectors of weights that one look-up gives */
enum { FEW_ROWS = 8, FEW_ROWS_OF_HALVES = 4, PANEL_ROWS = 64, TILE_ROWS = 3, TILE_OUTS = 4 };
enum { FEW_INPUTS = 256, MANY_INPUTS = 512 }; /* at a time: what of x, and of unpacked weights, the first cache holds */
enum { AHEAD_BLOCKS = 4 }; /* of four bits */
enum { HALVES_A_LINE = 32 }; /* a row of halves is short: the next group's is asked for while this one's is used */
enum { SHARES = 64, FEWEST_GROUPS = 4 }; /* work is handed out in so many parts, of so many groups at least */
enum { FORMAT_FOUR_BIT, FORMAT_FOUR_BIT_WIDE, FORMAT_BFLOAT16 }; /* 4 bits of bfloat16, of float32 weights; plain */

typedef struct {
  const char *weight;  /* 4 bits: codes [out / 8, in / 64, 8, 32] bytes; else [out, in] bfloat16 */
  const float *scales; /* [out / 8, in / 64, 8]; 4 bits only */
  const float *bias;   /* [out] or null */
  const float *values; /* [16] what the codes stand for; 4 bits only */
  int64_t num_in, num_out, format;
} Linear;

typedef struct {
  const Linear *of;
  const float *x; /* [rows, x_stride] */
  int64_t x_stride, num_rows;
  char *y;
  int64_t y_stride, y_type;
} Product;

/* Eight outputs' weights, from some input on: four-bit codes and scales, or halves. */
typedef struct {
  const __m256i *codes;
  const float *scales;
  const uint16_t *halves;
} Group;

INLINE Group group_at(const Linear *of, int64_t out, int64_t input) {
  const int64_t block = out * (of->num_in / BLOCK) + input / BLOCK * OUTS;
  const Group group = {(const __m256i *)of->weight + block, of->scales + block,
                       (const uint16_t *)of->weight + out * of->num_in + input};
  return group;
}

/* The 16 weights that a block may have: the upper and the lower byte of each. */
typedef struct {
  __m256i upper, lower;
} Table;

/* What the codes stand for: of 0 to 3 and 8 to 11, and of 4 to 7 and 12 to 15. */
typedef struct {
  __m256 even, odd;
} Values;

INLINE Values values_of(const Linear *of) {
  const __m256 low = _mm256_loadu_ps(of->values), high = _mm256_loadu_ps(of->values + 8);
  const Values values = {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  return values;
}

/* The nearest bfloat16, ties to even, in the upper half of each number; the lower is not cleared. No NaN. */
INLINE __m256i nearest(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

INLINE Table table_of(Values values, float scale) {
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256i even = nearest(_mm256_mul_ps(values.even, factor)), odd = nearest(_mm256_mul_ps(values.odd, factor));
  const __m256i both = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15));
  const __m256i bytes = _mm256_shuffle_epi8(both, order);
  const __m256i swapped = _mm256_permute2x128_si256(bytes, bytes, 1);
  const Table table = {_mm256_unpackhi_epi64(bytes, swapped), _mm256_unpacklo_epi64(bytes, swapped)};
  return table;
}

/* 32 codes' weights, eight a vector. */
INLINE void look_up(__m256i codes, Table table, __m256 *weights) {
  const __m256i upper = _mm256_shuffle_epi8(table.upper, codes), lower = _mm256_shuffle_epi8(table.lower, codes);
  const __m256i first = _mm256_unpacklo_epi8(lower, upper), second = _mm256_unpackhi_epi8(lower, upper);
  const __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
  weights[0] = _mm256_castsi256_ps(_mm256_slli_epi32(first, 16));
  weights[1] = _mm256_castsi256_ps(_mm256_and_si256(first, mask));
  weights[2] = _mm256_castsi256_ps(_mm256_slli_epi32(second, 16));
  weights[3] = _mm256_castsi256_ps(_mm256_and_si256(second, mask));
}

INLINE __m256i lower_codes(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

/* Codes of a block: of its first (0) or its second (1) 32 inputs. */
INLINE __m256i codes_at(const __m256i *block, int half) {
  return lower_codes(_mm256_srl_epi16(_mm256_loadu_si256(block), _mm_cvtsi32_si128(half * 4)));
}

INLINE __m256 halves_at(const uint16_t *from) { return widened(_mm_loadu_si128((const __m128i *)from)); }

/* ---- few rows: weights in registers ------------------------------------------------------------------------------ */

/* Sums wait for each other and eight hide that; eight at most stay in registers. */
INLINE int outputs_together(const int num_rows) { return num_rows == 2 ? 4 : num_rows <= 4 ? 2 : 1; }

INLINE void few_four_bit(const Linear *of, const int num_rows, const float *x, int64_t x_stride, Group group,
                         int64_t num_in, __m256 (*sums)[OUTS]) {
  const Values meant = values_of(of);
  const int together = outputs_together(num_rows);
  for (int first = 0; first < OUTS; first += together) {
    __m256 own[4][FEW_ROWS];
    UNROLL for (int out = 0; out < together; out++)
      UNROLL for (int row = 0; row < num_rows; row++) own[out][row] = sums[row][first + out];
    for (int64_t block = 0; block < num_in / BLOCK; block++) {
      const int64_t at = block * OUTS + first;
      const float *values = x + block * BLOCK;
      Table tables[4]; /* apart from what uses them, whose sums wait for each other */
      UNROLL for (int out = 0; out < together; out++) {
        tables[out] = table_of(meant, group.scales[at + out]);
        _mm_prefetch((const char *)(group.codes + at + out + AHEAD_BLOCKS * OUTS), _MM_HINT_T0);
      }
      KEEP_ROLLED for (int half = 0; half < 2; half++) {
        UNROLL for (int out = 0; out < together; out++) {
          __m256 weights[HALF_STEPS];
          look_up(codes_at(group.codes + at + out, half), tables[out], weights);
          UNROLL for (int step = 0; step < HALF_STEPS; step++) {
            UNROLL for (int row = 0; row < num_rows; row++) {
              const float *from = values + row * x_stride + (half * HALF_STEPS + step) * LANES;
              own[out][row] = _mm256_fmadd_ps(weights[step], _mm256_loadu_ps(from), own[out][row]);
            }
          }
        }
      }
    }
    UNROLL for (int out = 0; out < together; out++)
      UNROLL for (int row = 0; row < num_rows; row++) sums[row][first + out] = own[out][row];
  }
}

INLINE void few_halves(const Linear *of, const int num_rows, const float *x, int64_t x_stride, Group group,
                       int64_t num_in, __m256 (*sums)[OUTS]) {
  const int together = outputs_together(num_rows);
  for (int first = 0; first < OUTS; first += together) {
    const uint16_t *halves = group.halves + first * of->num_in;
    __m256 own[4][FEW_ROWS];
    UNROLL for (int out = 0; out < together; out++)
      UNROLL for (int row = 0; row < num_rows; row++) own[out][row] = sums[row][first + out];
    for (int64_t k = 0; k < num_in; k += LANES) {
      UNROLL for (int out = 0; out < together; out++) {
        const uint16_t *at = halves + out * of->num_in + k;
        const __m256 weights = halves_at(at);
        if (k % HALVES_A_LINE == 0) _mm_prefetch((const char *)(at + OUTS * of->num_in), _MM_HINT_T1);
        UNROLL for (int row = 0; row < num_rows; row++)
          own[out][row] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + row * x_stride + k), own[out][row]);
      }
    }
    UNROLL for (int out = 0; out < together; out++)
      UNROLL for (int row = 0; row < num_rows; row++) sums[row][first + out] = own[out][row];
  }
}

/* One row alone: the eight outputs' sums side by side hide each other's latency. */
INLINE void one_four_bit(const Linear *of, const float *x, Group group, __m256 *sums) {
  const Values meant = values_of(of);
  __m256 own[OUTS];
  UNROLL for (int out = 0; out < OUTS; out++) own[out] = _mm256_setzero_ps();
  Table tables[OUTS];
  for (int64_t block = 0; block < of->num_in / BLOCK; block++) {
    const float *values = x + block * BLOCK;
    const __m256i *codes = group.codes + block * OUTS;
    UNROLL for (int out = 0; out < OUTS; out++) {
      tables[out] = table_of(meant, group.scales[block * OUTS + out]);
      if (out % 2 == 0) _mm_prefetch((const char *)(codes + out + AHEAD_BLOCKS * OUTS), _MM_HINT_T0);
    }
    UNROLL for (int half = 0; half < 2; half++) {
      UNROLL for (int out = 0; out < OUTS; out++) {
        __m256 weights[HALF_STEPS];
        look_up(codes_at(codes + out, half), tables[out], weights);
        UNROLL for (int step = 0; step < HALF_STEPS; step++) {
          const __m256 own_values = _mm256_loadu_ps(values + (half * HALF_STEPS + step) * LANES);
          own[out] = _mm256_fmadd_ps(weights[step], own_values, own[out]);
        }
      }
    }
  }
  UNROLL for (int out = 0; out < OUTS; out++) sums[out] = own[out];
}

INLINE void one_halves(const Linear *of, const float *x, Group group, __m256 *sums) {
  __m256 own[OUTS];
  UNROLL for (int out = 0; out < OUTS; out++) own[out] = _mm256_setzero_ps();
  for (int64_t k = 0; k < of->num_in; k += LANES) {
    const __m256 values = _mm256_loadu_ps(x + k);
    UNROLL for (int out = 0; out < OUTS; out++) {
      const uint16_t *halves = group.halves + out * of->num_in + k;
      own[out] = _mm256_fmadd_ps(halves_at(halves), values, own[out]);
      if (k % HALVES_A_LINE == 0) _mm_prefetch((const char *)(halves + OUTS * of->num_in), _MM_HINT_T1);
    }
  }
  UNROLL for (int out = 0; out < OUTS; out++) sums[out] = own[out];
}

FAST static void few_rows(const Product *product, int64_t out, __m256 (*sums)[OUTS]) {
  const Linear *of = product->of;
  const int is_four_bit = of->format == FORMAT_FOUR_BIT;
  if (product->num_rows == 1) {
    if (is_four_bit) one_four_bit(of, product->x, group_at(of, out, 0), sums[0]);
    else one_halves(of, product->x, group_at(of, out, 0), sums[0]);
    return;
  }
  memset(sums, 0, sizeof(__m256) * OUTS * product->num_rows);
  for (int64_t first = 0; first < of->num_in; first += FEW_INPUTS) {
    const int64_t count = of->num_in - first < FEW_INPUTS ? of->num_in - first : FEW_INPUTS;
    const Group group = group_at(of, out, first);
    const float *x = product->x + first;
    switch (product->num_rows) {
#define CASE(ROWS)                                                                              \
  case ROWS:                                                                                    \
    if (is_four_bit) few_four_bit(of, ROWS, x, product->x_stride, group, count, sums);          \
    else few_halves(of, ROWS, x, product->x_stride, group, count, sums);                        \
    break;
      CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
  }
}

/* ---- many rows: weights unpacked into the first-level cache ------------------------------------------------------ */

FAST static void unpack_four_bit(const Linear *of, Group group, int64_t num_in, float *to) {
  const Values meant = values_of(of);
  for (int64_t block = 0; block < num_in / BLOCK; block++) {
    const int64_t at = block * OUTS;
    float *unpacked = to + block * BLOCK;
    Table tables[OUTS]; /* apart from what uses them, as for few rows */
    UNROLL for (int out = 0; out < OUTS; out++) {
      tables[out] = table_of(meant, group.scales[at + out]);
      if (out % 2 == 0) _mm_prefetch((const char *)(group.codes + at + out + 2 * AHEAD_BLOCKS * OUTS), _MM_HINT_T0);
    }
    UNROLL for (int out = 0; out < OUTS; out++) {
      UNROLL for (int half = 0; half < 2; half++) {
        __m256 weights[HALF_STEPS];
        look_up(codes_at(group.codes + at + out, half), tables[out], weights);
        UNROLL for (int step = 0; step < HALF_STEPS; step++)
          _mm256_store_ps(unpacked + out * MANY_INPUTS + (half * HALF_STEPS + step) * LANES, weights[step]);
      }
    }
  }
}

/* One by one: float32 bases are for comparison. */
FAST static void unpack_wide(const Linear *of, Group group, int64_t num_in, float *to) {
  for (int64_t at = 0; at < num_in / BLOCK * OUTS; at++) {
    const uint8_t *bytes = (const uint8_t *)(group.codes + at);
    float *block = to + at % OUTS * MANY_INPUTS + at / OUTS * BLOCK;
    for (int input = 0; input < BLOCK; input++) {
      const int step = input / LANES, lane = input % LANES;
      const int byte = bytes[16 * (lane / 4) + 8 * (step / 2 % 2) + 2 * (lane % 4) + step % 2];
      const int code = (step < HALF_STEPS ? byte & 15 : byte >> 4) ^ (lane < 4 ? 0 : 8);
      block[input] = of->values[code] * group.scales[at];
    }
  }
}

FAST static void widen(const Linear *of, Group group, int64_t num_in, float *to) {
  for (int out = 0; out < OUTS; out++) {
    const uint16_t *halves = group.halves + out * of->num_in;
    for (int64_t k = 0; k < num_in; k += LANES) _mm256_store_ps(to + out * MANY_INPUTS + k, halves_at(halves + k));
  }
}

/* The next group's halves, asked for evenly while this one's are multiplied: in bursts they would keep what x waits for
 * from the second cache waiting for memory. */
typedef struct {
  const char *at;
  int64_t bytes_a_step; /* of eight inputs of a tile */
} Ahead;

INLINE Ahead ahead_of(const Linear *of, int64_t out, int64_t num_tiles) {
  Ahead ahead = {of->weight, 0}; /* four bits are asked for where they are unpacked */
  if (of->format == FORMAT_BFLOAT16 && out < of->num_out) {
    const int64_t bytes = OUTS * of->num_in * (int64_t)sizeof(uint16_t), steps = of->num_in / LANES * num_tiles;
    ahead.at = (const char *)group_at(of, out, 0).halves;
    ahead.bytes_a_step = (bytes + steps - 1) / steps;
  }
  return ahead;
}

INLINE void advance(Ahead *ahead, int64_t num_in) { ahead->at += ahead->bytes_a_step * (num_in / LANES); }

/* to [OUTS, MANY_INPUTS] */
FAST static void unpack(const Linear *of, Group group, int64_t num_in, float *to) {
  switch (of->format) {
  case FORMAT_FOUR_BIT: unpack_four_bit(of, group, num_in, to); break;
  case FORMAT_FOUR_BIT_WIDE: unpack_wide(of, group, num_in, to); break;
  default: widen(of, group, num_in, to);
  }
}

/* Three rows by four outputs, from first on: twelve sums, enough to keep two multiply-adds a cycle busy. */
INLINE void tile(const float *x, int64_t x_stride, const float *weights, int64_t num_in, __m256 (*sums)[OUTS],
                 const int first, Ahead ahead) {
  __m256 own[TILE_ROWS][TILE_OUTS];
  UNROLL for (int row = 0; row < TILE_ROWS; row++)
    UNROLL for (int out = 0; out < TILE_OUTS; out++) own[row][out] = sums[row][first + out];
  for (int64_t k = 0; k < num_in; k += LANES) {
    _mm_prefetch(ahead.at, _MM_HINT_T1); /* before the loads: behind them, a tenth of the head's time more */
    ahead.at += ahead.bytes_a_step;
    const float *at = weights + first * MANY_INPUTS + k;
    const __m256 w0 = _mm256_load_ps(at), w1 = _mm256_load_ps(at + MANY_INPUTS);
    const __m256 w2 = _mm256_load_ps(at + 2 * MANY_INPUTS);
    UNROLL for (int row = 0; row < TILE_ROWS; row++) {
      const __m256 values = _mm256_loadu_ps(x + row * x_stride + k);
      own[row][0] = _mm256_fmadd_ps(values, w0, own[row][0]);
      own[row][1] = _mm256_fmadd_ps(values, w1, own[row][1]);
      own[row][2] = _mm256_fmadd_ps(values, w2, own[row][2]);
      /* the fourth has no register left and is read each time */
      own[row][3] = _mm256_fmadd_ps(values, _mm256_load_ps(at + 3 * MANY_INPUTS), own[row][3]);
    }
  }
  UNROLL for (int row = 0; row < TILE_ROWS; row++)
    UNROLL for (int out = 0; out < TILE_OUTS; out++) sums[row][first + out] = own[row][out];
}

/* One row by eight outputs: faster than two rows by four, of as many sums. */
INLINE void row_tile(const float *x, const float *weights, int64_t num_in, __m256 *sums, Ahead ahead) {
  __m256 own[OUTS];
  UNROLL for (int out = 0; out < OUTS; out++) own[out] = sums[out];
  for (int64_t k = 0; k < num_in; k += LANES) {
    _mm_prefetch(ahead.at, _MM_HINT_T1);
    ahead.at += ahead.bytes_a_step;
    const __m256 values = _mm256_loadu_ps(x + k);
    UNROLL for (int out = 0; out < OUTS; out++)
      own[out] = _mm256_fmadd_ps(values, _mm256_load_ps(weights + out * MANY_INPUTS + k), own[out]);
  }
  UNROLL for (int out = 0; out < OUTS; out++) sums[out] = own[out];
}

FAST static void many_rows(const Product *product, int64_t out, int64_t first_row, int num_rows, float *unpacked,
                           __m256 (*sums)[OUTS]) {
  const Linear *of = product->of;
  const int64_t stride = product->x_stride;
  memset(sums, 0, sizeof(__m256) * OUTS * num_rows);
  Ahead ahead = ahead_of(of, out + OUTS, num_rows / TILE_ROWS * (OUTS / TILE_OUTS) + num_rows % TILE_ROWS);
  for (int64_t first = 0; first < of->num_in; first += MANY_INPUTS) {
    const int64_t count = of->num_in - first < MANY_INPUTS ? of->num_in - first : MANY_INPUTS;
    const float *x = product->x + first_row * stride + first;
    unpack(of, group_at(of, out, first), count, unpacked);
    int row = 0;
    for (; row + TILE_ROWS <= num_rows; row += TILE_ROWS)
      for (int half = 0; half < OUTS; half += TILE_OUTS) {
        tile(x + row * stride, stride, unpacked, count, sums + row, half, ahead);
        advance(&ahead, count);
      }
    for (; row < num_rows; row++) {
      row_tile(x + row * stride, unpacked, count, sums[row], ahead);
      advance(&ahead, count);
    }
  }
}

/* ---- a call ------------------------------------------------------------------------------------------------------ */

FAST static void finish(const Product *product, int64_t out, int64_t first_row, int num_rows, __m256 (*sums)[OUTS]) {
  const float *bias = product->of->bias;
  for (int row = 0; row < num_rows; row++) {
    char *y = product->y + ((first_row + row) * product->y_stride + out) * size_of(product->y_type);
    __m256 sum = sums_of(sums[row]);
    if (bias) sum = _mm256_add_ps(sum, _mm256_loadu_ps(bias + out));
    store(y, product->y_type == TYPE_BFLOAT16 ? rounded(sum) : sum, product->y_type);
  }
}

/* Up to so many rows, weights stay in registers. */
INLINE int64_t few_rows_of(int64_t format) {
  return format == FORMAT_FOUR_BIT ? FEW_ROWS : format == FORMAT_BFLOAT16 ? FEW_ROWS_OF_HALVES : 0;
}

FAST static void unit(const Product *product, int64_t out) {
  __m256 sums[PANEL_ROWS][OUTS];
  if (product->num_rows <= few_rows_of(product->of->format)) {
    few_rows(product, out, sums);
    finish(product, out, 0, (int)product->num_rows, sums);
    return;
  }
  float unpacked[OUTS * MANY_INPUTS] __attribute__((aligned(BYTES_A_LINE)));
  for (int64_t first = 0; first < product->num_rows; first += PANEL_ROWS) {
    const int64_t left = product->num_rows - first;
    const int num_rows = (int)(left < PANEL_ROWS ? left : PANEL_ROWS);
    many_rows(product, out, first, num_rows, unpacked, sums);
    finish(product, out, first, num_rows, sums);
  }
}

/* Rows of x and y may lie apart, strides in numbers. out is a multiple of 8, in of 64 (4 bits) or 8. Returns 0, or 1
 * where there is no memory for the widened x. */
int lorikeet_linear(const Linear *of, const char *x, int64_t x_stride, int64_t x_type, char *y, int64_t y_stride,
                    int64_t y_type, int64_t num_rows, int64_t num_threads) {
  const int64_t num_in = of->num_in;
  const int is_wide = x_type == TYPE_FLOAT32;
  float *wide = is_wide ? 0 : lorikeet_scratch((size_t)(num_rows * num_in));
  if (!is_wide && !wide) return 1;
  const Product product = {of, is_wide ? (const float *)x : wide, is_wide ? x_stride : num_in, num_rows,
                           y,  y_stride, y_type};
  const int threads = threads_for(num_rows * num_in * of->num_out, num_threads);
  const int64_t num_groups = of->num_out / OUTS, share = num_groups / SHARES;
  const int64_t taken = share > FEWEST_GROUPS ? share : FEWEST_GROUPS;
#pragma omp parallel num_threads(threads)
  {
    if (!is_wide) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < num_rows; row++)
        widen_row((const uint16_t *)x + row * x_stride, wide + row * num_in, num_in);
    }
#pragma omp for schedule(dynamic, taken)
    for (int64_t group = 0; group < num_groups; group++) unit(&product, group * OUTS);
  }
  return 0;
}
#endif
