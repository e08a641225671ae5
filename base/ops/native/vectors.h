/* What the compiled kernels of a CPU share: eight float32 lanes (AVX2 with FMA), the two types of a row, and the one
 * order in which eight partial sums become one. Everything is exact or rounded to nearest even; nothing is contracted.
 */
#ifndef LORIKEET_VECTORS_H
#define LORIKEET_VECTORS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define LORIKEET_HAS_KERNELS 1
#include <immintrin.h>

#define FAST __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline, unused, target("avx2,fma")))
#define UNROLL _Pragma("GCC unroll 8")
#define KEEP_ROLLED _Pragma("GCC unroll 1")

enum { LANES = 8, BYTES_A_LINE = 64 };
enum { MIN_PRODUCTS_A_THREAD = 1 << 15 }; /* below, to wake another thread takes longer */
enum { TYPE_FLOAT32 = 0, TYPE_BFLOAT16 = 1 };

/* This thread's, 64-byte aligned, valid until its next call; null where there is no memory. */
float *lorikeet_scratch(size_t num_floats);

static inline int64_t size_of(int64_t type) { return type == TYPE_FLOAT32 ? 4 : 2; }

static inline int threads_for(int64_t products, int64_t num_threads) {
  const int64_t worth = products / MIN_PRODUCTS_A_THREAD;
  return (int)(worth < 1 ? 1 : worth < num_threads ? worth : num_threads);
}

/* Eight bfloat16 as float32. */
INLINE __m256 widened(__m128i half) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)); }

/* To the nearest bfloat16, ties to even, as float32; torch's own NaN for every NaN. */
INLINE __m256 rounded(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i cut = _mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000u));
  const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return _mm256_blendv_ps(_mm256_castsi256_ps(cut), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), is_nan);
}

INLINE __m256 rounded_to(__m256 value, int64_t type) { return type == TYPE_BFLOAT16 ? rounded(value) : value; }

INLINE __m256 load(const char *from, int64_t type) {
  if (type == TYPE_FLOAT32) return _mm256_loadu_ps((const float *)from);
  return widened(_mm_loadu_si128((const __m128i *)from));
}

/* ``value`` must be representable in ``type``. */
INLINE void store(char *to, __m256 value, int64_t type) {
  if (type == TYPE_FLOAT32) {
    _mm256_storeu_ps((float *)to, value);
    return;
  }
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(value), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(packed));
}

/* The sums of eight vectors, one a lane, every one added in the same order. */
INLINE __m256 sums_of(const __m256 v[8]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

/* e^x to two units in the last place, from 0 to infinity, and NaN for NaN. The polynomial is Cephes' expf. */
INLINE __m256 exp_of(__m256 x) {
  /* the second operand is what comes of a NaN */
  const __m256 held = _mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(_mm256_set1_ps(-110.0f), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(held, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), held);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  /* 2^n in two factors: n reaches from -159 to 128 */
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(p, first), second);
}

/* Not inlined: what OpenMP makes of a loop is compiled for any x86. */
FAST static __attribute__((unused)) void widen_row(const uint16_t *from, float *to, int64_t count) {
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES)
    _mm256_storeu_ps(to + k, widened(_mm_loadu_si128((const __m128i *)(from + k))));
  for (; k < count; k++) {
    const uint32_t bits = (uint32_t)from[k] << 16;
    memcpy(to + k, &bits, sizeof bits);
  }
}
#endif
#endif
