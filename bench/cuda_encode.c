/*
 * bench/cuda_encode.c - demotion on a GPU: pages of all layers from BF16 to the device form, in one launch.
 *
 *   bench_cuda_encode [--head-dim D] [--layers L] [--kv-heads H] [--pages N]
 *
 * One CSV line per form: ms of a launch that encodes N pages in L layers of H KV heads, µs that a page side (64 rows of one KV
 * head) takes of it, and the TFLOP/s of the product alone (one multiplication and one addition for each element of the matrix and
 * row). Codecs are those of bench_encode, one for each place. Medians.
 */
#include "base/sort.h"
#include "encode_codecs.h"
#include "quant/cuda/encode.h"

#define REPEATS 15
#define PAGES   8 /* different ones */

struct options {
  int d, layers, kv_heads, pages;
};

static oscar_context *context;
static oscar_cuda *cuda;

static void check(oscar_status status) {
  if (status == OSCAR_OK) return;
  fprintf(stderr, "%s\n", oscar_last_error(context));
  exit(1);
}

static oscar_codec_set *make_set(const struct options *o, oscar_row_form form) {
  const oscar_codec_set_info info = {o->layers, o->kv_heads, o->d, "bench", "", ""};
  oscar_codec_set *set;
  check(oscar_codec_set_create(context, &info, &set));
  oscar_codec *first[2] = {make_codec(context, o->d, form, OSCAR_KEYS), make_codec(context, o->d, form, OSCAR_VALUES)};
  for (int place = 0; place < o->layers * o->kv_heads * 2; place++) {
    oscar_codec *codec = NULL; /* of the same numbers, in memory of its own */
    check(oscar_codec_create(context, oscar_codec_describe(first[place % 2]), &codec));
    check(oscar_codec_set_assign(set, place / 2 / o->kv_heads, place / 2 % o->kv_heads, (oscar_side)(place % 2), codec));
    oscar_codec_release(codec);
  }
  oscar_codec_release(first[0]);
  oscar_codec_release(first[1]);
  return set;
}

static void *on_device(const void *from, size_t bytes) {
  void *memory;
  check(cuda_alloc(cuda, bytes, &memory));
  check(cuda_upload(cuda, memory, from, bytes));
  return memory;
}

/* An arena of a layer: the exact pages, then the coded ones. */
static struct cuda_layer make_layer(const struct options *o, const oscar_codec_set *set, const uint16_t *rows, size_t *bytes) {
  struct cuda_layer l;
  for (int side = 0; side < 2; side++) {
    l.form[side] = side_form_of(oscar_codec_set_get(set, 0, 0, (oscar_side)side));
    l.side_bytes[side] = side_bytes(&l.form[side]);
  }
  l.head_bytes = l.side_bytes[0] + l.side_bytes[1];
  l.unit_bytes = l.head_bytes * (size_t)o->kv_heads;
  const size_t side = (size_t)2 * PAGE_TOKENS * (size_t)o->d, exact = side * 2 * (size_t)o->kv_heads;
  const size_t run = (exact + l.unit_bytes - 1) / l.unit_bytes;
  *bytes = (run + 1) * (size_t)o->pages * l.unit_bytes;
  uint8_t *host = need(*bytes);
  for (int page = 0; page < o->pages; page++)
    for (int i = 0; i < 2 * o->kv_heads; i++)
      memcpy(host + (size_t)page * run * l.unit_bytes + (size_t)i * side,
             rows + (size_t)((page + i) % PAGES) * PAGE_TOKENS * (size_t)o->d, side);
  l.memory = on_device(host, *bytes);
  free(host);
  return l;
}

static struct cuda_demotion *make_jobs(const struct options *o, const struct cuda_layer *l) {
  const size_t exact = (size_t)2 * 2 * PAGE_TOKENS * (size_t)o->d * (size_t)o->kv_heads;
  const int run = (int)((exact + l->unit_bytes - 1) / l->unit_bytes);
  struct cuda_demotion *jobs = need(sizeof *jobs * (size_t)o->pages);
  for (int i = 0; i < o->pages; i++) jobs[i] = (struct cuda_demotion){i * run, o->pages * run + i, 1000 + i};
  return jobs;
}

