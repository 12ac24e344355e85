/* The attention kernels for AVX-VNNI with the same instruction as AVX-512 encodes it, for CPUs that have that alone. */
#include <immintrin.h>

#define _mm256_dpbusd_avx_epi32    _mm256_dpbusd_epi32
#define attention_kernels_avx_vnni attention_kernels_emulated_avx_vnni

#include "attention/cpu/avx_vnni.c"
