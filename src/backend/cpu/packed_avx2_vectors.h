/*
 * packed_avx2_vectors.h - what packed_kernels.h asks for, in AVX2, FMA and F16C, but for the products of bytes: vectors of 8
 * rows.
 */
#ifndef OSCAR_CPU_PACKED_AVX2_VECTORS_H
#define OSCAR_CPU_PACKED_AVX2_VECTORS_H

#include "backend/cpu/packed.h"

#include "base/inline.h"
#include "base/transpose8.h"

#include <immintrin.h>

#define LANES     8
#define MOST_SUMS 8 /* of 16 registers, beside codes, their masks and the products */
typedef __m256 vec;
typedef __m256i ivec;

INLINE vec vec_zero(void) { return _mm256_setzero_ps(); }
INLINE vec vec_set(float x) { return _mm256_set1_ps(x); }
INLINE vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec vec_fnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vec load_halves(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)); }
INLINE vec load_bytes(const uint8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}
INLINE vec load_signed_bytes(const uint8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}
INLINE void store_rows(float *p, int rows, vec x) {
  float each[LANES];
  if (rows >= LANES) {
    _mm256_storeu_ps(p, x);
  } else if (rows > 0) {
    _mm256_storeu_ps(each, x);
    memcpy(p, each, (size_t)rows * sizeof *p);
  }
}

INLINE ivec ivec_load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
INLINE void ivec_store(void *p, ivec x) { _mm256_storeu_si256(p, x); }
INLINE ivec bits_of(vec x) { return _mm256_castps_si256(x); }
INLINE ivec shift_left(ivec x, int n) { return _mm256_slli_epi16(x, n); }
INLINE ivec shift_right(ivec x, int n) { return _mm256_srli_epi16(x, n); }
INLINE ivec low_halves(ivec x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE ivec high_halves(ivec x) { return low_halves(shift_right(x, 4)); }
/* The dword at p in every lane. */
INLINE ivec ivec_dword(const void *p) {
  int32_t x;
  memcpy(&x, p, sizeof x);
  return _mm256_set1_epi32(x);
}
/* Sets bit 4 where the 32 bits from p on have a one: each byte looks at its own bit of its own byte of them. */
INLINE ivec add_fifth(ivec q, const uint8_t *p) {
  const ivec byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const ivec bit_of = _mm256_set1_epi64x((long long)0x8040201008040201);
  ivec bits = _mm256_and_si256(_mm256_shuffle_epi8(ivec_dword(p), byte_of), bit_of);
  return _mm256_or_si256(q, _mm256_and_si256(_mm256_cmpeq_epi8(bits, bit_of), _mm256_set1_epi8(16)));
}
/* Bits 4 and 5. */
INLINE ivec add_upper(ivec q, ivec upper) { return _mm256_or_si256(q, _mm256_and_si256(upper, _mm256_set1_epi8(0x30))); }
/* Byte j of every dword. */
INLINE vec byte_of_dwords(ivec q, int j) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(q, 8 * j), _mm256_set1_epi32(255)));
}

#endif
