/*
 * backend.cu - the CUDA backend: its state, its table of operations, its buffers.
 *
 * Everything is enqueued on the handle's stream, and nothing but download waits. Memory is taken when a model is loaded and when
 * a runner is made (reserve), so that a step takes none. Weights are BF16 or FP8 (weights.cu), activations float; products round
 * activations to BF16 where matrix units multiply them (products.cu).
 */
#include "backend/cuda/cuda_backend.h"

#include <stdio.h>

/* What NVIDIA's manual recommends for Hopper; older chips need less. */
#define WORKSPACE_BYTES ((size_t)32 << 20)

oscar_status device_scratch_reserve(struct cuda_backend *b, struct device_scratch *scratch, size_t bytes) {
  if (bytes <= scratch->bytes) return OSCAR_OK;
  void *data;
  oscar_status status = cuda_alloc(b->cuda, bytes, &data);
  if (status != OSCAR_OK) return status;
  cuda_release(b->cuda, scratch->data, scratch->bytes);
  scratch->data = data;
  scratch->bytes = bytes;
  b->normed = {};
  return OSCAR_OK;
}

void device_scratch_free(struct cuda_backend *b, struct device_scratch *scratch) {
  cuda_release(b->cuda, scratch->data, scratch->bytes);
  scratch->data = NULL;
  scratch->bytes = 0;
}

static oscar_status buffer_alloc(struct backend *be, size_t floats, float **buffer) {
  struct cuda_backend *b = cuda_of(be);
  *buffer = NULL;
  if (floats > SIZE_MAX / sizeof(float)) floats = SIZE_MAX / sizeof(float); /* refused by the driver */
  struct device_block *block = (struct device_block *)mem_zalloc(be->context, 1, sizeof *block);
  if (!block) return OSCAR_NO_MEMORY;
  block->bytes = floats * sizeof(float);
  oscar_status status = cuda_alloc(b->cuda, block->bytes, &block->memory);
  if (status != OSCAR_OK) {
    mem_free(be->context, block);
    return status;
  }
  block->next = b->blocks;
  b->blocks = block;
  *buffer = (float *)block->memory;
  return OSCAR_OK;
}

static void buffer_free(struct backend *be, float *buffer) {
  struct cuda_backend *b = cuda_of(be);
  for (struct device_block **at = &b->blocks; *at; at = &(*at)->next) {
    struct device_block *block = *at;
    if (block->memory != buffer) continue;
    *at = block->next;
    cuda_release(b->cuda, block->memory, block->bytes);
    mem_free(be->context, block);
    return;
  }
}

static oscar_status upload(struct backend *be, float *to, const float *from_host, size_t floats) {
  cuda_of(be)->normed = {};
  return floats > 0 ? cuda_upload(cuda_of(be)->cuda, to, from_host, floats * sizeof *to) : OSCAR_OK;
}

static oscar_status download(struct backend *be, float *to_host, const float *from, size_t floats) {
  struct cuda_backend *b = cuda_of(be);
  oscar_status status = cuda_launched(b->cuda, "starting its work");
  return status == OSCAR_OK && floats > 0 ? cuda_download(b->cuda, to_host, from, floats * sizeof *from) : status;
}

static void describe(const struct backend *be, char *text, size_t bytes) {
  const struct cuda_backend *b = cuda_of(be);
  const oscar_cuda_info *info = &b->cuda->info;
  char library[48];
  library_describe(&b->library, library, sizeof library);
  snprintf(text, bytes, "cuda: %s, %.1f GiB, compute capability %d.%d; weights in %s; %s in BF16", info->name,
           (double)info->memory_bytes / (double)((size_t)1 << 30), info->capability / 10, info->capability % 10,
           b->form == WEIGHTS_FP8 ? "FP8, embedding and output in BF16" : "BF16", library);
}

static void free_backend(struct backend *be) {
  if (!be) return;
  struct cuda_backend *b = cuda_of(be);
  while (b->blocks) buffer_free(be, (float *)b->blocks->memory);
  cuda_rope_free(b);
  struct device_scratch *const scratch[] = {&b->workspace, &b->rounded, &b->joined, &b->expanded, &b->samples, &b->raw};
  for (size_t i = 0; i < ARRAY_LENGTH(scratch); i++) device_scratch_free(b, scratch[i]);
  library_close(&b->library);
  mem_free(be->context, b->library.plans);
  mem_free(be->context, b);
}

