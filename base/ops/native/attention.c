/* Attention of decodes over a paged cache on a CPU: all rows of a step, one call a layer.
 *
 * First every row's queries and keys are rotated, rounded as transformers does, and keys and values stored. Then each
 * sequence of one row attends: its keys in chunks of CHUNK, the query heads of one key head sharing what is widened,
 * everything in float32 and rounded once. Chunks are counted from the sequence's first key and joined in order, each by
 * one thread: so a row's bits depend on its own context alone. Only keys of the sequence itself are read.
 */
#include "vectors.h"

#include <math.h>

#ifdef LORIKEET_HAS_KERNELS

enum { CHUNK = 256, MOST_HEADS = 8, MOST_DIM = 256 }; /* MOST_HEADS: at once */
enum { KEYS = 8 }; /* are widened together */

typedef struct {
  int64_t num_heads, num_kv_heads, dim, block_size, type;
} Shape;

/* A sequence of one row; its blocks are tables[first_block ..], its chunks those from first_chunk on. */
typedef struct {
  int32_t row, first_block, num_keys, first_chunk;
} Decode;

typedef struct {
  int32_t decode, first_key;
} Chunk;

/* What all layers of a step share. */
typedef struct {
  const Shape *shape;
  const Decode *decodes;
  const Chunk *chunks;
  const int32_t *tables;
  const int64_t *slots; /* [num_rows] */
  const char *cos, *sin; /* [num_rows, dim], the first half of sin negative */
  int64_t num_rows, num_decodes, num_chunks, num_keys;
} Step;

/* Rows of heads as they were projected: a row's heads side by side, rows apart by strides, in numbers. */
typedef struct {
  const Step *step;
  const char *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;
  char *keys, *values; /* the layer's caches, [blocks, block_size, num_kv_heads, dim] */
  char *heads;         /* [num_rows, num_heads, dim]: rotated queries, then, of decodes, what they attended to */
  double scaling;
} Layer;

/* ---- rotate and store -------------------------------------------------------------------------------------------- */

INLINE void rotate(const char *from, const char *cos, const char *sin, char *to, int64_t dim, const int64_t type) {
  const int64_t size = size_of(type), half = dim / 2;
  for (int64_t k = 0; k < dim; k += LANES) {
    const int64_t across = k < half ? k + half : k - half;
    const __m256 straight = _mm256_mul_ps(load(from + k * size, type), load(cos + k * size, type));
    const __m256 turned = _mm256_mul_ps(load(from + across * size, type), load(sin + k * size, type));
    const __m256 sum = _mm256_add_ps(rounded_to(straight, type), rounded_to(turned, type));
    store(to + k * size, rounded_to(sum, type), type);
  }
}

INLINE void rotate_row_of(const Layer *layer, int64_t row, const int64_t type) {
  const Step *step = layer->step;
  const Shape *shape = step->shape;
  const int64_t dim = shape->dim, size = size_of(type), head = dim * size;
  const char *cos = step->cos + row * head, *sin = step->sin + row * head;
  const char *query = layer->query + row * layer->query_stride * size;
  const char *key = layer->key + row * layer->key_stride * size;
  const char *value = layer->value + row * layer->value_stride * size;
  char *to = layer->heads + row * shape->num_heads * head;
  for (int64_t i = 0; i < shape->num_heads; i++) rotate(query + i * head, cos, sin, to + i * head, dim, type);
  const int64_t place = step->slots[row] * shape->num_kv_heads * head;
  for (int64_t i = 0; i < shape->num_kv_heads; i++)
    rotate(key + i * head, cos, sin, layer->keys + place + i * head, dim, type);
  memcpy(layer->values + place, value, shape->num_kv_heads * head);
}

FAST static void rotate_row(const Layer *layer, int64_t row) {
  if (layer->step->shape->type == TYPE_BFLOAT16) rotate_row_of(layer, row, TYPE_BFLOAT16);
  else rotate_row_of(layer, row, TYPE_FLOAT32);
}

