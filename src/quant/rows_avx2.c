/* rows_avx2.c - rows_body.h for AVX2: a tile of 16 rows is two vectors; eight registers of sums. */
#include "quant/codec.h"

#include <immintrin.h>

#define LANES 8
typedef __m256 vec;
typedef __m256i ivec;

#define VEC static inline __attribute__((always_inline)) vec
VEC vec_set(float x) { return _mm256_set1_ps(x); }
VEC vec_load(const float *p) { return _mm256_loadu_ps(p); }
VEC vec_load_bf16(const uint16_t *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
VEC vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
VEC vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
VEC vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
VEC vec_min(vec a, vec b) { return _mm256_min_ps(a, b); }
VEC vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }
VEC vec_abs(vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
VEC vec_floor(vec a) { return _mm256_floor_ps(a); }
VEC vec_if_below(vec a, vec b, vec x, vec y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
VEC vec_of_bits(vec a) { return _mm256_cvtepi32_ps(_mm256_castps_si256(a)); }
/* Lane by lane from either half of the table, by bit 3 of the index, which is moved to where a blend looks. */
VEC vec_look_up(const float table[16], vec index) {
  ivec i = _mm256_cvttps_epi32(index);
  vec low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
static inline void vec_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
static inline bool vec_any_not_above(vec a, vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NGT_UQ)) != 0; }
static inline void vec_transpose(vec x[LANES]) {
  vec a[LANES], b[LANES];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  /* b[4 g + c] holds in its half h column 4 h + c of rows 4 g .. 4 g + 3 */
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      __m256d even = _mm256_castps_pd(a[i + j]), odd = _mm256_castps_pd(a[i + 2 + j]);
      b[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(even, odd));
      b[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd));
    }
  for (int c = 0; c < 4; c++) {
    x[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    x[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}

#define IVEC static inline __attribute__((always_inline)) ivec
IVEC ivec_set(int x) { return _mm256_set1_epi32(x); }
IVEC ivec_or(ivec a, ivec b) { return _mm256_or_si256(a, b); }
IVEC ivec_and(ivec a, ivec b) { return _mm256_and_si256(a, b); }
IVEC ivec_shift_left(ivec a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
IVEC ivec_shift_right(ivec a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
IVEC ivec_truncate(vec a) { return _mm256_cvttps_epi32(a); }
static inline void ivec_store(uint32_t *p, ivec a) { _mm256_storeu_si256((void *)p, a); }

#define TILE_COLUMNS 4
#define STRIP_ROWS   4
#define ROWS_KERNELS row_kernels_avx2
#include "quant/rows_body.h"
