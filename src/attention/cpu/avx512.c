/*
 * avx512.c - attention on a page with AVX-512 and VNNI: vectors of 16, byte dot products in one instruction.
 */
#include "attention/cpu/avx512_vectors.h"

#include "attention/cpu/coded_kernels.h"

const struct attention_kernels attention_kernels_avx512 = ATTENTION_KERNELS("AVX-512 VNNI");
