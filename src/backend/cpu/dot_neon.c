/*
 * dot_neon.c - the kernels of dot.h for NEON with its dot product instructions (ARMv8.2).
 *
 * A register holds 16 bytes, which is a run: SDOT leaves four lanes of one run, so that a group of four runs (64 elements) is
 * four registers of weights, and pairwise additions make their sums one register, in the order in which the scales lie. Nothing
 * is shuffled. The sum over high bytes is shifted left by 7 and is what the low bytes are added to, all in 32 bits: exact.
 *
 * SDOT takes signed bytes on both sides. Unsigned weights have at most six bits in every format, so that they are the same
 * number read as signed, and a sum of a run (16 * 63 * 16256 < 2^24) converts to float exactly; eight bits occur in Q8_0 alone,
 * whose weights are signed as they lie in the file, and need no offset (m = 0).
 */
#include "backend/cpu/dot.h"

#include "base/inline.h"

#include <arm_neon.h>

#define LANES        4
#define FLOAT_TOKENS 4
#define READS_ON     false
#define GROUP        64 /* elements whose runs' sums fill a register */
#define GROUP_RUNS   (GROUP / RUN)
#define CHUNK_GROUPS (CHUNK / GROUP)

typedef float32x4_t vec;
/* Element i of group g: run 4g + i. */
struct scales {
  float32x4_t a[CHUNK_GROUPS], m[CHUNK_GROUPS];
};
typedef void load_scales(const uint8_t *p, struct scales *s);
/* Elements 64g .. 64g + 63 of the chunk; bytes that vdotq_s32 reads as signed. */
typedef void load_weights(const uint8_t *p, int g, uint8x16_t q[GROUP_RUNS]);
struct format {
  load_scales *scales;
  load_weights *weights;
  int block_elements;
  size_t block_bytes;
};

/* ---- unpacking ---- */

INLINE uint16_t half_bits(const uint8_t *p) {
  uint16_t h;
  memcpy(&h, p, sizeof h);
  return h;
}

INLINE uint32_t word_bits(const uint8_t *p) {
  uint32_t w;
  memcpy(&w, p, sizeof w);
  return w;
}

INLINE float32x4_t half_floats(uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }

/* The halves at the same place of four blocks `stride` bytes apart. */
INLINE float32x4_t block_floats(const uint8_t *p, int stride) {
  uint16x4_t bits = vdup_n_u16(half_bits(p));
  bits = vset_lane_u16(half_bits(p + stride), bits, 1);
  bits = vset_lane_u16(half_bits(p + 2 * stride), bits, 2);
  bits = vset_lane_u16(half_bits(p + 3 * stride), bits, 3);
  return half_floats(bits);
}

/* Four floats, each for two runs. */
INLINE void twice(float32x4_t f, float32x4_t runs[2]) {
  runs[0] = vzip1q_f32(f, f);
  runs[1] = vzip2q_f32(f, f);
}

INLINE void scales_only(const uint8_t *p, int stride, float offset, struct scales *s) {
  for (int i = 0; i < 2; i++) {
    float32x4_t d = block_floats(p + 4 * i * stride, stride);
    twice(d, s->a + 2 * i);
    twice(vmulq_n_f32(d, offset), s->m + 2 * i);
  }
}

INLINE void scales_minima(const uint8_t *p, int stride, struct scales *s) {
  for (int i = 0; i < 2; i++) {
    twice(block_floats(p + 4 * i * stride, stride), s->a + 2 * i);
    twice(block_floats(p + 4 * i * stride + 2, stride), s->m + 2 * i);
  }
}

INLINE void nibbles(const uint8_t *qs, uint8x16_t q[2]) {
  uint8x16_t v = vld1q_u8(qs);
  q[0] = vandq_u8(v, vdupq_n_u8(15));
  q[1] = vshrq_n_u8(v, 4);
}

/* 16 in the bytes that have a one at that bit. */
INLINE uint8x16_t sixteen_where(uint8x16_t v, uint8x16_t bit) { return vandq_u8(vtstq_u8(v, bit), vdupq_n_u8(16)); }

/* Nibbles and the word of fifth bits, of which each byte looks at its own. */
INLINE void five_bits(const uint8_t *qh, const uint8_t *qs, uint8x16_t q[2]) {
  uint8x16_t bit_of = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
  nibbles(qs, q);
  for (int i = 0; i < 2; i++) {
    uint8x16_t bytes = vcombine_u8(vdup_n_u8(qh[2 * i]), vdup_n_u8(qh[2 * i + 1]));
    q[i] = vorrq_u8(q[i], sixteen_where(bytes, bit_of));
  }
}

