/*
 * neon_dot.c - attention on a page with NEON and its dot product instructions (ARMv8.2): vectors of 4, byte dot products.
 */
#include "attention/kernels.h"

#include <arm_neon.h>
#include <string.h>

#define LANES      4
#define BLOCK_VECS 4
#define CODED_ROWS 3 /* x 2 vectors x 2 terms: 12 of 32 registers, beside 8 of crumbs */
#define CODED_VECS 2
typedef float32x4_t vec;
typedef int32x4_t ivec;

#define VEC static inline __attribute__((always_inline)) vec
VEC vec_zero(void) { return vdupq_n_f32(0); }
VEC vec_set(float x) { return vdupq_n_f32(x); }
VEC vec_load(const float *p) { return vld1q_f32(p); }
VEC vec_add(vec a, vec b) { return vaddq_f32(a, b); }
VEC vec_sub(vec a, vec b) { return vsubq_f32(a, b); }
VEC vec_mul(vec a, vec b) { return vmulq_f32(a, b); }
/* The number where one of the two is NaN, as scores of tokens that were never written may be. */
VEC vec_max(vec a, vec b) { return vmaxnmq_f32(a, b); }
VEC vec_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
VEC vec_round(vec a) { return vrndnq_f32(a); }
VEC vec_zero_below(vec a, vec x, vec limit) {
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a), vcltq_f32(x, limit)));
}
/* a 2^n for a in [0.5, 2) and n in -126 .. 0 */
VEC vec_times_power_of_two(vec a, vec n) {
  int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}
VEC vec_load_bf16(const void *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
/* Lane i of the result is the sum of the lanes of x[i]. */
VEC vec_sums(const vec x[LANES]) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }
VEC vec_reverse(vec a) {
  vec pairs = vrev64q_f32(a);
  return vextq_f32(pairs, pairs, 2);
}
static inline void vec_store(float *p, vec a) { vst1q_f32(p, a); }
/* Two floats, again and again. */
VEC vec_load_pair(const float *p) {
  float32x2_t both = vld1_f32(p);
  return vcombine_f32(both, both);
}
/* p[2 i] = lane i of a, p[2 i + 1] = that of b */
static inline void vec_store_pairs(float *p, vec a, vec b) {
  float32x4x2_t both = {{a, b}};
  vst2q_f32(p, both);
}
static inline float vec_total(vec a) { return vaddvq_f32(a); }
static inline float vec_highest(vec a) { return vmaxnmvq_f32(a); }

/* keys [64][d] BF16 -> panel [d][64]: squares of 4 x 4. */
static inline void transpose_keys(int d, const uint16_t *keys, float *panel) {
  for (int token = 0; token < PAGE_TOKENS; token += 4)
    for (int i = 0; i < d; i += 4) {
      vec x[4];
      for (int t = 0; t < 4; t++) x[t] = vec_load_bf16(keys + (token + t) * d + i);
      vec a = vtrn1q_f32(x[0], x[1]), b = vtrn2q_f32(x[0], x[1]), c = vtrn1q_f32(x[2], x[3]), e = vtrn2q_f32(x[2], x[3]);
      float64x2_t a2 = vreinterpretq_f64_f32(a), b2 = vreinterpretq_f64_f32(b), c2 = vreinterpretq_f64_f32(c),
                  e2 = vreinterpretq_f64_f32(e);
      float *out = panel + i * PAGE_TOKENS + token;
      vec_store(out, vreinterpretq_f32_f64(vtrn1q_f64(a2, c2)));
      vec_store(out + PAGE_TOKENS, vreinterpretq_f32_f64(vtrn1q_f64(b2, e2)));
      vec_store(out + 2 * PAGE_TOKENS, vreinterpretq_f32_f64(vtrn2q_f64(a2, c2)));
      vec_store(out + 3 * PAGE_TOKENS, vreinterpretq_f32_f64(vtrn2q_f64(b2, e2)));
    }
}

/* Integers. */
#define IVEC static inline __attribute__((always_inline)) ivec
IVEC ivec_set(int x) { return vdupq_n_s32(x); }
IVEC ivec_dword(const void *p, int i) {
  int x;
  memcpy(&x, (const char *)p + 4 * i, sizeof x);
  return ivec_set(x);
}
IVEC ivec_load(const void *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
IVEC ivec_add(ivec a, ivec b) { return vaddq_s32(a, b); }
IVEC ivec_nearest(vec a) { return vcvtnq_s32_f32(a); }
IVEC ivec_shift_left(ivec a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
IVEC ivec_shift_right(ivec a, int n) { return vshlq_s32(a, vdupq_n_s32(-n)); }
IVEC ivec_crumbs(ivec a, int j) {
  uint8x16_t shifted = vshlq_u8(vreinterpretq_u8_s32(a), vdupq_n_s8((int8_t)(-2 * j)));
  return vreinterpretq_s32_u8(vandq_u8(shifted, vdupq_n_u8(3)));
}
IVEC ivec_dot(ivec sum, const ivec crumbs[4], const void *q) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) sum = vdotq_s32(sum, vreinterpretq_s8_s32(crumbs[j]), vreinterpretq_s8_s32(ivec_dword(q, j)));
  return sum;
}
VEC ivec_to_float(ivec a) { return vcvtq_f32_s32(a); }
VEC vec_abs(vec a) { return vabsq_f32(a); }
VEC vec_load_f16(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
/* The gains of group p from LANES words of log gains. */
VEC vec_load_log_gains(const void *p, int group) {
  uint16_t words[LANES];
  float gains[LANES];
  memcpy(words, p, sizeof words);
  for (int i = 0; i < LANES; i++) gains[i] = log_gain_table[words[i] >> 4 * group & 15];
  return vld1q_f32(gains);
}
static inline void ivec_store_bytes(void *p, ivec a) {
  int16x4_t words = vmovn_s32(a);
  int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  uint32_t four = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
  memcpy(p, &four, sizeof four);
}

#include "attention/cpu/coded_kernels.h"

const struct attention_kernels attention_kernels_neon_dot = ATTENTION_KERNELS("NEON with dot product");
