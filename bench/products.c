/*
 * bench/products.c - how fast the CPU backend multiplies weights, beside what the machine can do.
 *
 *   bench_products [--rows R] [--cols C] [--type T] [--n N] [--isa portable|avx2|avx512|neon-dot] [--threads T]
 *     [--megabytes M] [--repeat K]
 *
 * One CSV line per type, number of tokens and layout of the weights: as in the file, and packed where the backend would rather
 * have that; without --n, 1 and 512 tokens. Weights of every line are `megabytes` of distinct
 * matrices, used in turn, so that with the default they come from memory even where the last-level cache is large.
 *   gb_s      bytes of weight blocks read per second
 *   read_gb_s a plain read of the same bytes by the same threads, measured in turn with the product: the ceiling of one token
 *   gflop_s   2 rows cols n / time
 *   dnnl_gflop_s  oneDNN alone on one matrix converted (BF16 where the backend takes it, otherwise float) and laid out as it
 * likes beforehand: the ceiling of many tokens error     root mean square of the difference to a double-precision product,
 * relative to that of the product
 */
#include "backend/backend.h"

#include <math.h>
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct settings {
  int64_t rows, cols;
  int type, n, threads, repeat;
  oscar_isa isa;
  size_t megabytes;
};

static void fail(const char *text) {
  fprintf(stderr, "bench_products: %s\n", text);
  exit(1);
}

static void *need(size_t bytes) {
  void *p = aligned_alloc(64, round_up(bytes, 64));
  if (!p) fail("out of memory");
  return p;
}

static int type_named(const char *name) {
  for (int type = 0; type <= WEIGHT_BF16; type++) {
    int elements;
    size_t bytes;
    if (weight_block((enum weight_type)type, &elements, &bytes) && strcmp(name, weight_type_name(type)) == 0) return type;
  }
  fail("unknown type");
  return -1;
}

static oscar_isa isa_named(const char *name) {
  for (int isa = OSCAR_ISA_AUTO; isa <= OSCAR_ISA_NEON_DOT; isa++)
    if (strcmp(name, oscar_isa_name((oscar_isa)isa)) == 0) return (oscar_isa)isa;
  fail("unknown instruction set");
  return OSCAR_ISA_AUTO;
}

static struct settings parse(int argc, char **argv) {
  struct settings s = {.rows = 8960, .cols = 1536, .type = -1, .repeat = 5, .megabytes = 700};
  for (int i = 1; i < argc; i += 2) {
    if (i + 1 == argc) fail("an option without a value");
    const char *name = argv[i], *value = argv[i + 1];
    if (!strcmp(name, "--rows"))
      s.rows = atoll(value);
    else if (!strcmp(name, "--cols"))
      s.cols = atoll(value);
    else if (!strcmp(name, "--type"))
      s.type = type_named(value);
    else if (!strcmp(name, "--n"))
      s.n = atoi(value);
    else if (!strcmp(name, "--isa"))
      s.isa = isa_named(value);
    else if (!strcmp(name, "--threads"))
      s.threads = atoi(value);
    else if (!strcmp(name, "--megabytes"))
      s.megabytes = (size_t)atoll(value);
    else if (!strcmp(name, "--repeat"))
      s.repeat = atoi(value);
    else
      fail("unknown option");
  }
  if (s.rows < 1 || s.cols < 1 || s.n < 0 || s.repeat < 1 || s.megabytes < 1) fail("a value is out of range");
  return s;
}

/* Bytes from 0x30 to 0x3F: every half, bfloat16 and float made of them is an ordinary number, whatever the format. */
static void fill(uint8_t *data, size_t bytes) {
  uint64_t state = 1;
  for (size_t i = 0; i < bytes; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    data[i] = (uint8_t)(state >> 60 | 0x30);
  }
}

static double read_gb_s(const uint8_t *data, size_t bytes, int threads) {
  uint64_t total = 0;
  int64_t lines = (int64_t)(bytes / 64), start = time_ns();
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t i = 0; i < lines; i++) {
    const uint64_t *line = (const uint64_t *)(const void *)(data + 64 * i);
    __builtin_prefetch((const void *)((uintptr_t)line + 4096));
    for (int j = 0; j < 8; j++) total += line[j];
  }
  double seconds = (double)(time_ns() - start) * 1e-9;
  if (total == 1) printf("\n"); /* keeps the sum alive */
  return (double)bytes / seconds * 1e-9;
}

