/* none.c - a build without CUDA has no such backend. */
#include "backend/backend.h"

oscar_status backend_create_cuda(oscar_context *context, oscar_cuda *cuda, enum weight_form form, struct backend **backend) {
  (void)cuda, (void)form;
  *backend = NULL;
  return set_error(context, OSCAR_UNSUPPORTED, "this build has no CUDA: build with -DOSCAR_CUDA=ON where nvcc is installed");
}

size_t backend_cuda_free_bytes(const struct backend *backend) {
  (void)backend;
  return 0;
}

oscar_status backend_cuda_read_speed(struct backend *backend, double *bytes_per_s) {
  *bytes_per_s = 0;
  return set_error(backend->context, OSCAR_UNSUPPORTED, "this build has no CUDA");
}

void backend_cuda_choose(struct backend *backend, enum cuda_product way) { (void)backend, (void)way; }