INLINE void scales_q4_0(const uint8_t *p, struct scales *s) { scales_only(p, 18, -8, s); }
INLINE void scales_q4_1(const uint8_t *p, struct scales *s) { scales_minima(p, 20, s); }
INLINE void scales_q5_0(const uint8_t *p, struct scales *s) { scales_only(p, 22, -16, s); }
INLINE void scales_q5_1(const uint8_t *p, struct scales *s) { scales_minima(p, 24, s); }
INLINE void scales_q8_0(const uint8_t *p, struct scales *s) { scales_only(p, 34, 0, s); }

INLINE void weights_q4_0(const uint8_t *p, int g, uint8x16_t q[GROUP_RUNS]) {
  for (int i = 0; i < 2; i++) nibbles(p + 18 * (2 * g + i) + 2, q + 2 * i);
}
INLINE void weights_q4_1(const uint8_t *p, int g, uint8x16_t q[GROUP_RUNS]) {
  for (int i = 0; i < 2; i++) nibbles(p + 20 * (2 * g + i) + 4, q + 2 * i);
}
INLINE void weights_q5_0(const uint8_t *p, int g, uint8x16_t q[GROUP_RUNS]) {
  for (int i = 0; i < 2; i++) five_bits(p + 22 * (2 * g + i) + 2, p + 22 * (2 * g + i) + 6, q + 2 * i);
}
INLINE void weights_q5_1(const uint8_t *p, int g, uint8x16_t q[GROUP_RUNS]) {
  for (int i = 0; i < 2; i++) five_bits(p + 24 * (2 * g + i) + 4, p + 24 * (2 * g + i) + 8, q + 2 * i);
}
INLINE void weights_q8_0(const uint8_t *p, int g, uint8x16_t q[GROUP_RUNS]) {
  for (int i = 0; i < GROUP_RUNS; i++) q[i] = vld1q_u8(p + 34 * (2 * g + i / 2) + 2 + 16 * (i % 2));
}

/* Eight bytes as floats, each for two runs, times d. */
INLINE void scaled_bytes(uint32_t low, uint32_t high, float32x4_t d, float32x4_t runs[CHUNK_GROUPS]) {
  uint16x8_t words = vmovl_u8(vcreate_u8((uint64_t)high << 32 | low));
  twice(vmulq_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16(words))), d), runs);
  twice(vmulq_f32(vcvtq_f32_u32(vmovl_high_u16(words)), d), runs + 2);
}

/* d, dmin and the packed scales of Q4_K and Q5_K (backend/blocks.h), four numbers at a time in the bytes of 32-bit words. */
INLINE void scales_super(const uint8_t *p, struct scales *s) {
  uint32_t w[3] = {word_bits(p + 4), word_bits(p + 8), word_bits(p + 12)};
  uint32_t scale0 = w[0] & 0x3F3F3F3Fu, scale1 = (w[2] & 0x0F0F0F0Fu) | (w[0] >> 2 & 0x30303030u);
  uint32_t minimum0 = w[1] & 0x3F3F3F3Fu, minimum1 = (w[2] >> 4 & 0x0F0F0F0Fu) | (w[1] >> 2 & 0x30303030u);
  scaled_bytes(scale0, scale1, half_floats(vdup_n_u16(half_bits(p))), s->a);
  scaled_bytes(minimum0, minimum1, vnegq_f32(half_floats(vdup_n_u16(half_bits(p + 2)))), s->m);
}

INLINE void super_nibbles(const uint8_t *qs, int g, uint8x16_t q[GROUP_RUNS]) {
  for (int i = 0; i < 2; i++) {
    uint8x16_t v = vld1q_u8(qs + 32 * g + 16 * i);
    q[i] = vandq_u8(v, vdupq_n_u8(15));
    q[i + 2] = vshrq_n_u8(v, 4);
  }
}

INLINE void weights_q4_k(const uint8_t *p, int g, uint8x16_t q[GROUP_RUNS]) { super_nibbles(p + 16, g, q); }

INLINE void weights_q5_k(const uint8_t *p, int g, uint8x16_t q[GROUP_RUNS]) {
  super_nibbles(p + 48, g, q);
  for (int i = 0; i < GROUP_RUNS; i++) {
    uint8x16_t bit = vdupq_n_u8((uint8_t)(1 << (2 * g + i / 2)));
    q[i] = vorrq_u8(q[i], sixteen_where(vld1q_u8(p + 16 + 16 * (i % 2)), bit));
  }
}

