/*
 * cuda/device.h - the handle of a GPU as the rooms that have kernels see it. Private. For C and for CUDA; what is here exists in
 * builds without CUDA too, except where it says so.
 */
#ifndef OSCAR_CUDA_DEVICE_H
#define OSCAR_CUDA_DEVICE_H

#include <oscar/cuda.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "base/base.h"

struct oscar_cuda {
  oscar_context *context;
  oscar_cuda_info info;
  char name[256];
  void *stream; /* cudaStream_t */
  bool owns_stream;
  size_t shared_bytes; /* shared memory that one block may ask for */
  struct cuda_staging *staging;
  uint64_t releases; /* of device memory, counted: what was recorded holds as long as there are no more */
};

/* ---- builds with CUDA only (device.cu) ---- */

/* `error` is a cudaError_t: 0 is OSCAR_OK; anything else is recorded as "what: the driver's words". Out of memory is NO_MEMORY,
 * all else UNSUPPORTED. */
oscar_status cuda_result(struct oscar_cuda *cuda, int error, const char *what);
/* The error of the launches since the last call. */
oscar_status cuda_launched(struct oscar_cuda *cuda, const char *what);

/* Device memory, 256-byte aligned and counted. Released memory may still be in use by what is enqueued: both wait. */
oscar_status cuda_alloc(struct oscar_cuda *cuda, size_t bytes, void **memory);
void cuda_release(struct oscar_cuda *cuda, void *memory, size_t bytes);
/* Memory of the host that kernels can write to; what they wrote is there after oscar_cuda_wait. */
oscar_status cuda_host_alloc(struct oscar_cuda *cuda, size_t bytes, void **memory);
void cuda_host_release(void *memory);
/* Enqueued, by way of memory that copies run from beside the host: `from_host` may be used again at once. */
oscar_status cuda_upload(struct oscar_cuda *cuda, void *to, const void *from_host, size_t bytes);
/* Waits for what was enqueued before. */
oscar_status cuda_download(struct oscar_cuda *cuda, void *to_host, const void *from, size_t bytes);
/* Of many small parts, with few waits: by way of memory that copies run to at full speed. */
struct cuda_part {
  void *to_host;
  const void *from;
  size_t bytes;
};
oscar_status cuda_download_parts(struct oscar_cuda *cuda, const struct cuda_part *parts, int count);
oscar_status cuda_copy(struct oscar_cuda *cuda, void *to, const void *from, size_t bytes);
oscar_status cuda_clear(struct oscar_cuda *cuda, void *memory, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
