/*
 * attention/cuda/item_sums.cuh - what a block has of an item: the sums of its warps, put together into a part. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_ITEM_SUMS_CUH
#define OSCAR_ATTENTION_CUDA_ITEM_SUMS_CUH

#include "attention/cuda/coded_page.cuh"

namespace decode {

/* Where a warp puts its sums: [4 NT rows][stride], then (m, l) of every row. */
struct warp_sums {
  float *sums;
  float2 *states;
};
__host__ __device__ inline int warp_sums_bytes(int head_dim, int value_crumbs, int row_tiles) {
  return row_tiles * 4 * (part_stride(head_dim, value_crumbs) + 2) * 4;
}
template <int NT> __device__ inline warp_sums sums_of_warp(int head_dim, int value_crumbs, uint8_t *memory, int warp) {
  float *at = (float *)(memory + warp * warp_sums_bytes(head_dim, value_crumbs, NT));
  return {at, (float2 *)(at + 4 * NT * part_stride(head_dim, value_crumbs))};
}

/* Maxima are stored less `shift`: what the probabilities were made larger by. */
template <int NT> __device__ inline void store_states(softmax<NT> &state, const warp_sums &to, int lane, float shift) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) state.l[n] += __shfl_xor_sync(~0u, state.l[n], step);
    if (lane < 4) to.states[n * 4 + lane] = make_float2(state.m[n] - shift, state.l[n]);
  }
}
template <int NT> __device__ inline void store_no_states(const warp_sums &to, int lane) {
  if (lane < 4 * NT) to.states[lane] = make_float2(NONE, 0);
}

/* The sums of all warps, put together, into a part. By the whole block; `width` sums of each row count. */
template <int NT, int WARPS>
__device__ inline void store_part(int head_dim, int value_crumbs, uint8_t *memory, int width, float *part) {
  const int stride = part_stride(head_dim, value_crumbs);
  for (int i = threadIdx.x; i < 4 * NT * width / 4; i += WARPS * 32) {
    const int row = i / (width / 4), column = i % (width / 4) * 4;
    float m = NONE;
#pragma unroll
    for (int w = 0; w < WARPS; w++) m = fmaxf(m, sums_of_warp<NT>(head_dim, value_crumbs, memory, w).states[row].x);
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const warp_sums from = sums_of_warp<NT>(head_dim, value_crumbs, memory, w);
      if (!(from.states[row].x > NONE)) continue;
      const float f = exp2_fast(from.states[row].x - m);
      const float4 x = *(const float4 *)(from.sums + row * stride + column);
      sum.x += f * x.x, sum.y += f * x.y, sum.z += f * x.z, sum.w += f * x.w;
    }
    *(float4 *)(part + 2 * DECODE_ROWS + row * stride + column) = sum;
  }
  if (threadIdx.x < 4 * NT) {
    const int row = threadIdx.x;
    float m = NONE, l = 0;
    for (int w = 0; w < WARPS; w++) m = fmaxf(m, sums_of_warp<NT>(head_dim, value_crumbs, memory, w).states[row].x);
    for (int w = 0; w < WARPS; w++) {
      const float2 from = sums_of_warp<NT>(head_dim, value_crumbs, memory, w).states[row];
      if (from.x > NONE) l += from.y * exp2_fast(from.x - m);
    }
    ((float2 *)part)[row] = make_float2(m, l);
  }
}

} // namespace decode

#endif
