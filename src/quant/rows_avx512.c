/* rows_avx512.c - rows_body.h for AVX-512: a tile of 16 rows is one vector, and 16 registers of sums hide an addition's latency.
 */
#include "base/transpose16.h"
#include "quant/codec.h"

#define LANES 16
typedef __m512 vec;
typedef __m512i ivec;

#define VEC static inline __attribute__((always_inline)) vec
VEC vec_set(float x) { return _mm512_set1_ps(x); }
VEC vec_load(const float *p) { return _mm512_loadu_ps(p); }
VEC vec_load_bf16(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
VEC vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
VEC vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
VEC vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
VEC vec_min(vec a, vec b) { return _mm512_min_ps(a, b); }
VEC vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
VEC vec_abs(vec a) { return _mm512_abs_ps(a); }
VEC vec_floor(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
VEC vec_if_below(vec a, vec b, vec x, vec y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
VEC vec_of_bits(vec a) { return _mm512_cvtepi32_ps(_mm512_castps_si512(a)); }
VEC vec_look_up(const float table[16], vec index) {
  return _mm512_permutexvar_ps(_mm512_cvttps_epi32(index), _mm512_loadu_ps(table));
}
static inline void vec_store(float *p, vec a) { _mm512_storeu_ps(p, a); }
static inline bool vec_any_not_above(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ) != 0; }
static inline void vec_transpose(vec x[LANES]) {
  ivec bits[LANES];
  for (int i = 0; i < LANES; i++) bits[i] = _mm512_castps_si512(x[i]);
  transpose(bits);
  for (int i = 0; i < LANES; i++) x[i] = _mm512_castsi512_ps(bits[i]);
}

#define IVEC static inline __attribute__((always_inline)) ivec
IVEC ivec_set(int x) { return _mm512_set1_epi32(x); }
IVEC ivec_or(ivec a, ivec b) { return _mm512_or_si512(a, b); }
IVEC ivec_and(ivec a, ivec b) { return _mm512_and_si512(a, b); }
IVEC ivec_shift_left(ivec a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
IVEC ivec_shift_right(ivec a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
IVEC ivec_truncate(vec a) { return _mm512_cvttps_epi32(a); }
static inline void ivec_store(uint32_t *p, ivec a) { _mm512_storeu_si512(p, a); }

#define TILE_COLUMNS 16
#define STRIP_ROWS   8
#define ROWS_KERNELS row_kernels_avx512
#include "quant/rows_body.h"
