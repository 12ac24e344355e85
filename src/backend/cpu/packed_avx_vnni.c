/*
 * packed_avx_vnni.c - packed weights (packed.h) with AVX2 and AVX-VNNI: VPDPBUSD adds up codes times the high and the low bytes
 * of the activations (dot.h).
 */
#include "backend/cpu/packed_avx2_vectors.h"

#define SUM_VECS 2

struct active {
  const int8_t *high, *low;
};

INLINE void load_active(const struct act_chunk *x, int column, int columns, struct active *a) {
  (void)columns;
  *a = (struct active){x->high + column, x->low + column};
}

struct sums {
  ivec high, low;
};

INLINE void clear(struct sums *s) { s->high = s->low = _mm256_setzero_si256(); }

INLINE void add_quad(ivec q, const struct active *a, int at, struct sums *s) {
  s->high = _mm256_dpbusd_avx_epi32(s->high, q, ivec_dword(a->high + at));
  s->low = _mm256_dpbusd_avx_epi32(s->low, q, ivec_dword(a->low + at));
}

INLINE vec total(const struct sums *s) { return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(s->high, 7), s->low)); }

#include "backend/cpu/packed_kernels.h"

const struct packed_kernels packed_avx_vnni = {.name = "AVX-VNNI", .rows = ALL_TYPES(rows), .f32 = ALL_TYPES(f32)};
