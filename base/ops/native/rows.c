/* What lies between the products on a CPU, row by row: RMS norms with the residual sum before them, and gates.
 *
 * Rounds where transformers does: each operation's result once, in the type of the rows. A row is one thread's, and its
 * sum of squares is made in one order (32 partial sums in steps of 32, then a tree), so its bits are its own.
 */
#include "vectors.h"

#include <math.h>

#ifdef LORIKEET_HAS_KERNELS

enum { PARTIAL_SUMS = 4, COLUMNS_OF_A_GATE = 1024 };

/* delta += hidden if there is one, else delta is hidden; the row's sum of squares. */
INLINE float join(const char *hidden, char *delta, int64_t width, const int64_t type) {
  const int64_t size = size_of(type);
  __m256 sums[LANES];
  UNROLL for (int i = 0; i < LANES; i++) sums[i] = _mm256_setzero_ps();
  for (int64_t k = 0; k < width; k += PARTIAL_SUMS * LANES) {
    UNROLL for (int i = 0; i < PARTIAL_SUMS; i++) {
      const int64_t at = (k + i * LANES) * size;
      if (k + i * LANES >= width) break;
      __m256 value = load(hidden + at, type);
      if (delta) {
        value = rounded_to(_mm256_add_ps(load(delta + at, type), value), type);
        store(delta + at, value, type);
      }
      sums[i] = _mm256_fmadd_ps(value, value, sums[i]);
    }
  }
  float totals[LANES];
  _mm256_storeu_ps(totals, sums_of(sums));
  return (totals[0] + totals[1]) + (totals[2] + totals[3]);
}

INLINE void scale_row(const char *row, const char *weight, float scale, char *to, int64_t width, const int64_t type) {
  const int64_t size = size_of(type);
  const __m256 factor = _mm256_set1_ps(scale);
  for (int64_t k = 0; k < width; k += LANES) {
    const __m256 scaled = rounded_to(_mm256_mul_ps(load(row + k * size, type), factor), type);
    store(to + k * size, rounded_to(_mm256_mul_ps(scaled, load(weight + k * size, type)), type), type);
  }
}

INLINE void norm_row_of(const char *hidden, char *delta, const char *weight, float epsilon, char *to, int64_t width,
                        const int64_t type) {
  const float mean = join(hidden, delta, width, type) / (float)width;
  scale_row(delta ? delta : hidden, weight, 1.0f / sqrtf(mean + epsilon), to, width, type);
}

FAST static void norm_row(const char *hidden, char *delta, const char *weight, float epsilon, char *to, int64_t width,
                          int64_t type) {
  if (type == TYPE_BFLOAT16) norm_row_of(hidden, delta, weight, epsilon, to, width, TYPE_BFLOAT16);
  else norm_row_of(hidden, delta, weight, epsilon, to, width, TYPE_FLOAT32);
}

/* to = norm(delta + hidden), and the sum is left in delta; or norm(hidden) where delta is null. All [num_rows,
 * width] side by side, of one type, and width a multiple of 8. */
void lorikeet_norm(const char *hidden, char *delta, const char *weight, double epsilon, char *to, int64_t num_rows,
                   int64_t width, int64_t type, int64_t num_threads) {
  const int64_t stride = width * size_of(type);
  const int threads = threads_for(num_rows * width, num_threads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < num_rows; row++)
    norm_row(hidden + row * stride, delta ? delta + row * stride : 0, weight, (float)epsilon, to + row * stride, width,
             type);
}

INLINE void gate_part_of(const char *gate, const char *up, char *to, int64_t count, const int64_t type) {
  const int64_t size = size_of(type);
  const __m256 one = _mm256_set1_ps(1.0f);
  for (int64_t k = 0; k < count; k += LANES) {
    const __m256 value = load(gate + k * size, type);
    const __m256 below = _mm256_add_ps(one, exp_of(_mm256_xor_ps(value, _mm256_set1_ps(-0.0f))));
    const __m256 opened = rounded_to(_mm256_div_ps(value, below), type);
    store(to + k * size, rounded_to(_mm256_mul_ps(opened, load(up + k * size, type)), type), type);
  }
}

FAST static void gate_part(const char *gate, const char *up, char *to, int64_t count, int64_t type) {
  if (type == TYPE_BFLOAT16) gate_part_of(gate, up, to, count, TYPE_BFLOAT16);
  else gate_part_of(gate, up, to, count, TYPE_FLOAT32);
}

/* to = silu(gate) * up: [num_rows, width] each, rows of gate and up apart by their strides (in numbers), width a
 * multiple of 8. */
void lorikeet_gate(const char *gate, int64_t gate_stride, const char *up, int64_t up_stride, char *to, int64_t num_rows,
                   int64_t width, int64_t type, int64_t num_threads) {
  const int64_t size = size_of(type);
  /* an exponential and a division are worth some ten products */
  const int threads = threads_for(num_rows * width * 10, num_threads);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t row = 0; row < num_rows; row++)
    for (int64_t first = 0; first < width; first += COLUMNS_OF_A_GATE) {
      const int64_t count = width - first < COLUMNS_OF_A_GATE ? width - first : COLUMNS_OF_A_GATE;
      gate_part(gate + (row * gate_stride + first) * size, up + (row * up_stride + first) * size,
                to + (row * width + first) * size, count, type);
    }
}
#endif