static double product_error(const struct weight *w, int n, const float *x, const float *y) {
  int64_t rows = w->rows < 64 ? w->rows : 64;
  float *row = need((size_t)w->cols * sizeof *row);
  int elements;
  size_t bytes;
  double squares = 0, differences = 0;
  weight_block(w->type, &elements, &bytes);
  for (int64_t r = 0; r < rows; r++) {
    weight_dequantize(w->type, w->cols, (const uint8_t *)w->data + (size_t)(r * (w->cols / elements)) * bytes, row);
    for (int t = 0; t < n; t++) {
      double exact = 0;
      for (int64_t k = 0; k < w->cols; k++) exact += (double)row[k] * (double)x[t * w->cols + k];
      double difference = (double)y[t * w->rows + r] - exact;
      squares += exact * exact;
      differences += difference * difference;
    }
  }
  free(row);
  return sqrt(differences / squares);
}

static void library(dnnl_status_t status) {
  if (status != dnnl_success) fail("oneDNN failed");
}

/* The library alone: the weights are in the layout it asked for before the clock starts. */
static double dnnl_gflop_s(const struct settings *s, int n, bool bf16) {
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  dnnl_memory_desc_t x, w, y;
  dnnl_matmul_desc_t product;
  dnnl_primitive_desc_t desc;
  dnnl_primitive_t primitive;
  dnnl_data_type_t type = bf16 ? dnnl_bf16 : dnnl_f32;
  dnnl_dims_t xd = {n, s->cols}, wd = {s->cols, s->rows}, yd = {n, s->rows};
  library(dnnl_engine_create(&engine, dnnl_cpu, 0));
  library(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags));
  library(dnnl_memory_desc_init_by_tag(&x, 2, xd, type, dnnl_ab));
  library(dnnl_memory_desc_init_by_tag(&w, 2, wd, type, dnnl_format_tag_any));
  library(dnnl_memory_desc_init_by_tag(&y, 2, yd, dnnl_f32, dnnl_ab));
  library(dnnl_matmul_desc_init(&product, &x, &w, NULL, &y));
  library(dnnl_primitive_desc_create(&desc, &product, NULL, engine, NULL));
  library(dnnl_primitive_create(&primitive, desc));
  const dnnl_memory_desc_t *descs[] = {&x, dnnl_primitive_desc_query_md(desc, dnnl_query_weights_md, 0), &y};
  void *data[3];
  dnnl_exec_arg_t arguments[3] = {{.arg = DNNL_ARG_SRC}, {.arg = DNNL_ARG_WEIGHTS}, {.arg = DNNL_ARG_DST}};
  for (int i = 0; i < 3; i++) {
    size_t bytes = dnnl_memory_desc_get_size(descs[i]);
    fill(data[i] = need(bytes), bytes);
    library(dnnl_memory_create(&arguments[i].memory, descs[i], engine, data[i]));
  }
  double best = INFINITY;
  for (int i = 0; i <= s->repeat; i++) {
    int64_t start = time_ns();
    library(dnnl_primitive_execute(primitive, stream, 3, arguments));
    library(dnnl_stream_wait(stream));
    double seconds = (double)(time_ns() - start) * 1e-9;
    if (i > 0 && seconds < best) best = seconds;
  }
  for (int i = 0; i < 3; i++) {
    dnnl_memory_destroy(arguments[i].memory);
    free(data[i]);
  }
  dnnl_primitive_destroy(primitive);
  dnnl_primitive_desc_destroy(desc);
  dnnl_stream_destroy(stream);
  dnnl_engine_destroy(engine);
  return 2e-9 * (double)s->rows * (double)s->cols * n / best;
}