/* ---- recordings: CUDA graphs ---- */

struct backend_recording {
  cudaGraphExec_t graph;
  uint64_t releases; /* of the handle, when it was made */
};

static oscar_status record_begin(struct backend *be) {
  struct cuda_backend *b = cuda_of(be);
  oscar_status status = cuda_launched(b->cuda, "starting its work");
  if (status != OSCAR_OK) return status;
  return cuda_result(b->cuda, cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal), "recording a step");
}

static oscar_status record_end(struct backend *be, struct backend_recording **recording) {
  struct cuda_backend *b = cuda_of(be);
  *recording = NULL;
  cudaGraph_t graph = NULL;
  oscar_status status = cuda_result(b->cuda, cudaStreamEndCapture(b->stream, &graph), "recording a step");
  if (status == OSCAR_OK) status = cuda_launched(b->cuda, "recording a step");
  struct backend_recording *made = NULL;
  if (status == OSCAR_OK && !(made = (struct backend_recording *)mem_zalloc(be->context, 1, sizeof *made)))
    status = OSCAR_NO_MEMORY;
  if (status == OSCAR_OK) status = cuda_result(b->cuda, cudaGraphInstantiate(&made->graph, graph, 0), "making a graph of a step");
  if (graph) (void)cudaGraphDestroy(graph);
  (void)cudaGetLastError(); /* has been reported */
  if (status != OSCAR_OK) {
    mem_free(be->context, made);
    return status;
  }
  made->releases = b->cuda->releases;
  *recording = made;
  return OSCAR_OK;
}

static bool recording_holds(const struct backend *be, const struct backend_recording *recording) {
  return recording->releases == cuda_of(be)->cuda->releases;
}

static oscar_status replay(struct backend *be, const struct backend_recording *recording) {
  struct cuda_backend *b = cuda_of(be);
  b->normed = {};
  return cuda_result(b->cuda, cudaGraphLaunch(recording->graph, b->stream), "replaying a step");
}

static void recording_free(struct backend *be, struct backend_recording *recording) {
  if (!recording) return;
  (void)cudaGraphExecDestroy(recording->graph); /* one that runs goes when it has ended */
  mem_free(be->context, recording);
}

static constexpr struct backend_ops make_ops(void) {
  struct backend_ops ops = {};
  ops.name = "cuda";
  ops.host_memory = false;
  ops.free = free_backend;
  ops.describe = describe;
  ops.product_scratch = cuda_product_scratch;
  ops.reserve = cuda_reserve;
  ops.buffer_alloc = buffer_alloc;
  ops.buffer_free = buffer_free;
  ops.upload = upload;
  ops.download = download;
  ops.weight_check = cuda_weight_check;
  ops.packed_bytes = cuda_packed_bytes;
  ops.pack = cuda_pack;
  ops.embed = cuda_embed;
  ops.matmul = cuda_matmul;
  ops.feed_forward = cuda_feed_forward;
  ops.rms_norm = cuda_rms_norm;
  ops.add_rms_norm = cuda_add_rms_norm;
  ops.rope = cuda_rope;
  ops.add = cuda_add;
  ops.scale = cuda_scale;
  ops.silu_mul = cuda_silu_mul;
  ops.gelu_mul = cuda_gelu_mul;
  ops.matmul_together = cuda_matmul_together;
  ops.reserve_samples = cuda_reserve_samples;
  ops.sample = cuda_sample;
  ops.rope_on_device = cuda_rope_on_device;
  ops.record_begin = record_begin;
  ops.record_end = record_end;
  ops.recording_holds = recording_holds;
  ops.replay = replay;
  ops.recording_free = recording_free;
  return ops;
}

static constexpr struct backend_ops cuda_ops = make_ops();

static oscar_status open_parts(struct cuda_backend *b) {
  b->library.plans = (struct product_plan *)mem_zalloc(b->base.context, KEPT_PLANS, sizeof *b->library.plans);
  if (!b->library.plans) return OSCAR_NO_MEMORY;
  const char *problem = library_open(&b->library);
  if (problem) return set_error(b->base.context, OSCAR_UNSUPPORTED, "GPU %d: %s", b->cuda->info.ordinal, problem);
  return device_scratch_reserve(b, &b->workspace, WORKSPACE_BYTES);
}

