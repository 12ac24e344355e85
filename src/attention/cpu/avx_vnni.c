/*
 * avx_vnni.c - attention on a page with AVX2 and AVX-VNNI: vectors of 8, byte dot products in one instruction.
 */
#include "attention/cpu/avx2_vectors.h"

IVEC ivec_dot(ivec sum, const ivec crumbs[4], const void *q) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) sum = _mm256_dpbusd_avx_epi32(sum, crumbs[j], ivec_dword(q, j));
  return sum;
}

#include "attention/cpu/coded_kernels.h"

const struct attention_kernels attention_kernels_avx_vnni = ATTENTION_KERNELS("AVX-VNNI");
