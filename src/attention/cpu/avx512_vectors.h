/*
 * avx512_vectors.h - what vector_kernels.h and coded_kernels.h ask for, in AVX-512 and VNNI: vectors of 16.
 */
#ifndef OSCAR_ATTENTION_AVX512_VECTORS_H
#define OSCAR_ATTENTION_AVX512_VECTORS_H

#include "attention/kernels.h"
#include "base/transpose16.h"

#include <immintrin.h>
#include <string.h>

#define LANES      16
#define BLOCK_VECS 4
#define CODED_ROWS 4 /* x 2 vectors x 2 terms: 16 of 32 registers, beside 8 of crumbs */
#define CODED_VECS 2
typedef __m512 vec;
typedef __m512i ivec;

#define VEC static inline __attribute__((always_inline)) vec
VEC vec_zero(void) { return _mm512_setzero_ps(); }
VEC vec_set(float x) { return _mm512_set1_ps(x); }
VEC vec_load(const float *p) { return _mm512_loadu_ps(p); }
VEC vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
VEC vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
VEC vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
VEC vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
VEC vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
VEC vec_round(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC vec_times_power_of_two(vec a, vec n) { return _mm512_scalef_ps(a, n); }
VEC vec_zero_below(vec a, vec x, vec limit) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), a); }
VEC vec_load_bf16(const void *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
/* Lane i of the result is the sum of the lanes of x[i]: three rounds of interleave and add. */
VEC vec_sums(const vec x[LANES]) {
  vec y[4], z[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const vec *q = x + 4 * i;
    vec a = _mm512_add_ps(_mm512_unpacklo_ps(q[0], q[1]), _mm512_unpackhi_ps(q[0], q[1]));
    vec b = _mm512_add_ps(_mm512_unpacklo_ps(q[2], q[3]), _mm512_unpackhi_ps(q[2], q[3]));
    __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    y[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    z[i] = _mm512_add_ps(_mm512_shuffle_f32x4(y[2 * i], y[2 * i + 1], 0x88), _mm512_shuffle_f32x4(y[2 * i], y[2 * i + 1], 0xDD));
  return _mm512_add_ps(_mm512_shuffle_f32x4(z[0], z[1], 0x88), _mm512_shuffle_f32x4(z[0], z[1], 0xDD));
}
/* Two floats, again and again. */
VEC vec_load_pair(const float *p) {
  double both;
  memcpy(&both, p, sizeof both);
  return _mm512_castpd_ps(_mm512_set1_pd(both));
}
VEC vec_reverse(vec a) {
  return _mm512_permutexvar_ps(_mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), a);
}
static inline void vec_store(float *p, vec a) { _mm512_storeu_ps(p, a); }
/* p[2 i] = lane i of a, p[2 i + 1] = that of b */
static inline __attribute__((always_inline)) void vec_store_pairs(float *p, vec a, vec b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  vec_store(p, _mm512_permutex2var_ps(a, low, b));
  vec_store(p + LANES, _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b));
}
static inline float vec_total(vec a) { return _mm512_reduce_add_ps(a); }
static inline float vec_highest(vec a) { return _mm512_reduce_max_ps(a); }

/* keys [64][d] BF16 -> panel [d][64]: pairs of elements are transposed as dwords, then parted. */
static inline void transpose_keys(int d, const uint16_t *keys, float *panel) {
  const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000u);
  for (int token = 0; token < 64; token += 16)
    for (int i = 0; i < d; i += 32) {
      int pairs = d - i >= 32 ? 16 : 8;
      __m512i x[16];
      for (int t = 0; t < 16; t++) x[t] = _mm512_maskz_loadu_epi32((__mmask16)((1u << pairs) - 1), keys + (token + t) * d + i);
      transpose(x);
      for (int pair = 0; pair < pairs; pair++) {
        float *out = panel + (i + 2 * pair) * 64 + token;
        vec_store(out, _mm512_castsi512_ps(_mm512_slli_epi32(x[pair], 16)));
        vec_store(out + 64, _mm512_castsi512_ps(_mm512_and_si512(x[pair], upper)));
      }
    }
}

/* Integers. */
#define IVEC static inline __attribute__((always_inline)) ivec
IVEC ivec_set(int x) { return _mm512_set1_epi32(x); }
IVEC ivec_dword(const void *p, int i) {
  int x;
  memcpy(&x, (const char *)p + 4 * i, sizeof x);
  return ivec_set(x);
}
IVEC ivec_load(const void *p) { return _mm512_loadu_si512(p); }
IVEC ivec_add(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
IVEC ivec_nearest(vec a) { return _mm512_cvtps_epi32(a); }
IVEC ivec_shift_left(ivec a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
IVEC ivec_shift_right(ivec a, int n) { return _mm512_srai_epi32(a, (unsigned)n); }
IVEC ivec_crumbs(ivec a, int j) { return _mm512_and_si512(_mm512_srli_epi32(a, (unsigned)(2 * j)), _mm512_set1_epi8(3)); }
IVEC ivec_dot(ivec sum, const ivec crumbs[4], const void *q) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) sum = _mm512_dpbusd_epi32(sum, crumbs[j], ivec_dword(q, j));
  return sum;
}
VEC ivec_to_float(ivec a) { return _mm512_cvtepi32_ps(a); }
VEC vec_abs(vec a) { return _mm512_abs_ps(a); }
VEC vec_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
/* The gains of group p from LANES words of log gains. */
VEC vec_load_log_gains(const void *p, int group) {
  ivec words = _mm512_srli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), (unsigned)(4 * group));
  return _mm512_permutexvar_ps(words, _mm512_loadu_ps(log_gain_table)); /* looks at the lowest 4 bits only */
}
static inline void ivec_store_bytes(void *p, ivec a) { _mm_storeu_si128(p, _mm512_cvtepi32_epi8(a)); }

#endif
