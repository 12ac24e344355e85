/*
 * oscar/cuda.h - NVIDIA GPUs: the handle that caches and attention on a GPU hang on.
 *
 * Every build has these functions; one without CUDA, or a machine without a driver, has no GPUs. A handle belongs to one context,
 * one GPU and one stream: everything that objects made from it do is enqueued on that stream, in the order of the calls, and
 * functions return before it has been done unless they say otherwise.
 */
#ifndef OSCAR_CUDA_H
#define OSCAR_CUDA_H

#include <oscar/oscar.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct oscar_cuda oscar_cuda;

/* GPUs that this build can use here; 0 without CUDA, without a driver, or where all GPUs are too old (compute capability below
 * 8.0). */
OSCAR_API int oscar_cuda_count(void);

typedef struct oscar_cuda_options {
  int ordinal;  /* 0 .. the number of GPUs of the driver - 1 */
  void *stream; /* a cudaStream_t of the caller's, which must outlive the handle; NULL: the handle makes its own */
} oscar_cuda_options;

/* options may be NULL (the first GPU, its own stream). Free with oscar_cuda_free after every object made from the handle.
 * Errors: INVALID_ARGUMENT, UNSUPPORTED (no CUDA in this build, no driver, no such GPU, a GPU too old), NO_MEMORY. */
OSCAR_API oscar_status oscar_cuda_create(oscar_context *context, const oscar_cuda_options *options, oscar_cuda **cuda);
OSCAR_API void oscar_cuda_free(oscar_cuda *cuda);

OSCAR_API void *oscar_cuda_stream(const oscar_cuda *cuda); /* a cudaStream_t */
/* Waits for everything that was enqueued. Errors: UNSUPPORTED, with the driver's words, after a fault on the GPU. */
OSCAR_API oscar_status oscar_cuda_wait(oscar_cuda *cuda);

typedef struct oscar_cuda_info {
  const char *name; /* "NVIDIA H100 80GB HBM3"; valid as long as the handle */
  int ordinal;
  int capability; /* 90: compute capability 9.0 */
  int multiprocessors;
  size_t memory_bytes;    /* of the GPU */
  size_t allocated_bytes; /* by objects of this handle */
} oscar_cuda_info;
OSCAR_API void oscar_cuda_describe(const oscar_cuda *cuda, oscar_cuda_info *info);

#ifdef __cplusplus
}
#endif
#endif
