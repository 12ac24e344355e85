/*
 * cuda_products.cu - products on a GPU: the kernels for few and for some tokens beside cuBLASLt, shapes of models, by tokens.
 *
 * Calls are captured in a CUDA graph, as decoding would run them, over copies of the weights that no cache holds. Times are per
 * call; GB/s are of the weights in their form, beside the speed of a plain read in the same run. With FP8 the library's time has
 * the expansion to BF16 in it.
 *
 *     bench_cuda_products [--weights bf16|fp8] [--repetitions N] [--tokens LIST] [--shapes PREFIX]
 */
extern "C" {
#include "backend/backend.h"
}

#include <oscar/cuda.h>

#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CYCLED_BYTES ((size_t)512 << 20) /* of weights, at least: ten times the second-level cache of an H100 */
#define MOST_CALLS   4096

struct shape {
  const char *name;
  int count;
  int64_t rows[3], cols;
};

static const struct shape shapes[] = {
    {"8B q, k, v", 3, {4096, 1024, 1024}, 4096},
    {"8B output", 1, {4096}, 4096},
    {"8B gate, up", 2, {12288, 12288}, 4096},
    {"8B down", 1, {4096}, 12288},
    {"8B logits", 1, {151936}, 4096},
    {"1.5B q, k, v", 3, {1536, 256, 256}, 1536},
    {"1.5B output", 1, {1536}, 1536},
    {"1.5B gate, up", 2, {8960, 8960}, 1536},
    {"1.5B down", 1, {1536}, 8960},
    {"135M q, k, v", 3, {576, 192, 192}, 576},
    {"135M gate, up", 2, {1536, 1536}, 576},
    {"135M down", 1, {576}, 1536},
};

struct options {
  enum weight_form form;
  int repetitions, n_tokens, tokens[16]; /* ascending */
  const char *shapes;
};

static oscar_context *context;
static struct backend *be;
static cudaStream_t stream;

static void need(oscar_status status) {
  if (status == OSCAR_OK) return;
  fprintf(stderr, "%s\n", oscar_last_error(context));
  exit(1);
}

static void need_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s\n", cudaGetErrorString(error));
  exit(1);
}

static struct weight weight_of(const struct shape *s, int i) {
  struct weight w = {};
  w.name = s->name;
  w.type = WEIGHT_BF16;
  w.rows = s->rows[i];
  w.cols = s->cols;
  return w;
}

static size_t weight_bytes(const struct shape *s) {
  size_t bytes = 0;
  for (int i = 0; i < s->count; i++) {
    const struct weight w = weight_of(s, i);
    bytes += be->ops->packed_bytes(be, &w);
  }
  return bytes;
}

/* All copies of the weights once: copy c of weight i lies behind those before it. */
static void enqueue(const struct shape *s, int copies, char *memory, int n, const float *x, float *const *y) {
  for (int c = 0; c < copies; c++) {
    struct weight w[3] = {};
    const struct weight *pw[3];
    char *at = memory + (size_t)c * weight_bytes(s);
    for (int i = 0; i < s->count; i++) {
      w[i] = weight_of(s, i);
      w[i].packed = at;
      at += be->ops->packed_bytes(be, &w[i]);
      pw[i] = &w[i];
    }
    need(be->ops->matmul(be, s->count, pw, NULL, n, x, y));
  }
}

/* Microseconds of a call. */
static double time_calls(const struct shape *s, int copies, char *memory, int n, const float *x, float *const *y,
                         int repetitions) {
  cudaGraph_t graph;
  cudaGraphExec_t program;
  cudaEvent_t begin, end;
  float best = 1e30f;
  enqueue(s, 1, memory, n, x, y); /* chooses the algorithm */
  need_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue(s, copies, memory, n, x, y);
  need_cuda(cudaStreamEndCapture(stream, &graph));
  need_cuda(cudaGraphInstantiate(&program, graph, 0));
  need_cuda(cudaEventCreate(&begin));
  need_cuda(cudaEventCreate(&end));
  for (int r = 0; r < repetitions; r++) {
    float milliseconds;
    need_cuda(cudaEventRecord(begin, stream));
    need_cuda(cudaGraphLaunch(program, stream));
    need_cuda(cudaEventRecord(end, stream));
    need_cuda(cudaEventSynchronize(end));
    need_cuda(cudaEventElapsedTime(&milliseconds, begin, end));
    if (milliseconds < best) best = milliseconds;
  }
  need_cuda(cudaEventDestroy(begin));
  need_cuda(cudaEventDestroy(end));
  need_cuda(cudaGraphExecDestroy(program));
  need_cuda(cudaGraphDestroy(graph));
  return (double)best * 1000 / copies;
}

