/* The kernels on packed weights for AVX-VNNI with the same instruction as AVX-512 encodes it, for CPUs that have that alone. */
#include <immintrin.h>

#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32
#define packed_avx_vnni         packed_emulated_avx_vnni

#include "backend/cpu/packed_avx_vnni.c"