/* ---- a chunk ----------------------------------------------------------------------------------------------------- */

/* A head's part of a chunk lies in scratch as dim sums of values, the largest score, and the sum of the weights. */
INLINE float *part_of(const Shape *shape, float *parts, int64_t chunk, int64_t head) {
  return parts + (chunk * shape->num_heads + head) * (shape->dim + LANES);
}

INLINE void widen(const char *from, float *to, int64_t count, int64_t type) {
  for (int64_t k = 0; k < count; k += LANES) _mm256_storeu_ps(to + k, load(from + k * size_of(type), type));
}

/* Walks a sequence's keys or values in a layer's cache, in order. */
typedef struct {
  const char *cache;
  const int32_t *table;
  int64_t block, offset, block_size, key_bytes, block_bytes;
} Walk;

INLINE Walk walk_from(const Shape *shape, const char *cache, const int32_t *table, int64_t index, int64_t kv_head) {
  const int64_t head_bytes = shape->dim * size_of(shape->type), key_bytes = shape->num_kv_heads * head_bytes;
  const Walk walk = {cache + kv_head * head_bytes,   table,     index / shape->block_size, index % shape->block_size,
                     shape->block_size, key_bytes, shape->block_size * key_bytes};
  return walk;
}

INLINE const char *next_of(Walk *walk) {
  const char *at = walk->cache + walk->table[walk->block] * walk->block_bytes + walk->offset * walk->key_bytes;
  if (++walk->offset == walk->block_size) {
    walk->offset = 0;
    walk->block++;
  }
  return at;
}

/* The next KEYS keys or values side by side; zeros beyond num_left. ``ahead`` walks KEYS before: those are asked
 * for. */
INLINE void widen_keys(Walk *walk, Walk *ahead, int64_t num_left, int64_t dim, float *to, const int64_t type) {
  for (int64_t key = 0; key < KEYS; key++, to += dim) {
    if (key >= num_left) {
      memset(to, 0, dim * sizeof(float));
      continue;
    }
    widen(next_of(walk), to, dim, type);
    if (key + KEYS < num_left) {
      const char *soon = next_of(ahead);
      for (int64_t k = 0; k < dim * size_of(type); k += BYTES_A_LINE) _mm_prefetch(soon + k, _MM_HINT_T0);
    }
  }
}

/* One head's scores of KEYS widened keys. */
INLINE __m256 scores_of(const float *query, const float *keys, int64_t dim) {
  __m256 sums[KEYS];
  UNROLL for (int key = 0; key < KEYS; key++) sums[key] = _mm256_setzero_ps();
  for (int64_t k = 0; k < dim; k += LANES) {
    const __m256 values = _mm256_loadu_ps(query + k);
    UNROLL for (int key = 0; key < KEYS; key++)
      sums[key] = _mm256_fmadd_ps(values, _mm256_loadu_ps(keys + key * dim + k), sums[key]);
  }
  return sums_of(sums);
}

