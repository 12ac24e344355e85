/* cache/cuda/rounding.cuh - how rows are rounded when they are written to exact pages. Private, CUDA C++. */
#ifndef OSCAR_CACHE_CUDA_ROUNDING_CUH
#define OSCAR_CACHE_CUDA_ROUNDING_CUH

#include <cuda_runtime.h>
#include <stdint.h>

/* To BF16, to nearest even; `finite` becomes false if the result is not. */
__device__ static __forceinline__ uint32_t rounded_bf16(float x, bool &finite) {
  const uint32_t u = __float_as_uint(x), rounded = (u + 0x7FFFu + (u >> 16 & 1)) >> 16;
  finite = finite && (u & 0x7F800000u) != 0x7F800000u && (rounded & 0x7F80u) != 0x7F80u;
  return rounded & 0xFFFFu;
}

#endif
