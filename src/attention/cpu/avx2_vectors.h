/*
 * avx2_vectors.h - what vector_kernels.h and coded_kernels.h ask for, in AVX2, FMA and F16C, but for ivec_dot: vectors of 8.
 */
#ifndef OSCAR_ATTENTION_AVX2_VECTORS_H
#define OSCAR_ATTENTION_AVX2_VECTORS_H

#include "attention/kernels.h"
#include "base/transpose8.h"

#include <immintrin.h>
#include <string.h>

#define LANES      8
#define BLOCK_VECS 2
#define CODED_ROWS 3 /* x 1 vector x 2 terms: 6 of 16 registers, beside 4 of crumbs and the products */
#define CODED_VECS 1
typedef __m256 vec;
typedef __m256i ivec;

#define VEC static inline __attribute__((always_inline)) vec
VEC vec_zero(void) { return _mm256_setzero_ps(); }
VEC vec_set(float x) { return _mm256_set1_ps(x); }
VEC vec_load(const float *p) { return _mm256_loadu_ps(p); }
VEC vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
VEC vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
VEC vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
VEC vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }
VEC vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
VEC vec_round(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC vec_zero_below(vec a, vec x, vec limit) { return _mm256_and_ps(a, _mm256_cmp_ps(x, limit, _CMP_NLT_UQ)); }
/* a 2^n for a in [0.5, 2) and n in -126 .. 0 */
VEC vec_times_power_of_two(vec a, vec n) {
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
VEC vec_load_bf16(const void *p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16)); }
/* Lane i of the result is the sum of the lanes of x[i]. */
VEC vec_sums(const vec x[LANES]) {
  vec a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  vec b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
VEC vec_reverse(vec a) { return _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0)); }
static inline void vec_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
/* Two floats, again and again. */
VEC vec_load_pair(const float *p) {
  double both;
  memcpy(&both, p, sizeof both);
  return _mm256_castpd_ps(_mm256_set1_pd(both));
}
/* p[2 i] = lane i of a, p[2 i + 1] = that of b */
static inline void vec_store_pairs(float *p, vec a, vec b) {
  vec low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  vec_store(p, _mm256_permute2f128_ps(low, high, 0x20));
  vec_store(p + LANES, _mm256_permute2f128_ps(low, high, 0x31));
}
static inline float vec_total(vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float vec_highest(vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

/* keys [64][d] BF16 -> panel [d][64]: pairs of elements are transposed as dwords, then parted. */
static void transpose_keys(int d, const uint16_t *keys, float *panel) {
  const __m256i high = _mm256_set1_epi32((int)0xFFFF0000u);
  for (int token = 0; token < 64; token += 8)
    for (int i = 0; i < d; i += 16) {
      __m256i x[8];
      for (int t = 0; t < 8; t++) x[t] = _mm256_loadu_si256((const __m256i *)(const void *)(keys + (token + t) * d + i));
      transpose(x);
      for (int pair = 0; pair < 8; pair++) {
        float *out = panel + (i + 2 * pair) * 64 + token;
        vec_store(out, _mm256_castsi256_ps(_mm256_slli_epi32(x[pair], 16)));
        vec_store(out + 64, _mm256_castsi256_ps(_mm256_and_si256(x[pair], high)));
      }
    }
}

/* Integers. */
#define IVEC static inline __attribute__((always_inline)) ivec
IVEC ivec_set(int x) { return _mm256_set1_epi32(x); }
IVEC ivec_dword(const void *p, int i) {
  int x;
  memcpy(&x, (const char *)p + 4 * i, sizeof x);
  return ivec_set(x);
}
IVEC ivec_load(const void *p) { return _mm256_loadu_si256(p); }
IVEC ivec_add(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
IVEC ivec_nearest(vec a) { return _mm256_cvtps_epi32(a); }
IVEC ivec_shift_left(ivec a, int n) { return _mm256_slli_epi32(a, n); }
IVEC ivec_shift_right(ivec a, int n) { return _mm256_srai_epi32(a, n); }
IVEC ivec_crumbs(ivec a, int j) { return _mm256_and_si256(_mm256_srli_epi32(a, 2 * j), _mm256_set1_epi8(3)); }
VEC ivec_to_float(ivec a) { return _mm256_cvtepi32_ps(a); }
VEC vec_abs(vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
VEC vec_load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
/* The gains of group p from LANES words of log gains: two tables of 8, chosen by bit 3. */
VEC vec_load_log_gains(const void *p, int group) {
  ivec words = _mm256_srli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 4 * group);
  vec low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(log_gain_table), words);
  vec high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(log_gain_table + 8), words);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(words, 28)));
}
/* The lowest byte of every lane. */
static inline void ivec_store_bytes(void *p, ivec a) {
  ivec bytes = _mm256_and_si256(a, _mm256_set1_epi32(255));
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(p, _mm_packus_epi16(words, words));
}

#endif
