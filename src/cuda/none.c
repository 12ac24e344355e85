/* none.c - a build without CUDA: there are no GPUs, and asking for one says why. */
#include "cuda/device.h"

int oscar_cuda_count(void) { return 0; }

oscar_status oscar_cuda_create(oscar_context *context, const oscar_cuda_options *options, oscar_cuda **cuda) {
  (void)options;
  if (!context || !cuda) return OSCAR_INVALID_ARGUMENT;
  *cuda = NULL;
  return set_error(context, OSCAR_UNSUPPORTED, "this build has no CUDA: build with -DOSCAR_CUDA=ON where nvcc is installed");
}

/* No handle exists that these could be called with. */
void oscar_cuda_free(oscar_cuda *cuda) { (void)cuda; }
void *oscar_cuda_stream(const oscar_cuda *cuda) { return cuda->stream; }
oscar_status oscar_cuda_wait(oscar_cuda *cuda) { return set_error(cuda->context, OSCAR_UNSUPPORTED, "this build has no CUDA"); }
void oscar_cuda_describe(const oscar_cuda *cuda, oscar_cuda_info *info) { *info = cuda->info; }
