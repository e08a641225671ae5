/* What belongs to the library as a whole: whether it holds kernels, and a thread's scratch memory. */
#include "vectors.h"

#include <stdlib.h>

#ifdef LORIKEET_HAS_KERNELS
static __thread float *scratch;
static __thread size_t capacity;

float *lorikeet_scratch(size_t num_floats) {
  if (num_floats > capacity) {
    free(scratch);
    capacity = 0;
    scratch = aligned_alloc(BYTES_A_LINE, (num_floats * sizeof(float) / BYTES_A_LINE + 1) * BYTES_A_LINE);
    if (!scratch) return 0;
    capacity = num_floats;
  }
  return scratch;
}

int lorikeet_has_kernels(void) { return 1; }
#else
/* Compiled for another kind of processor: nothing else is here then. */
int lorikeet_has_kernels(void) { return 0; }
#endif
