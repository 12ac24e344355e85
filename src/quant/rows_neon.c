/* rows_neon.c - rows_body.h for ARM's NEON: a tile of 16 rows is four vectors; sixteen of the 32 registers hold sums. */
#include "quant/codec.h"

#include <arm_neon.h>

#define LANES 4
typedef float32x4_t vec;
typedef uint32x4_t ivec;

#define VEC static inline __attribute__((always_inline)) vec
VEC vec_set(float x) { return vdupq_n_f32(x); }
VEC vec_load(const float *p) { return vld1q_f32(p); }
VEC vec_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
VEC vec_add(vec a, vec b) { return vaddq_f32(a, b); }
VEC vec_sub(vec a, vec b) { return vsubq_f32(a, b); }
VEC vec_mul(vec a, vec b) { return vmulq_f32(a, b); }
VEC vec_min(vec a, vec b) { return vminq_f32(a, b); }
VEC vec_max(vec a, vec b) { return vmaxq_f32(a, b); }
VEC vec_abs(vec a) { return vabsq_f32(a); }
VEC vec_floor(vec a) { return vrndmq_f32(a); }
VEC vec_if_below(vec a, vec b, vec x, vec y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
VEC vec_of_bits(vec a) { return vcvtq_f32_s32(vreinterpretq_s32_f32(a)); }
/* Bytes are looked up: those of number i are 4 i .. 4 i + 3. */
VEC vec_look_up(const float table[16], vec index) {
  const uint8_t *p = (const uint8_t *)(const void *)table;
  const uint8x16x4_t bytes = {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
  ivec at = vmlaq_n_u32(vdupq_n_u32(0x03020100), vcvtq_u32_f32(index), 0x04040404);
  return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(at)));
}
static inline void vec_store(float *p, vec a) { vst1q_f32(p, a); }
static inline bool vec_any_not_above(vec a, vec b) { return vminvq_u32(vcgtq_f32(a, b)) == 0; }
static inline void vec_transpose(vec x[LANES]) {
  vec a = vtrn1q_f32(x[0], x[1]), b = vtrn2q_f32(x[0], x[1]), c = vtrn1q_f32(x[2], x[3]), d = vtrn2q_f32(x[2], x[3]);
  float64x2_t a2 = vreinterpretq_f64_f32(a), b2 = vreinterpretq_f64_f32(b), c2 = vreinterpretq_f64_f32(c),
              d2 = vreinterpretq_f64_f32(d);
  x[0] = vreinterpretq_f32_f64(vtrn1q_f64(a2, c2));
  x[1] = vreinterpretq_f32_f64(vtrn1q_f64(b2, d2));
  x[2] = vreinterpretq_f32_f64(vtrn2q_f64(a2, c2));
  x[3] = vreinterpretq_f32_f64(vtrn2q_f64(b2, d2));
}

#define IVEC static inline __attribute__((always_inline)) ivec
IVEC ivec_set(int x) { return vdupq_n_u32((uint32_t)x); }
IVEC ivec_or(ivec a, ivec b) { return vorrq_u32(a, b); }
IVEC ivec_and(ivec a, ivec b) { return vandq_u32(a, b); }
IVEC ivec_shift_left(ivec a, int n) { return vshlq_u32(a, vdupq_n_s32(n)); }
IVEC ivec_shift_right(ivec a, int n) { return vshlq_u32(a, vdupq_n_s32(-n)); }
IVEC ivec_truncate(vec a) { return vcvtq_u32_f32(a); }
static inline void ivec_store(uint32_t *p, ivec a) { vst1q_u32(p, a); }

#define TILE_COLUMNS 4
#define STRIP_ROWS   4
#define ROWS_KERNELS row_kernels_neon
#include "quant/rows_body.h"
