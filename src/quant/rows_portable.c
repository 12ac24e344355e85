/* rows_portable.c - rows_body.h in plain C: vectors of four, which the compiler gives to whatever the processor has. */
#include "quant/codec.h"

#include <string.h>

#define LANES 4
typedef float vec __attribute__((vector_size(16)));
typedef uint32_t ivec __attribute__((vector_size(16)));
typedef int32_t signed_ivec __attribute__((vector_size(16)));

#define VEC static inline __attribute__((always_inline)) vec
VEC vec_set(float x) { return (vec){x, x, x, x}; }
VEC vec_load(const float *p) {
  vec a;
  memcpy(&a, p, sizeof a);
  return a;
}
VEC vec_load_bf16(const uint16_t *p) { return (vec){bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])}; }
VEC vec_add(vec a, vec b) { return a + b; }
VEC vec_sub(vec a, vec b) { return a - b; }
VEC vec_mul(vec a, vec b) { return a * b; }
VEC vec_if_below(vec a, vec b, vec x, vec y) {
  ivec below = (ivec)(a < b);
  return (vec)((below & (ivec)x) | (~below & (ivec)y));
}
VEC vec_min(vec a, vec b) { return vec_if_below(a, b, a, b); }
VEC vec_max(vec a, vec b) { return vec_if_below(b, a, a, b); }
VEC vec_abs(vec a) { return (vec)((ivec)a & 0x7FFFFFFF); }
VEC vec_floor(vec a) { return __builtin_convertvector(__builtin_convertvector(a, signed_ivec), vec); } /* of a from 0 to 2^31 */
VEC vec_of_bits(vec a) { return __builtin_convertvector((signed_ivec)a, vec); }
VEC vec_look_up(const float table[16], vec index) {
  return (vec){table[(int)index[0]], table[(int)index[1]], table[(int)index[2]], table[(int)index[3]]};
}
static inline void vec_store(float *p, vec a) { memcpy(p, &a, sizeof a); }
static inline bool vec_any_not_above(vec a, vec b) {
  ivec above = (ivec)(a > b);
  return (above[0] & above[1] & above[2] & above[3]) == 0;
}
static inline void vec_transpose(vec x[LANES]) {
  vec a = x[0], b = x[1], c = x[2], d = x[3];
  for (int i = 0; i < LANES; i++) x[i] = (vec){a[i], b[i], c[i], d[i]};
}

#define IVEC static inline __attribute__((always_inline)) ivec
IVEC ivec_set(int x) { return (ivec){0} + (uint32_t)x; }
IVEC ivec_or(ivec a, ivec b) { return a | b; }
IVEC ivec_and(ivec a, ivec b) { return a & b; }
IVEC ivec_shift_left(ivec a, int n) { return a << n; }
IVEC ivec_shift_right(ivec a, int n) { return a >> n; }
IVEC ivec_truncate(vec a) { return (ivec) __builtin_convertvector(a, signed_ivec); }
static inline void ivec_store(uint32_t *p, ivec a) { memcpy(p, &a, sizeof a); }

#define TILE_COLUMNS 2
#define STRIP_ROWS   2
#define ROWS_KERNELS row_kernels_portable
#include "quant/rows_body.h"
