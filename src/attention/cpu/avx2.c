/*
 * avx2.c - attention on a page with AVX2, FMA and F16C: vectors of 8, byte dot products from 16-bit pairs.
 */
#include "attention/cpu/avx2_vectors.h"

/* Pairs of products are at most 2 * 3 * 128 in size, so that four of them add up in 16 bits. */
IVEC ivec_dot(ivec sum, const ivec crumbs[4], const void *q) {
  ivec pairs = _mm256_maddubs_epi16(crumbs[0], ivec_dword(q, 0));
#pragma GCC unroll 4
  for (int j = 1; j < 4; j++) pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(crumbs[j], ivec_dword(q, j)));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "attention/cpu/coded_kernels.h"

const struct attention_kernels attention_kernels_avx2 = ATTENTION_KERNELS("AVX2");
