/* half.c - 16-bit floats in plain C, exact in every rounding case; vector code has its own conversions and is tested against
 * these. */
#include "base/base.h"

#include <string.h>

static uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

static float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

uint16_t f32_to_bf16(float x) {
  uint32_t u = bits_of(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(u >> 16 | 0x40); /* a quiet NaN */
  return (uint16_t)((u + 0x7FFFu + (u >> 16 & 1)) >> 16);
}

uint16_t f32_to_f16(float x) {
  uint32_t u = bits_of(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u); /* >= 65520 rounds to infinity */
  if (magnitude < 0x38800000u) {
    /* Below 2^-14 halves are multiples of 2^-24; adding 0.5 makes the float adder round to them. */
    uint32_t rounded = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
    return (uint16_t)(sign | rounded);
  }
  uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

float f16_to_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 0x1Fu, mantissa = h & 0x3FFu;
  if (exponent == 31) return from_bits(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) {
    float small = (float)mantissa * 0x1p-24f;
    return sign ? -small : small;
  }
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}
