/* device.c - from the name of a device to a backend on it. */
#include "engine/engine.h"

#include <string.h>

static oscar_status open_gpu(oscar_context *context, int ordinal, enum weight_form form, oscar_cuda **cuda,
                             struct backend **backend) {
  oscar_status status = oscar_cuda_create(context, &(oscar_cuda_options){.ordinal = ordinal}, cuda);
  if (status != OSCAR_OK) return status;
  status = backend_create_cuda(context, *cuda, form, backend);
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

/* By weight_form. */
static const char *const weight_names[] = {"bf16", "fp8"};

const char *device_weights(int i) { return i >= 0 && i < (int)ARRAY_LENGTH(weight_names) ? weight_names[i] : NULL; }

static oscar_status weights_of(oscar_context *context, const char *weights, enum weight_form *form) {
  *form = WEIGHTS_BF16;
  if (!weights) return OSCAR_OK;
  for (size_t i = 0; i < ARRAY_LENGTH(weight_names); i++)
    if (strcmp(weights, weight_names[i]) == 0) {
      *form = (enum weight_form)i;
      return OSCAR_OK;
    }
  return set_error(context, OSCAR_INVALID_ARGUMENT, "weights in '%s'; expected bf16 or fp8", weights);
}

oscar_status device_open(oscar_context *context, const char *device, const char *weights, oscar_cuda **cuda,
                         struct backend **backend) {
  enum weight_form form;
  *cuda = NULL;
  *backend = NULL;
  oscar_status status = weights_of(context, weights, &form);
  if (status != OSCAR_OK) return status;
  const bool cpu = strcmp(device, "cpu") == 0;
  if (cpu && weights)
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "weights in %s are for GPUs (--device cuda): the CPU multiplies with those of the file", weights);
  if (cpu) return backend_create_cpu(context, backend);
  const int ordinal = gpu_of(device);
  if (ordinal < 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "device '%s'; expected cpu, cuda, or cuda:N for GPU N", device);
  return open_gpu(context, ordinal, form, cuda, backend);
}