extern "C" oscar_status backend_create_cuda(oscar_context *context, oscar_cuda *cuda, enum weight_form form,
                                            struct backend **backend) {
  *backend = NULL;
  struct cuda_backend *b = (struct cuda_backend *)mem_zalloc(context, 1, sizeof *b);
  if (!b) return OSCAR_NO_MEMORY;
  b->base.ops = &cuda_ops;
  b->base.context = context;
  b->base.cuda = cuda;
  b->base.shared_tokens = INT32_MAX;
  b->cuda = cuda;
  b->form = form;
  b->stream = (cudaStream_t)cuda->stream;
  oscar_status status = open_parts(b);
  if (status != OSCAR_OK) {
    free_backend(&b->base);
    return status;
  }
  *backend = &b->base;
  return OSCAR_OK;
}

extern "C" size_t backend_cuda_free_bytes(const struct backend *backend) {
  size_t free_bytes = 0, total = 0;
  (void)backend;
  return cudaMemGetInfo(&free_bytes, &total) == cudaSuccess ? free_bytes : 0;
}

extern "C" void backend_cuda_choose(struct backend *backend, enum cuda_product way) { cuda_of(backend)->way = way; }

/* ---- reading ---- */

#define READ_BYTES ((size_t)1 << 30) /* far more than caches hold */

/* The sum goes nowhere, which the compiler does not know. */
__global__ static void read_words(const uint4 *words, size_t count, uint32_t *sink) {
  const size_t stride = (size_t)gridDim.x * blockDim.x;
  uint32_t sum = 0;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 4 * stride) {
    uint4 w[4];
#pragma unroll
    for (int k = 0; k < 4; k++) w[k] = i + k * stride < count ? words[i + k * stride] : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < 4; k++) sum += w[k].x ^ w[k].y ^ w[k].z ^ w[k].w;
  }
  if (sum == 0x9E3779B9u) *sink = sum;
}

static oscar_status time_reads(struct cuda_backend *b, void *memory, cudaEvent_t begin, cudaEvent_t end, double *bytes_per_s) {
  const unsigned blocks = 16 * (unsigned)b->cuda->info.multiprocessors;
  oscar_status status = OSCAR_OK;
  for (int i = 0; i < 6 && status == OSCAR_OK; i++) {
    float milliseconds = 0;
    (void)cudaEventRecord(begin, b->stream);
    read_words<<<blocks, 256, 0, b->stream>>>((const uint4 *)memory, READ_BYTES / sizeof(uint4), (uint32_t *)memory);
    (void)cudaEventRecord(end, b->stream);
    status = oscar_cuda_wait(b->cuda);
    if (status == OSCAR_OK) status = cuda_result(b->cuda, cudaEventElapsedTime(&milliseconds, begin, end), "timing reads");
    if (status == OSCAR_OK && milliseconds > 0 && (double)READ_BYTES * 1e3 / milliseconds > *bytes_per_s)
      *bytes_per_s = (double)READ_BYTES * 1e3 / milliseconds;
  }
  return status;
}

extern "C" oscar_status backend_cuda_read_speed(struct backend *backend, double *bytes_per_s) {
  struct cuda_backend *b = cuda_of(backend);
  void *memory;
  cudaEvent_t begin = NULL, end = NULL;
  *bytes_per_s = 0;
  oscar_status status = cuda_alloc(b->cuda, READ_BYTES, &memory);
  if (status != OSCAR_OK) return status;
  status = cuda_clear(b->cuda, memory, READ_BYTES);
  if (status == OSCAR_OK) status = cuda_result(b->cuda, cudaEventCreate(&begin), "making an event");
  if (status == OSCAR_OK) status = cuda_result(b->cuda, cudaEventCreate(&end), "making an event");
  if (status == OSCAR_OK) status = time_reads(b, memory, begin, end, bytes_per_s);
  if (begin) (void)cudaEventDestroy(begin);
  if (end) (void)cudaEventDestroy(end);
  cuda_release(b->cuda, memory, READ_BYTES);
  return status;
}