static void measure(const struct shape *s, double read_speed, const struct options *o) {
  const int most = o->tokens[o->n_tokens - 1];
  size_t wanted = CYCLED_BYTES / weight_bytes(s) + 1;
  const int copies = wanted > MOST_CALLS ? MOST_CALLS : (int)wanted;
  const size_t bytes = (size_t)copies * weight_bytes(s);
  float *memory, *x, *y[3];
  need(be->ops->buffer_alloc(be, bytes / 4, &memory));
  need(be->ops->buffer_alloc(be, (size_t)most * (size_t)s->cols, &x));
  need_cuda(cudaMemsetAsync(memory, 0x3C, bytes, stream));
  need_cuda(cudaMemsetAsync(x, 0x3C, (size_t)most * (size_t)s->cols * 4, stream));
  for (int i = 0; i < s->count; i++) {
    const struct weight w = weight_of(s, i);
    need(be->ops->buffer_alloc(be, (size_t)most * (size_t)s->rows[i], &y[i]));
    need(be->ops->reserve(be, &w, most));
  }
  for (int t = 0; t < o->n_tokens; t++) {
    double us[PRODUCT_LIBRARY + 1], best = 1e30;
    for (int way = PRODUCT_FEW; way <= PRODUCT_LIBRARY; way++) {
      backend_cuda_choose(be, (enum cuda_product)way);
      us[way] = time_calls(s, copies, (char *)memory, o->tokens[t], x, y, o->repetitions);
      if (us[way] < best) best = us[way];
    }
    const double gb = (double)weight_bytes(s) * 1e-3 / best;
    printf("%-14s %3d %9.2f %9.2f %9.2f %7.0f %5.0f%%\n", s->name, o->tokens[t], us[PRODUCT_FEW], us[PRODUCT_SOME],
           us[PRODUCT_LIBRARY], gb, 100 * gb * 1e9 / read_speed);
  }
  for (int i = 0; i < s->count; i++) be->ops->buffer_free(be, y[i]);
  be->ops->buffer_free(be, x);
  be->ops->buffer_free(be, memory);
}

static bool parse_tokens(const char *text, struct options *o) {
  o->n_tokens = 0;
  for (char *end; *text && o->n_tokens < 16; text = *end == ',' ? end + 1 : end) {
    const long n = strtol(text, &end, 10);
    if (end == text || (*end && *end != ',') || n < 1 || n > 4096) return false;
    if (o->n_tokens > 0 && n <= o->tokens[o->n_tokens - 1]) return false;
    o->tokens[o->n_tokens++] = (int)n;
  }
  return o->n_tokens > 0;
}

static bool parse(int argc, char **argv, struct options *o) {
  for (int i = 1; i < argc; i += 2) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
    if (strcmp(name, "--weights") == 0 && (strcmp(value, "bf16") == 0 || strcmp(value, "fp8") == 0))
      o->form = strcmp(value, "fp8") == 0 ? WEIGHTS_FP8 : WEIGHTS_BF16;
    else if (strcmp(name, "--repetitions") == 0)
      o->repetitions = atoi(value);
    else if (strcmp(name, "--shapes") == 0)
      o->shapes = value;
    else if (strcmp(name, "--tokens") != 0 || !parse_tokens(value, o))
      return false;
  }
  return o->repetitions > 0;
}

int main(int argc, char **argv) {
  struct options o = {WEIGHTS_BF16, 10, 8, {1, 2, 3, 4, 8, 12, 16, 32}, ""};
  if (!parse(argc, argv, &o)) {
    fprintf(stderr, "usage: bench_cuda_products [--weights bf16|fp8] [--repetitions N] [--tokens LIST] [--shapes PREFIX]\n");
    return 2;
  }
  oscar_cuda *cuda;
  double read_speed;
  char text[256];
  if (oscar_context_create(NULL, &context) != OSCAR_OK) return 1;
  need(oscar_cuda_create(context, NULL, &cuda));
  need(backend_create_cuda(context, cuda, o.form, &be));
  stream = (cudaStream_t)oscar_cuda_stream(cuda);
  be->ops->describe(be, text, sizeof text);
  need(backend_cuda_read_speed(be, &read_speed));
  printf("%s; reads %.0f GB/s\n\n%-14s %3s %9s %9s %9s %7s %6s\n", text, read_speed * 1e-9, "weights", "n", "few us", "some us",
         "lib. us", "GB/s", "read");
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    if (strncmp(shapes[i].name, o.shapes, strlen(o.shapes)) == 0) measure(&shapes[i], read_speed, &o);
  be->ops->free(be);
  oscar_cuda_free(cuda);
  oscar_context_free(context);
  return 0;
}
