/* base/transpose8.h - a square of 8 x 8 dwords in AVX2 registers, transposed. */
#ifndef OSCAR_BASE_TRANSPOSE8_H
#define OSCAR_BASE_TRANSPOSE8_H

#include <immintrin.h>

static inline __attribute__((always_inline)) void transpose(__m256i x[8]) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    x[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}

#endif
