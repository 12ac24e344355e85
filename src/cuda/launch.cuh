/*
 * cuda/launch.cuh - launches of kernels that overlap. Private, CUDA C++.
 *
 * A kernel may begin while the one before it ends (compute capability 9.0 and later: programmatic dependent launch), which hides
 * most of what a launch costs, also in graphs. So a kernel launched here waits for the one before it where it needs what that
 * leaves, and before it writes anything that others may still read; and it tells when the one after it may begin. Waiting is for
 * the end of the kernel before, not for its telling: as long as some block of every kernel waits, all that was enqueued before is
 * done then. Elsewhere neither does anything.
 *
 * Nothing overtakes copies: what was uploaded before a step, and weights, may be read without waiting.
 */
#ifndef OSCAR_CUDA_LAUNCH_H
#define OSCAR_CUDA_LAUNCH_H

#include "cuda/device.h"

#include <cuda_runtime.h>

__device__ static __forceinline__ void wait_for_kernel_before(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ static __forceinline__ void start_kernel_after(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/* Both: what kernels do that read and write activations only. To tell first, so that a product asks for its weights while a norm
 * before it still waits, gained up to 1 % of a step of one sequence and cost 4 % of one of eight. */
__device__ static __forceinline__ void wait_for_input(void) {
  wait_for_kernel_before();
  start_kernel_after();
}

/* `arguments` are pointers to the kernel's. */
static inline cudaError_t launch_overlapping(const struct oscar_cuda *cuda, const void *kernel, dim3 grid, int threads,
                                             size_t shared_bytes, void **arguments) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = (cudaStream_t)cuda->stream;
  config.attrs = &early;
  config.numAttrs = cuda->info.capability >= 90 ? 1 : 0;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

/* A kernel of any form, with what it wants of forms alike. */
template <typename... P, typename... A>
static inline cudaError_t launch_kernel(const struct oscar_cuda *cuda, void (*kernel)(P...), dim3 grid, int threads,
                                        size_t shared_bytes, const A &...given) {
  return [&](P... exact) {
    void *arguments[] = {(void *)&exact...};
    return launch_overlapping(cuda, (const void *)kernel, grid, threads, shared_bytes, arguments);
  }(P(given)...);
}

#endif