static void measure(const struct options *o, int form) {
  oscar_codec_set *set = make_set(o, bench_forms[form].form);
  uint16_t *rows = need(sizeof(uint16_t) * PAGES * PAGE_TOKENS * (size_t)o->d);
  struct cuda_layer *layers = need(sizeof *layers * (size_t)o->layers);
  size_t layer_bytes = 0;
  fill_rows(o->d, PAGES * PAGE_TOKENS, rows);
  for (int i = 0; i < o->layers; i++) layers[i] = make_layer(o, set, rows, &layer_bytes);
  struct cuda_demotion *jobs = make_jobs(o, layers);
  struct cuda_codecs *codecs;
  check(cuda_codecs_create(cuda, set, &codecs));
  unsigned long long bad = CUDA_BAD_NONE;
  const size_t layers_bytes = sizeof *layers * (size_t)o->layers, jobs_bytes = sizeof *jobs * (size_t)o->pages;
  void *device_layers = on_device(layers, layers_bytes), *device_jobs = on_device(jobs, jobs_bytes),
       *device_bad = on_device(&bad, sizeof bad);
  double times[REPEATS];
  for (int r = -2; r < REPEATS; r++) { /* the first two warm up */
    check(oscar_cuda_wait(cuda));
    int64_t start = time_ns();
    check(cuda_encode(codecs, device_layers, 0, o->layers, o->kv_heads, device_jobs, o->pages, device_bad));
    check(oscar_cuda_wait(cuda));
    if (r >= 0) times[r] = (double)(time_ns() - start);
  }
  check(cuda_download(cuda, &bad, device_bad, sizeof bad));
  if (bad != CUDA_BAD_NONE) exit(1);
  sort_doubles(times, REPEATS);
  const double ns = times[REPEATS / 2], pages = (double)o->layers * o->kv_heads * o->pages;
  double flops = 0;
  for (int side = 0; side < 2; side++)
    flops += 2.0 * PAGE_TOKENS * o->d * oscar_codec_describe(oscar_codec_set_get(set, 0, 0, (oscar_side)side))->channels;
  printf("%s,%d,%d,%d,%d,%.3f,%.3f,%.1f\n", bench_forms[form].name, o->d, o->layers, o->kv_heads, o->pages, ns / 1e6,
         ns / pages / 2 / 1e3, flops * pages / ns / 1e3);
  for (int i = 0; i < o->layers; i++) cuda_release(cuda, layers[i].memory, layer_bytes);
  cuda_release(cuda, device_layers, layers_bytes);
  cuda_release(cuda, device_jobs, jobs_bytes);
  cuda_release(cuda, device_bad, sizeof bad);
  cuda_codecs_free(codecs);
  oscar_codec_set_free(set);
  free(rows), free(layers), free(jobs);
}

int main(int argc, char **argv) {
  struct options o = {128, 36, 8, 32};
  const char *const names[] = {"--head-dim", "--layers", "--kv-heads", "--pages"};
  int *const values[] = {&o.d, &o.layers, &o.kv_heads, &o.pages};
  for (int i = 1; i < argc; i += 2) {
    int k = 0;
    while (k < 4 && strcmp(argv[i], names[k])) k++;
    long value = i + 1 < argc ? strtol(argv[i + 1], NULL, 10) : 0;
    if (k == 4 || value < 1 || value > 4096 || (k == 0 && (value % 64 || value > MOST_DIM))) {
      fprintf(stderr, "usage: bench_cuda_encode [--head-dim D] [--layers L] [--kv-heads H] [--pages N]\n");
      return 1;
    }
    *values[k] = (int)value;
  }
  oscar_context_options options;
  oscar_context_options_default(&options);
  if (oscar_context_create(&options, &context) != OSCAR_OK) return 1;
  check(oscar_cuda_create(context, NULL, &cuda));
  oscar_cuda_info info;
  oscar_cuda_describe(cuda, &info);
  printf("# %s\nform,head_dim,layers,kv_heads,pages,ms,us_per_side,tflops\n", info.name);
  for (int form = 0; form < (int)ARRAY_LENGTH(bench_forms); form++) measure(&o, form);
  oscar_cuda_free(cuda);
  oscar_context_free(context);
  return 0;
}