static void measure(struct backend *be, const struct settings *s, enum weight_type type, int n, bool packed) {
  int elements, threads = oscar_context_threads(be->context);
  size_t block_bytes;
  weight_block(type, &elements, &block_bytes);
  size_t file_bytes = (size_t)(s->rows * (s->cols / elements)) * block_bytes;
  uint8_t *file = need(file_bytes);
  fill(file, file_bytes);
  struct weight w = {.name = "bench", .type = type, .rows = s->rows, .cols = s->cols, .data = file};
  const struct weight *pw = &w;
  size_t weight_bytes = packed ? be->ops->packed_bytes(be, &w) : file_bytes;
  if (weight_bytes == 0) {
    free(file);
    return;
  }
  /* Many tokens are not waiting for memory: a few matrices will do. */
  size_t count = n > 64 ? 2 : (s->megabytes << 20) / weight_bytes + 1, stride = round_up(weight_bytes, 64);
  uint8_t *data = need(count * stride);
  if (packed)
    be->ops->pack(be, &w, data);
  else
    memcpy(data, file, file_bytes);
  for (size_t i = 1; i < count; i++) memcpy(data + i * stride, data, weight_bytes);
  float *x = need((size_t)(n * s->cols) * sizeof *x), *y = need((size_t)(n * s->rows) * sizeof *y);
  for (int64_t i = 0; i < n * s->cols; i++) x[i] = (float)((double)((i * 2654435761) & 0xFFFFFF) / 0x800000 - 1);
  double best = INFINITY, ceiling = 0;
  for (int k = 0; k < s->repeat; k++) {
    double gb_s = read_gb_s(data, count * stride, threads);
    if (gb_s > ceiling) ceiling = gb_s;
    int64_t start = time_ns();
    for (size_t i = 0; i < count; i++) {
      *(packed ? &w.packed : &w.data) = data + i * stride;
      if (be->ops->matmul(be, 1, &pw, NULL, n, x, &y) != OSCAR_OK) fail(oscar_last_error(be->context));
    }
    double seconds = (double)(time_ns() - start) * 1e-9 / (double)count;
    if (seconds < best) best = seconds;
  }
  double gb_s = (double)weight_bytes / best * 1e-9, gflop_s = 2e-9 * (double)s->rows * (double)s->cols * n / best;
  w.data = file;
  printf("%s,%s,%lld,%lld,%d,%.1f,%.2f,%.2f,%.0f,%.1f", weight_type_name((int)type), packed ? "packed" : "file",
         (long long)s->rows, (long long)s->cols, n, best * 1e6, gb_s, ceiling, 100 * gb_s / ceiling, gflop_s);
  if (n > 8) {
    double library_gflop_s = dnnl_gflop_s(s, n, be->context->cpu.amx_bf16 || be->context->cpu.wide_bf16);
    printf(",%.1f,%.0f", library_gflop_s, 100 * gflop_s / library_gflop_s);
  } else {
    printf(",,");
  }
  printf(",%.1e\n", product_error(&w, n, x, y));
  fflush(stdout);
  free(file);
  free(data);
  free(x);
  free(y);
}

int main(int argc, char **argv) {
  struct settings s = parse(argc, argv);
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.isa = s.isa;
  options.threads = s.threads;
  oscar_context *context;
  struct backend *be;
  if (oscar_context_create(&options, &context) != OSCAR_OK) fail("this CPU lacks that instruction set");
  if (backend_create_cpu(context, &be) != OSCAR_OK) fail(oscar_last_error(context));
  omp_set_num_threads(oscar_context_threads(context));
  char text[256];
  be->ops->describe(be, text, sizeof text);
  printf("# %s\n", text);
  printf("type,layout,rows,cols,n,us,gb_s,read_gb_s,read_%%,gflop_s,dnnl_gflop_s,dnnl_%%,error\n");
  for (int type = 0; type <= WEIGHT_BF16; type++) {
    int elements;
    size_t bytes;
    if (!weight_block((enum weight_type)type, &elements, &bytes) || s.cols % elements) continue;
    if (s.type >= 0 && type != s.type) continue;
    for (int packed = 0; packed < 2; packed++) {
      measure(be, &s, (enum weight_type)type, s.n > 0 ? s.n : 1, packed);
      if (s.n == 0) measure(be, &s, (enum weight_type)type, 512, packed);
    }
  }
  be->ops->free(be);
  oscar_context_free(context);
  return 0;
}