INLINE void scales_q6_k(const uint8_t *p, struct scales *s) {
  float32x4_t d = half_floats(vdup_n_u16(half_bits(p + 208)));
  int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p + 192));
  int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  int32x4_t runs[CHUNK_GROUPS] = {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
                                  vmovl_high_s16(high)};
  for (int g = 0; g < CHUNK_GROUPS; g++) {
    s->a[g] = vmulq_f32(vcvtq_f32_s32(runs[g]), d);
    s->m[g] = vmulq_n_f32(s->a[g], -32);
  }
}

/* Group g is quarters 2 (g % 2) and the next of half g / 2: the low four bits of both are low or both high halves of bytes. */
INLINE void weights_q6_k(const uint8_t *p, int g, uint8x16_t q[GROUP_RUNS]) {
  int half = g / 2, first_quarter = 2 * (g % 2);
  for (int i = 0; i < GROUP_RUNS; i++) {
    uint8x16_t low = vld1q_u8(p + 64 * half + 16 * i), high = vld1q_u8(p + 128 + 32 * half + 16 * (i % 2));
    low = first_quarter ? vshrq_n_u8(low, 4) : vandq_u8(low, vdupq_n_u8(15));
    high = vshlq_u8(high, vdupq_n_s8((int8_t)(4 - 2 * (first_quarter + i / 2)))); /* negative: to the right */
    q[i] = vorrq_u8(low, vandq_u8(high, vdupq_n_u8(0x30)));
  }
}

#define FORMAT(name, elements, bytes) static const struct format name = {scales_##name, weights_##name, elements, bytes}
#define scales_q4_k                   scales_super
#define scales_q5_k                   scales_super
FORMAT(q4_0, 32, 18);
FORMAT(q4_1, 32, 20);
FORMAT(q5_0, 32, 22);
FORMAT(q5_1, 32, 24);
FORMAT(q8_0, 32, 34);
FORMAT(q4_k, 256, 144);
FORMAT(q5_k, 256, 176);
FORMAT(q6_k, 256, 210);

/* ---- products ---- */

/* The four sums q (128 high + low) of a group. */
INLINE int32x4_t group_sums(const uint8x16_t q[GROUP_RUNS], const int8_t *high, const int8_t *low) {
  int32x4_t lanes[GROUP_RUNS];
#pragma GCC unroll 4
  for (int i = 0; i < GROUP_RUNS; i++) {
    int8x16_t weights = vreinterpretq_s8_u8(q[i]);
    int32x4_t upper = vdotq_s32(vdupq_n_s32(0), weights, vld1q_s8(high + RUN * i));
    lanes[i] = vdotq_s32(vshlq_n_s32(upper, 7), weights, vld1q_s8(low + RUN * i));
  }
  return vpaddq_s32(vpaddq_s32(lanes[0], lanes[1]), vpaddq_s32(lanes[2], lanes[3]));
}

INLINE vec vec_zero(void) { return vdupq_n_f32(0); }
INLINE vec vec_add(vec a, vec b) { return vaddq_f32(a, b); }
INLINE vec vec_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
INLINE void vec_store(float *out, vec v) { vst1q_f32(out, v); }
INLINE float vec_sum(vec v) { return vaddvq_f32(v); }

/* All groups, those that are not there being zeros. */
INLINE void accumulate(struct format f, const uint8_t *p, int groups, const struct act_chunk *x, int64_t x_stride, const int n,
                       vec sums[][2]) {
  (void)groups;
  struct scales s;
  f.scales(p, &s);
#pragma GCC unroll 4
  for (int g = 0; g < CHUNK_GROUPS; g++) {
    uint8x16_t q[GROUP_RUNS];
    f.weights(p, g, q);
    for (int t = 0; t < n; t++) {
      const struct act_chunk *xt = x + t * x_stride;
      float32x4_t products = vcvtq_f32_s32(group_sums(q, xt->high + GROUP * g, xt->low + GROUP * g));
      float32x4_t scale = vmulq_f32(s.a[g], vld1q_f32(xt->scale + GROUP_RUNS * g));
      sums[t][0] = vfmaq_f32(sums[t][0], products, scale);
      sums[t][1] = vfmaq_f32(sums[t][1], s.m[g], vld1q_f32(xt->sum + GROUP_RUNS * g));
    }
  }
}

/* ---- expansion ---- */

