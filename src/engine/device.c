/* device.c - from the name of a device to a backend on it. */
#include "engine/engine.h"

#include <string.h>

static oscar_status open_gpu(oscar_context *context, int ordinal, oscar_cuda **cuda, struct backend **backend) {
  oscar_status status = oscar_cuda_create(context, &(oscar_cuda_options){.ordinal = ordinal}, cuda);
  if (status != OSCAR_OK) return status;
  status = backend_create_cuda(context, *cuda, backend);
  if (status == OSCAR_OK) return OSCAR_OK;
  oscar_cuda_free(*cuda);
  *cuda = NULL;
  return status;
}

/* "cuda" or "cuda:N"; -1 if it is neither. Numbers have up to three digits: no machine has more GPUs. */
static int gpu_of(const char *device) {
  if (strncmp(device, "cuda", 4) != 0) return -1;
  const char *digits = device + 5;
  const size_t count = device[4] == ':' ? strlen(digits) : 0;
  if (device[4] == '\0') return 0;
  if (count < 1 || count > 3 || strspn(digits, "0123456789") != count) return -1;
  int ordinal = 0;
  for (size_t i = 0; i < count; i++) ordinal = 10 * ordinal + (digits[i] - '0');
  return ordinal;
}

bool device_is_known(const char *device) { return strcmp(device, "cpu") == 0 || gpu_of(device) >= 0; }

oscar_status device_open(oscar_context *context, const char *device, oscar_cuda **cuda, struct backend **backend) {
  *cuda = NULL;
  *backend = NULL;
  if (strcmp(device, "cpu") == 0) return backend_create_cpu(context, backend);
  const int ordinal = gpu_of(device);
  if (ordinal < 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "device '%s'; expected cpu, cuda, or cuda:N for GPU N", device);
  return open_gpu(context, ordinal, cuda, backend);
}
