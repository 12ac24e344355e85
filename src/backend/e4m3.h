/*
 * backend/e4m3.h - 8-bit floats of 4 exponent and 3 mantissa bits, for the host and for GPUs. Private, C and CUDA C++.
 *
 * E4M3 of the OCP 8-bit Floating Point Specification (OFP8), 1.0: a sign, an exponent of bias 7, subnormal numbers, no
 * infinities, NaN where all bits but the sign are ones. The largest number is 448, the smallest 2^-9. GPUs have instructions for
 * it from compute capability 8.9 on; what is here are integer operations, exact and the same everywhere.
 *
 * Weights in it have one scale for every row, the one that takes the row's largest magnitude to 448.
 */
#ifndef OSCAR_E4M3_H
#define OSCAR_E4M3_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define E4M3_FUNCTION __host__ __device__ static inline
#else
#define E4M3_FUNCTION static inline
#endif

#define E4M3_LARGEST 448.0f
#define E4M3_NAN     0x7F

E4M3_FUNCTION uint32_t e4m3_float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
E4M3_FUNCTION float e4m3_float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* To the nearest, ties to even; beyond 448 it is 448. NaN stays NaN. */
E4M3_FUNCTION uint8_t f32_to_e4m3(float x) {
  const uint32_t bits = e4m3_float_bits(x), magnitude = bits & 0x7FFFFFFFu, sign = bits >> 24 & 0x80;
  if (magnitude > 0x7F800000u) return (uint8_t)(sign | E4M3_NAN);
  if (magnitude >= 0x43E00000u) return (uint8_t)(sign | (E4M3_NAN - 1)); /* 448 */
  /* Below 2^-6 numbers are multiples of 2^-9, which is the distance of floats at 2^14: the sum rounds to them. */
  if (magnitude < 0x3C800000u)
    return (uint8_t)(sign | (e4m3_float_bits(e4m3_float_of(magnitude) + 16384.0f) - e4m3_float_bits(16384.0f)));
  /* Half of what is cut off, less one where the last bit that stays is even; a carry goes into the exponent, as it must. */
  const uint32_t rounded = magnitude + 0x7FFFFu + (magnitude >> 20 & 1);
  return (uint8_t)(sign | ((rounded >> 20) - ((127 - 7) << 3)));
}

E4M3_FUNCTION float e4m3_to_f32(uint8_t code) {
  const uint32_t sign = (uint32_t)(code & 0x80) << 24, magnitude = code & 0x7F;
  if (magnitude == E4M3_NAN) return e4m3_float_of(sign | 0x7FC00000u);
  const float x = magnitude < 8 ? (float)magnitude * 0x1p-9f : e4m3_float_of((magnitude + ((127 - 7) << 3)) << 20);
  return e4m3_float_of(e4m3_float_bits(x) | sign);
}

/*
 * The scale of a row, by the largest of the bits of its elements without their signs: NaN if one of them is not finite, so that
 * all that is made of the row shows it. Rows whose scale would be subnormal get the smallest that is not.
 */
E4M3_FUNCTION float e4m3_scale(uint32_t largest_bits) {
  if (largest_bits >= 0x7F800000u) return e4m3_float_of(0x7FC00000u);
  const float scale = e4m3_float_of(largest_bits) / E4M3_LARGEST;
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}

/*
 * Two codes, at bits 8..15 and 24..31, as two fp16 or BF16 numbers: the fields of a code are those of a wider number of another
 * bias, subnormal ones too, so that each is the code's number times 2^-8 (fp16) or 2^-120 (BF16). Not for NaN.
 */
#define E4M3_FP16_FACTOR 0x1p8f
#define E4M3_BF16_FACTOR 0x1p120f
E4M3_FUNCTION uint32_t e4m3_pair_to_fp16(uint32_t codes) { return (codes & 0x80008000u) | (codes >> 1 & 0x3F803F80u); }
E4M3_FUNCTION uint32_t e4m3_pair_to_bf16(uint32_t codes) { return (codes & 0x80008000u) | (codes >> 4 & 0x07F007F0u); }

#endif