/* One run; a q + m is one rounding of the exact value, as in weight_dequantize. */
INLINE void expand_run(uint8x16_t q, float a, float m, float *out) {
  int8x16_t bytes = vreinterpretq_s8_u8(q);
  int16x8_t halves[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)};
  float32x4_t scale = vdupq_n_f32(a), offset = vdupq_n_f32(m);
  for (int i = 0; i < 2; i++) {
    vst1q_f32(out + 8 * i, vfmaq_f32(offset, vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves[i]))), scale));
    vst1q_f32(out + 8 * i + 4, vfmaq_f32(offset, vcvtq_f32_s32(vmovl_high_s16(halves[i])), scale));
  }
}

INLINE void expand_chunk(struct format f, const uint8_t *p, int groups, float *out) {
  const int runs = SMALL_BLOCK / RUN * groups;
  struct scales s;
  float a[CHUNK_RUNS], m[CHUNK_RUNS];
  f.scales(p, &s);
  for (int g = 0; g < CHUNK_GROUPS; g++) {
    vst1q_f32(a + GROUP_RUNS * g, s.a[g]);
    vst1q_f32(m + GROUP_RUNS * g, s.m[g]);
  }
  for (int g = 0; g * GROUP_RUNS < runs; g++) {
    uint8x16_t q[GROUP_RUNS];
    f.weights(p, g, q);
    for (int i = 0; i < GROUP_RUNS && GROUP_RUNS * g + i < runs; i++) {
      int r = GROUP_RUNS * g + i;
      expand_run(q[i], a[r], m[r], out + RUN * r);
    }
  }
}

/* ---- float weights ---- */

INLINE vec load_f32(const void *p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
INLINE vec load_f16(const void *p) { return half_floats(vreinterpret_u16_u8(vld1_u8(p))); }
INLINE vec load_bf16(const void *p) { return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16)); }

#include "backend/cpu/dot_kernels.h"

/* ---- activations ---- */

INLINE int8x16_t narrow(const int32x4_t v[4]) {
  int16x8_t low = vmovn_high_s32(vmovn_s32(v[0]), v[1]), high = vmovn_high_s32(vmovn_s32(v[2]), v[3]);
  return vmovn_high_s16(vmovn_s16(low), high);
}

/* quantize_run of dot.h by hand. */
INLINE void quantize_vectors(const float *x, uint32_t peak_bits, int8_t *high, int8_t *low, float *scale, float *sum) {
  int32x4_t h[4], l[4], total = vdupq_n_s32(0);
  uint32x4_t kept = vdupq_n_u32(run_is_finite(peak_bits) ? UINT32_MAX : 0);
  float inverse = run_inverse(peak_bits);
  for (int i = 0; i < 4; i++) {
    float32x4_t finite = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + 4 * i)), kept));
    float32x4_t shifted = vaddq_f32(vmulq_n_f32(finite, inverse), vdupq_n_f32(ROUNDING_SHIFT));
    int32x4_t v = vreinterpretq_s32_u32(vsubq_u32(vreinterpretq_u32_f32(shifted), vdupq_n_u32(ROUNDING_SHIFT_BITS)));
    h[i] = vrshrq_n_s32(v, 7); /* (v + 64) >> 7 */
    l[i] = vsubq_s32(v, vshlq_n_s32(h[i], 7));
    total = vaddq_s32(total, v);
  }
  vst1q_s8(high, narrow(h));
  vst1q_s8(low, narrow(l));
  *scale = run_scale(peak_bits, inverse);
  *sum = *scale * (float)vaddvq_s32(total);
}

static void quantize(const float *x, int count, struct act_chunk *chunk) {
  float padded[CHUNK];
  x = pad_chunk(x, count, padded);
  for (int k = 0; k < CHUNK; k += SCALED) {
    uint32_t peak_bits = peak_of(x + k, SCALED);
    for (int i = k; i < k + SCALED; i += RUN)
      quantize_vectors(x + i, peak_bits, chunk->high + i, chunk->low + i, chunk->scale + i / RUN, chunk->sum + i / RUN);
  }
}

const struct dot_kernels dot_neon = {
    .name = "NEON with dot product",
    /* AVX2's: not measured on ARM. Counting vector instructions, products here take 1.2 to 1.4 times those of a float product
     * without loss, besides the expansion that they save. */
    .many_tokens = 24,
    .quantize = quantize,
    .rows = ALL_TYPES(rows),
    .f32 = ALL_TYPES(f32),
};