/* Scores become weights, e to the power of how far they are below the largest; that and the weights' sum. */
INLINE void weigh(float *scores, int64_t count, float *largest, float *total) {
  __m256 most = _mm256_set1_ps(-INFINITY), sum = _mm256_setzero_ps();
  for (int64_t k = 0; k < count; k += LANES) most = _mm256_max_ps(_mm256_loadu_ps(scores + k), most);
  float lanes[LANES];
  _mm256_storeu_ps(lanes, most);
  *largest = lanes[0];
  for (int i = 1; i < LANES; i++) *largest = lanes[i] > *largest ? lanes[i] : *largest;
  for (int64_t k = 0; k < count; k += LANES) {
    const __m256 weights = exp_of(_mm256_sub_ps(_mm256_loadu_ps(scores + k), _mm256_set1_ps(*largest)));
    _mm256_storeu_ps(scores + k, weights);
    sum = _mm256_add_ps(sum, weights);
  }
  _mm256_storeu_ps(lanes, sum);
  *total = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

/* sums [dim] += the weighted sum of num_keys widened values. */
INLINE void add_values(const float *weights, const float *values, int64_t num_keys, int64_t dim, float *sums) {
  int64_t first = 0;
  for (; first + 8 * LANES <= dim; first += 8 * LANES) {
    __m256 own[8];
    UNROLL for (int i = 0; i < 8; i++) own[i] = _mm256_loadu_ps(sums + first + i * LANES);
    for (int64_t key = 0; key < num_keys; key++) {
      const __m256 weight = _mm256_broadcast_ss(weights + key);
      const float *at = values + key * dim + first;
      UNROLL for (int i = 0; i < 8; i++) own[i] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(at + i * LANES), own[i]);
    }
    UNROLL for (int i = 0; i < 8; i++) _mm256_storeu_ps(sums + first + i * LANES, own[i]);
  }
  for (; first < dim; first += LANES) {
    __m256 own = _mm256_loadu_ps(sums + first);
    for (int64_t key = 0; key < num_keys; key++)
      own = _mm256_fmadd_ps(_mm256_broadcast_ss(weights + key), _mm256_loadu_ps(values + key * dim + first), own);
    _mm256_storeu_ps(sums + first, own);
  }
}

/* num_heads query heads, at most MOST_HEADS, from first_head on, over one chunk of their key head. */
INLINE void attend_chunk_of(const Layer *layer, int64_t number, int64_t kv_head, int64_t first_head, int64_t num_heads,
                            float *parts, const int64_t type) {
  const Step *step = layer->step;
  const Shape *shape = step->shape;
  const Chunk *chunk = &step->chunks[number];
  const Decode *decode = &step->decodes[chunk->decode];
  const int64_t dim = shape->dim, left = decode->num_keys - chunk->first_key;
  const int64_t count = left < CHUNK ? left : CHUNK;
  const int32_t *table = step->tables + decode->first_block;
  float query[MOST_HEADS * MOST_DIM], scores[MOST_HEADS][CHUNK], wide[KEYS * MOST_DIM];
  const char *from = layer->heads + (decode->row * shape->num_heads + first_head) * dim * size_of(type);
  widen(from, query, num_heads * dim, type);
  for (int64_t k = 0; k < num_heads * dim; k += LANES) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(query + k), _mm256_set1_ps((float)layer->scaling));
    _mm256_storeu_ps(query + k, scaled);
  }
  const __m256 lane = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), none = _mm256_set1_ps(-INFINITY);
  Walk keys = walk_from(shape, layer->keys, table, chunk->first_key, kv_head);
  Walk keys_ahead = walk_from(shape, layer->keys, table, chunk->first_key + KEYS, kv_head);
  for (int64_t key = 0; key < count; key += KEYS) {
    widen_keys(&keys, &keys_ahead, count - key, dim, wide, type);
    const __m256 is_beyond = _mm256_cmp_ps(lane, _mm256_set1_ps((float)(count - key)), _CMP_GE_OQ);
    for (int64_t head = 0; head < num_heads; head++) {
      const __m256 found = scores_of(query + head * dim, wide, dim);
      _mm256_storeu_ps(scores[head] + key, _mm256_blendv_ps(found, none, is_beyond));
    }
  }
  for (int64_t head = 0; head < num_heads; head++) {
    float *part = part_of(shape, parts, number, first_head + head);
    memset(part, 0, dim * sizeof(float));
    weigh(scores[head], count, part + dim, part + dim + 1);
  }
  Walk values = walk_from(shape, layer->values, table, chunk->first_key, kv_head);
  Walk values_ahead = walk_from(shape, layer->values, table, chunk->first_key + KEYS, kv_head);
  for (int64_t key = 0; key < count; key += KEYS) {
    const int64_t num_keys = count - key < KEYS ? count - key : KEYS;
    widen_keys(&values, &values_ahead, count - key, dim, wide, type);
    for (int64_t head = 0; head < num_heads; head++)
      add_values(scores[head] + key, wide, num_keys, dim, part_of(shape, parts, number, first_head + head));
  }
}

