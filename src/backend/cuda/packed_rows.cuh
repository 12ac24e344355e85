/*
 * backend/cuda/packed_rows.cuh - how kernels read weights in either form. Private, CUDA C++.
 *
 * bf16_rows and fp8_rows offer the same: rows, in vectors of 16 bytes that have COLS columns, and what their numbers are. Those
 * of FP8 come without the scale of their row, by which a sum is multiplied once.
 */
#ifndef OSCAR_CUDA_PACKED_ROWS_CUH
#define OSCAR_CUDA_PACKED_ROWS_CUH

#include "backend/cuda/cuda_backend.h"
#include "backend/e4m3.h"

#include <cuda_fp16.h>

/* A vector of a row, read once and not kept. */
__device__ static inline uint4 load_weights(const uint8_t *at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

__device__ static inline uint32_t bf16_pair(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *(const uint32_t *)&pair;
}

struct bf16_rows {
  enum { COLS = 8 };
  __device__ static uint8_t *row(const void *weights, int64_t row, int64_t padded) {
    return (uint8_t *)weights + row * padded * (int64_t)sizeof(__nv_bfloat16);
  }
  __device__ static float element(const void *weights, int64_t r, int64_t col, int64_t padded) {
    return __bfloat162float(((const __nv_bfloat16 *)row(weights, r, padded))[col]);
  }
  /* What sums of `eight` and of `pairs` are multiplied by. */
  __device__ static float scale_of_eights(const void *, int64_t, int64_t) { return 1; }
  __device__ static float scale_of_pairs(const void *, int64_t, int64_t) { return 1; }
  /* Columns 8 half .. 8 half + 7 of a vector. */
  __device__ static void eight(uint4 v, int half, float out[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    (void)half;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    }
  }
  /* All columns in BF16, two by two. */
  __device__ static void pairs(uint4 v, uint32_t out[COLS / 2]) { out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w; }
};

struct fp8_rows {
  enum { COLS = 16 };
  __device__ static uint8_t *group(const void *weights, int64_t row, int64_t padded) {
    return (uint8_t *)weights + row / PACKED_ROWS * PACKED_ROWS * (padded + (int64_t)sizeof(float));
  }
  __device__ static uint8_t *row(const void *weights, int64_t row, int64_t padded) {
    return group(weights, row, padded) + PACKED_ROWS * sizeof(float) + row % PACKED_ROWS * padded;
  }
  __device__ static float *scale_at(const void *weights, int64_t row, int64_t padded) {
    return (float *)(void *)group(weights, row, padded) + row % PACKED_ROWS;
  }
  __device__ static float element(const void *weights, int64_t r, int64_t col, int64_t padded) {
    return e4m3_to_f32(row(weights, r, padded)[col]) * *scale_at(weights, r, padded);
  }
  __device__ static float scale_of_eights(const void *weights, int64_t row, int64_t padded) {
    return *scale_at(weights, row, padded) * E4M3_FP16_FACTOR;
  }
  __device__ static float scale_of_pairs(const void *weights, int64_t row, int64_t padded) {
    return *scale_at(weights, row, padded);
  }
  /* Bytes 0 and 1, or 2 and 3, of a word to where pairs are made of codes. */
  __device__ static uint32_t low_codes(uint32_t word) { return __byte_perm(word, 0, 0x1404); }
  __device__ static uint32_t high_codes(uint32_t word) { return __byte_perm(word, 0, 0x3424); }
  /* By way of fp16, whose factor is left for the sum. */
  __device__ static void eight(uint4 v, int half, float out[8]) {
    const uint32_t words[2] = {half ? v.z : v.x, half ? v.w : v.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t pair = e4m3_pair_to_fp16(i % 2 ? high_codes(words[i / 2]) : low_codes(words[i / 2]));
      const float2 x = __half22float2(*(const __half2 *)&pair);
      out[2 * i] = x.x, out[2 * i + 1] = x.y;
    }
  }
  /* The factor is not left for the sum here: numbers of 2^-120 would be subnormal as products. */
  __device__ static uint32_t bf16_codes(uint32_t codes) {
    const uint32_t pair = e4m3_pair_to_bf16(codes);
    const __nv_bfloat162 product = __hmul2(*(const __nv_bfloat162 *)&pair, __float2bfloat162_rn(E4M3_BF16_FACTOR));
    return *(const uint32_t *)&product;
  }
  __device__ static void pairs(uint4 v, uint32_t out[COLS / 2]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[2 * i] = bf16_codes(low_codes(words[i]));
      out[2 * i + 1] = bf16_codes(high_codes(words[i]));
    }
  }
};

#endif
