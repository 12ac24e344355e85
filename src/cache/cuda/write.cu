/* write.cu - rows of new tokens into exact pages (cache/cuda/write.h). */
#include "cache/cuda/rounding.cuh"
#include "cache/cuda/write.h"
#include "cuda/launch.cuh"

namespace {

/* A warp for each row of k or v. */
__global__ void write_kernel(uint8_t *memory, size_t unit_bytes, int kv_heads, int head_dim, int tokens,
                             const struct write_place *places, const float *k, const float *v, unsigned long long *bad) {
  const int row = (int)((blockIdx.x * (size_t)blockDim.x + threadIdx.x) / 32), lane = threadIdx.x % 32;
  wait_for_input();
  if (row >= 2 * tokens * kv_heads) return;
  const int side = row % 2, head = row / 2 % kv_heads, token = row / 2 / kv_heads;
  const float *from = (side ? v : k) + ((size_t)token * kv_heads + head) * head_dim;
  const struct write_place place = places[token];
  uint32_t *to = (uint32_t *)(memory + (size_t)place.unit * unit_bytes +
                              (((size_t)head * 2 + side) * PAGE_TOKENS + place.place) * head_dim * 2);
  bool finite = true;
  for (int i = lane; i < head_dim / 2; i += 32) {
    const float2 x = ((const float2 *)from)[i];
    const uint32_t low = rounded_bf16(x.x, finite);
    to[i] = low | rounded_bf16(x.y, finite) << 16;
  }
  if (!__all_sync(~0u, finite) && lane == 0) atomicMin(bad, (unsigned long long)row);
}

} // namespace

oscar_status write_rows(struct oscar_cuda *cuda, uint8_t *memory, size_t unit_bytes, int kv_heads, int head_dim, int tokens,
                        const struct write_place *places, const float *k, const float *v, unsigned long long *bad) {
  const int rows = 2 * tokens * kv_heads;
  return cuda_result(cuda,
                     launch_kernel(cuda, write_kernel, dim3((unsigned)(rows + 7) / 8), 256, 0, memory, unit_bytes, kv_heads,
                                   head_dim, tokens, places, k, v, bad),
                     "writing rows");
}