FAST static void attend_chunk(const Layer *layer, int64_t number, int64_t kv_head, int64_t first_head,
                              int64_t num_heads, float *parts) {
  if (layer->step->shape->type == TYPE_BFLOAT16)
    attend_chunk_of(layer, number, kv_head, first_head, num_heads, parts, TYPE_BFLOAT16);
  else attend_chunk_of(layer, number, kv_head, first_head, num_heads, parts, TYPE_FLOAT32);
}

static void chunk_unit(const Layer *layer, int64_t unit, float *parts) {
  const Shape *shape = layer->step->shape;
  const int64_t kv_head = unit % shape->num_kv_heads, group = shape->num_heads / shape->num_kv_heads;
  for (int64_t first = 0; first < group; first += MOST_HEADS) {
    const int64_t num_heads = group - first < MOST_HEADS ? group - first : MOST_HEADS;
    attend_chunk(layer, unit / shape->num_kv_heads, kv_head, kv_head * group + first, num_heads, parts);
  }
}

/* ---- chunks joined ----------------------------------------------------------------------------------------------- */

INLINE float power_of_e(float x) { return _mm256_cvtss_f32(exp_of(_mm256_set1_ps(x))); }

FAST static void join_chunks(const Layer *layer, int64_t number, int64_t head, float *parts) {
  const Shape *shape = layer->step->shape;
  const Decode *decode = &layer->step->decodes[number];
  const int64_t dim = shape->dim, num_chunks = (decode->num_keys + CHUNK - 1) / CHUNK;
  float largest = -INFINITY, total = 0;
  for (int64_t i = 0; i < num_chunks; i++) {
    const float own = part_of(shape, parts, decode->first_chunk + i, head)[dim];
    largest = own > largest ? own : largest;
  }
  float sums[MOST_DIM] = {0};
  for (int64_t i = 0; i < num_chunks; i++) {
    const float *part = part_of(shape, parts, decode->first_chunk + i, head);
    const float share = power_of_e(part[dim] - largest);
    total += share * part[dim + 1];
    for (int64_t k = 0; k < dim; k += LANES) {
      const __m256 sum = _mm256_fmadd_ps(_mm256_set1_ps(share), _mm256_loadu_ps(part + k), _mm256_loadu_ps(sums + k));
      _mm256_storeu_ps(sums + k, sum);
    }
  }
  char *to = layer->heads + (decode->row * shape->num_heads + head) * dim * size_of(shape->type);
  for (int64_t k = 0; k < dim; k += LANES) {
    const __m256 value = _mm256_div_ps(_mm256_loadu_ps(sums + k), _mm256_set1_ps(total));
    store(to + k * size_of(shape->type), rounded_to(value, shape->type), shape->type);
  }
}

/* ---- a call ------------------------------------------------------------------------------------------------------ */

/* Returns 0, or 1 where there is no memory for scratch. dim is a multiple of 16, at most MOST_DIM. */
int lorikeet_attend(const Step *step, const char *query, int64_t query_stride, const char *key, int64_t key_stride,
                    const char *value, int64_t value_stride, char *keys, char *values, char *heads, double scaling,
                    int64_t num_threads) {
  const Layer layer = {step, query, key, value, query_stride, key_stride, value_stride, keys, values, heads, scaling};
  const Shape *shape = step->shape;
  const int64_t part = shape->dim + LANES, num_heads = shape->num_heads;
  float *parts = lorikeet_scratch((size_t)(step->num_chunks * num_heads * part));
  if (!parts) return 1;
  const int64_t num_units = step->num_chunks * shape->num_kv_heads, num_joins = step->num_decodes * num_heads;
  const int threads = threads_for((step->num_rows + 2 * step->num_keys) * num_heads * shape->dim, num_threads);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->num_rows; row++) rotate_row(&layer, row);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < num_units; unit++) chunk_unit(&layer, unit, parts);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < num_joins; unit++) join_chunks(&layer, unit / num_heads, unit % num_heads, parts);
  }
  return 0;
}
#endif
