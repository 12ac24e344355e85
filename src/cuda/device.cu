/* device.cu - opening a GPU, its memory and copies, the driver's errors as ours (cuda/device.h). */
#include "cuda/device.h"

#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#define LEAST_CAPABILITY 80

/* Copies run from pinned memory beside the host: slots are filled in turn, and filled again when an event says that what was
 * copied from them has arrived. */
#define STAGING_SLOTS 4
#define STAGING_BYTES ((size_t)1 << 20)

struct cuda_staging {
  uint8_t *memory; /* [STAGING_SLOTS][STAGING_BYTES] */
  cudaEvent_t copied[STAGING_SLOTS];
  int next, events;
  size_t used; /* of slot `next` */
};

static cudaStream_t stream_of(const struct oscar_cuda *cuda) { return (cudaStream_t)cuda->stream; }

static int capability_of(int ordinal) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) != cudaSuccess) return 0;
  return 10 * major + minor;
}

static int count_all(void) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError(); /* no driver is no error of a later call */
    return 0;
  }
  return count;
}

int oscar_cuda_count(void) {
  int usable = 0;
  for (int i = 0, all = count_all(); i < all; i++) usable += capability_of(i) >= LEAST_CAPABILITY;
  return usable;
}

oscar_status cuda_result(struct oscar_cuda *cuda, int error, const char *what) {
  if (error == cudaSuccess) return OSCAR_OK;
  return set_error(cuda->context, error == cudaErrorMemoryAllocation ? OSCAR_NO_MEMORY : OSCAR_UNSUPPORTED, "GPU %d: %s: %s",
                   cuda->info.ordinal, what, cudaGetErrorString((cudaError_t)error));
}

oscar_status cuda_launched(struct oscar_cuda *cuda, const char *what) { return cuda_result(cuda, cudaGetLastError(), what); }

static oscar_status open_staging(struct oscar_cuda *cuda) {
  struct cuda_staging *s = (struct cuda_staging *)mem_zalloc(cuda->context, 1, sizeof *s);
  if (!s) return OSCAR_NO_MEMORY;
  cuda->staging = s;
  oscar_status status = OSCAR_OK;
  for (; s->events < STAGING_SLOTS && status == OSCAR_OK; s->events += status == OSCAR_OK)
    status = cuda_result(cuda, cudaEventCreateWithFlags(&s->copied[s->events], cudaEventDisableTiming), "making an event");
  if (status == OSCAR_OK)
    status = cuda_result(cuda, cudaMallocHost((void **)&s->memory, STAGING_SLOTS * STAGING_BYTES), "taking memory of the host");
  return status;
}

static void close_staging(struct oscar_cuda *cuda) {
  struct cuda_staging *s = cuda->staging;
  if (!s) return;
  for (int i = 0; i < s->events; i++) (void)cudaEventDestroy(s->copied[i]);
  if (s->memory) (void)cudaFreeHost(s->memory);
  mem_free(cuda->context, s);
}

static oscar_status open_device(struct oscar_cuda *cuda) {
  oscar_cuda_info *info = &cuda->info;
  cudaDeviceProp properties;
  oscar_status status = cuda_result(cuda, cudaSetDevice(info->ordinal), "opening it");
  if (status == OSCAR_OK) status = cuda_result(cuda, cudaGetDeviceProperties(&properties, info->ordinal), "asking what it is");
  if (status != OSCAR_OK) return status;
  snprintf(cuda->name, sizeof cuda->name, "%s", properties.name);
  info->name = cuda->name;
  info->capability = 10 * properties.major + properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  info->memory_bytes = properties.totalGlobalMem;
  cuda->shared_bytes = properties.sharedMemPerBlockOptin;
  if (info->capability < LEAST_CAPABILITY)
    return set_error(cuda->context, OSCAR_UNSUPPORTED, "GPU %d: %s has compute capability %d.%d; at least 8.0 is needed",
                     info->ordinal, info->name, properties.major, properties.minor);
  if ((status = open_staging(cuda)) != OSCAR_OK || cuda->stream) return status;
  cudaStream_t stream;
  status = cuda_result(cuda, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  if (status != OSCAR_OK) return status;
  cuda->stream = stream;
  cuda->owns_stream = true;
  return OSCAR_OK;
}

oscar_status oscar_cuda_create(oscar_context *context, const oscar_cuda_options *options, oscar_cuda **cuda) {
  if (!context || !cuda) return OSCAR_INVALID_ARGUMENT;
  *cuda = NULL;
  const oscar_cuda_options defaults = {0, NULL}, *o = options ? options : &defaults;
  const int all = count_all();
  if (all == 0)
    return set_error(context, OSCAR_UNSUPPORTED,
                     "no NVIDIA GPU was found: the driver is missing, too old for this build, or has none");
  if (o->ordinal < 0 || o->ordinal >= all)
    return set_error(context, OSCAR_UNSUPPORTED, "GPU %d was asked for; there %s %d, counted from 0", o->ordinal,
                     all == 1 ? "is" : "are", all);
  struct oscar_cuda *c = (struct oscar_cuda *)mem_zalloc(context, 1, sizeof *c);
  if (!c) return OSCAR_NO_MEMORY;
  c->context = context;
  c->info.ordinal = o->ordinal;
  c->stream = o->stream;
  oscar_status status = open_device(c);
  if (status != OSCAR_OK) {
    oscar_cuda_free(c);
    return status;
  }
  *cuda = c;
  return OSCAR_OK;
}

void oscar_cuda_free(oscar_cuda *cuda) {
  if (!cuda) return;
  (void)cudaStreamSynchronize(stream_of(cuda)); /* copies from memory that goes */
  close_staging(cuda);
  if (cuda->owns_stream) (void)cudaStreamDestroy(stream_of(cuda));
  mem_free(cuda->context, cuda);
}

void *oscar_cuda_stream(const oscar_cuda *cuda) { return cuda->stream; }
void oscar_cuda_describe(const oscar_cuda *cuda, oscar_cuda_info *info) { *info = cuda->info; }

oscar_status oscar_cuda_wait(oscar_cuda *cuda) {
  return cuda_result(cuda, cudaStreamSynchronize(stream_of(cuda)), "waiting for its work");
}

oscar_status cuda_alloc(struct oscar_cuda *cuda, size_t bytes, void **memory) {
  *memory = NULL;
  cudaError_t error = cudaMalloc(memory, bytes ? bytes : 1);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    size_t free_bytes = 0, total = 0;
    (void)cudaMemGetInfo(&free_bytes, &total);
    return set_error(cuda->context, OSCAR_NO_MEMORY, "GPU %d: %zu bytes were asked for, %zu of its %zu are free",
                     cuda->info.ordinal, bytes, free_bytes, total);
  }
  if (error == cudaSuccess) cuda->info.allocated_bytes += bytes;
  return cuda_result(cuda, error, "taking memory");
}

