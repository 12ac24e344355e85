/* base/transpose16.h - a square of 16 x 16 dwords in AVX-512 registers, transposed. */
#ifndef OSCAR_BASE_TRANSPOSE16_H
#define OSCAR_BASE_TRANSPOSE16_H

#include <immintrin.h>

static inline __attribute__((always_inline)) void transpose(__m512i x[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  /* b[4 g + c] holds in its 128-bit lane l column 4 l + c of rows 4 g .. 4 g + 3 */
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  for (int c = 0; c < 4; c++) {
    __m512i even0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), odd0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xDD);
    __m512i even1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88), odd1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xDD);
    x[c] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    x[8 + c] = _mm512_shuffle_i32x4(even0, even1, 0xDD);
    x[4 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    x[12 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0xDD);
  }
}

#endif