void cuda_release(struct oscar_cuda *cuda, void *memory, size_t bytes) {
  if (!memory) return;
  (void)cudaFree(memory);
  cuda->releases++;
  cuda->info.allocated_bytes -= bytes;
}

oscar_status cuda_host_alloc(struct oscar_cuda *cuda, size_t bytes, void **memory) {
  *memory = NULL;
  return cuda_result(cuda, cudaMallocHost(memory, bytes), "taking memory of the host");
}

void cuda_host_release(void *memory) {
  if (memory) (void)cudaFreeHost(memory);
}

/* ---- copies ---- */

oscar_status cuda_upload(struct oscar_cuda *cuda, void *to, const void *from_host, size_t bytes) {
  struct cuda_staging *staging = cuda->staging;
  oscar_status status = OSCAR_OK;
  for (size_t done = 0; done < bytes && status == OSCAR_OK;) {
    const size_t part = bytes - done < STAGING_BYTES ? bytes - done : STAGING_BYTES;
    const int slot = staging->next;
    if (staging->used + part > STAGING_BYTES) { /* the next slot, once its copies are done */
      status = cuda_result(cuda, cudaEventRecord(staging->copied[slot], stream_of(cuda)), "copying to it");
      if (status != OSCAR_OK) return status;
      staging->next = (slot + 1) % STAGING_SLOTS;
      staging->used = 0;
      status = cuda_result(cuda, cudaEventSynchronize(staging->copied[staging->next]), "copying to it");
      continue;
    }
    uint8_t *at = staging->memory + (size_t)slot * STAGING_BYTES + staging->used;
    memcpy(at, (const uint8_t *)from_host + done, part);
    status = cuda_result(cuda, cudaMemcpyAsync((uint8_t *)to + done, at, part, cudaMemcpyHostToDevice, stream_of(cuda)),
                         "copying to it");
    staging->used += round_up(part, 64);
    done += part;
  }
  return status;
}

oscar_status cuda_download(struct oscar_cuda *cuda, void *to_host, const void *from, size_t bytes) {
  oscar_status status =
      cuda_result(cuda, cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDeviceToHost, stream_of(cuda)), "copying from it");
  return status == OSCAR_OK ? oscar_cuda_wait(cuda) : status;
}

/* The staging memory is this function's from the first wait on, when uploads are done with it. */
oscar_status cuda_download_parts(struct oscar_cuda *cuda, const struct cuda_part *parts, int count) {
  uint8_t *const memory = cuda->staging->memory;
  oscar_status status = oscar_cuda_wait(cuda);
  for (int first = 0, end; first < count && status == OSCAR_OK; first = end) {
    if (parts[first].bytes > STAGING_SLOTS * STAGING_BYTES) {
      end = first + 1;
      status = cuda_download(cuda, parts[first].to_host, parts[first].from, parts[first].bytes);
      continue;
    }
    size_t used = 0;
    for (end = first; end < count && used + parts[end].bytes <= STAGING_SLOTS * STAGING_BYTES && status == OSCAR_OK; end++) {
      status = cuda_result(
          cuda, cudaMemcpyAsync(memory + used, parts[end].from, parts[end].bytes, cudaMemcpyDeviceToHost, stream_of(cuda)),
          "copying from it");
      used += round_up(parts[end].bytes, 64);
    }
    if (status == OSCAR_OK) status = oscar_cuda_wait(cuda);
    used = 0;
    for (int i = first; i < end && status == OSCAR_OK; used += round_up(parts[i++].bytes, 64))
      memcpy(parts[i].to_host, memory + used, parts[i].bytes);
  }
  return status;
}

oscar_status cuda_copy(struct oscar_cuda *cuda, void *to, const void *from, size_t bytes) {
  return cuda_result(cuda, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_of(cuda)), "copying on it");
}

oscar_status cuda_clear(struct oscar_cuda *cuda, void *memory, size_t bytes) {
  return cuda_result(cuda, cudaMemsetAsync(memory, 0, bytes, stream_of(cuda)), "clearing memory");
}
