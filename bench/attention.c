/*
 * bench/attention.c - how fast attention reads a cache, per instruction set, beside what the memory could give.
 *
 * Decode: one query position over a filled cache; per (token of history, KV head) the time, the bytes read and their rate, and
 * the share of the read ceiling: a plain read of a buffer larger than the caches by the same number of threads, measured in the
 * same run. The caches of `layers` layers are read in turn so that the history does not stay in the CPU's caches unless it would
 * in a model of that depth. Prefill: a chunk over the same history, per token. Times are medians.
 */
#include <oscar/attention.h>

#include "attention/kernels.h"
#include "base/base.h"
#include "base/sort.h"
#include "cache/view.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REPEATS     15
#define PREFILL     256
#define FILL_CHUNK  512
#define CEILING_MIB 768

struct options {
  int context, head_dim, query_heads, kv_heads, layers, threads;
  const char *kv;
};

static void fail(const oscar_context *context, const char *what) {
  fprintf(stderr, "%s: %s\n", what, oscar_last_error(context));
  exit(1);
}

static double median(double *x, int n) {
  sort_doubles(x, (size_t)n);
  return x[n / 2];
}

/* Bytes per nanosecond of `threads` threads reading a buffer once, median of several. */
static double read_ceiling(int threads) {
  size_t n = (size_t)CEILING_MIB * 1024 * 1024 / sizeof(uint64_t);
  uint64_t *buffer = aligned_alloc(64, n * sizeof *buffer), sum = 0;
  if (!buffer) return 0;
#pragma omp parallel for num_threads(threads)
  for (size_t i = 0; i < n; i++) buffer[i] = i;
  double times[7];
  for (int r = 0; r < 7; r++) {
    int64_t start = time_ns();
#pragma omp parallel for num_threads(threads) reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += buffer[i];
    times[r] = (double)(time_ns() - start);
  }
  volatile uint64_t keep = sum;
  (void)keep;
  free(buffer);
  return (double)(n * sizeof *buffer) / median(times, 7);
}

static float *random_floats(size_t n, uint64_t seed) {
  float *x = malloc(n * sizeof *x);
  if (!x) exit(1);
  for (size_t i = 0; i < n; i++) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    x[i] = (float)(int32_t)(seed >> 32) * 0x1p-30f;
  }
  return x;
}

/* Every pair turns, as in a fitted codec, with the frequencies of base 1e6; the mean itself does not matter for the speed. */
static oscar_rope *make_rope(oscar_context *context, const struct options *o) {
  float *frequencies = random_floats((size_t)o->head_dim / 2, 1);
  for (int i = 0; i < o->head_dim / 2; i++) frequencies[i] = (float)pow(1e6, -2.0 * i / o->head_dim);
  oscar_rope *rope = NULL;
  oscar_rope_spec spec = {OSCAR_ROPE_HALVES, o->head_dim, frequencies};
  if (oscar_rope_create(context, &spec, &rope) != OSCAR_OK) fail(context, "rope");
  free(frequencies);
  return rope;
}

/* "bf16", "int2" (four log gains, a rotating mean), "int2-gain" (one gain), "int2-oscar" (scale and zero) */
static oscar_codec_set *make_codecs(oscar_context *context, const struct options *o) {
  if (!strcmp(o->kv, "bf16")) return NULL;
  oscar_row_form form = OSCAR_ROW_SCALE_ZERO;
  oscar_rope *rope = NULL;
  if (!strcmp(o->kv, "int2")) {
    form = OSCAR_ROW_LOG_GAINS;
    rope = make_rope(context, o);
  } else if (!strcmp(o->kv, "int2-gain"))
    form = OSCAR_ROW_GAIN;
  else if (strcmp(o->kv, "int2-oscar") != 0) {
    fprintf(stderr, "--kv %s: expected bf16, int2, int2-gain or int2-oscar\n", o->kv);
    exit(1);
  }
  oscar_codec_set_info info = {o->layers, o->kv_heads, o->head_dim, o->kv, "", ""};
  oscar_codec_spec spec = {
      .head_dim = o->head_dim, .channels = o->head_dim, .form = form, .groups = rope ? 4 : 1, .clip_ratio = 1};
  float *mean = random_floats((size_t)o->head_dim, 5);
  uint16_t pair[OSCAR_MAX_HEAD_DIM / 2];
  for (int i = 0; i < o->head_dim / 2; i++) pair[i] = (uint16_t)i;
  oscar_codec_set *set = NULL;
  if (oscar_codec_set_create(context, &info, &set) != OSCAR_OK) fail(context, "codecs");
  for (int layer = 0; layer < o->layers; layer++)
    for (int head = 0; head < o->kv_heads; head++)
      for (int side = 0; side < 2; side++) { /* one codec each: a model has as many maps to read */
        oscar_codec *codec = NULL;
        bool turns = rope && side == OSCAR_KEYS;
        spec.rope = turns ? rope : NULL;
        spec.rotating_pairs = turns ? o->head_dim / 2 : 0;
        spec.rotating_pair = pair;
        spec.rotating_mean = mean;
        if (oscar_codec_create(context, &spec, &codec) != OSCAR_OK) fail(context, "codec");
        if (oscar_codec_set_assign(set, layer, head, (oscar_side)side, codec) != OSCAR_OK) fail(context, "codec");
        oscar_codec_release(codec);
      }
  free(mean);
  oscar_rope_release(rope);
  return set;
}

/* Bytes of one layer that a query at the end reads. */
static size_t bytes_read(const oscar_sequence *sequence, const struct cache_geometry *g) {
  size_t bytes = 0, coded = 0;
  if (g->codecs) {
    struct side_form keys = side_form_of(oscar_codec_set_get(g->codecs, 0, 0, OSCAR_KEYS));
    struct side_form values = side_form_of(oscar_codec_set_get(g->codecs, 0, 0, OSCAR_VALUES));
    coded = side_bytes(&keys) + side_bytes(&values);
  }
  int64_t pages = (oscar_sequence_length(sequence) + PAGE_TOKENS - 1) / PAGE_TOKENS;
  for (int64_t page = 0; page < pages; page++)
    bytes += (sequence_page(sequence, 0, page).exact ? exact_head_bytes(g) : coded) * (size_t)g->kv_heads;
  return bytes;
}

static void fill(oscar_context *context, oscar_sequence *sequence, const struct options *o, const float *k, const float *v) {
  for (int at = 0; at < o->context; at += FILL_CHUNK) {
    int n = o->context - at < FILL_CHUNK ? o->context - at : FILL_CHUNK;
    if (oscar_sequence_begin(sequence, n) != OSCAR_OK) fail(context, "begin");
    for (int layer = 0; layer < o->layers; layer++)
      if (oscar_sequence_write(sequence, layer, k, v) != OSCAR_OK) fail(context, "write");
    if (oscar_sequence_commit(sequence) != OSCAR_OK) fail(context, "commit");
  }
}

/* The median time of a call over all layers, divided by the layers. */
static double time_layers(oscar_context *context, oscar_attention *attention, const struct options *o,
                          const oscar_attention_job *job, int repeats) {
  double times[REPEATS];
  for (int r = 0; r < repeats; r++) {
    int64_t start = time_ns();
    for (int layer = 0; layer < o->layers; layer++)
      if (oscar_attention_run(attention, layer, 0, job, 1) != OSCAR_OK) fail(context, "attention");
    times[r] = (double)(time_ns() - start) / o->layers;
  }
  return median(times, repeats);
}

/* One line: an instruction set, with or without the kernels for many rows that this CPU has above it. */
static void measure(oscar_isa isa, bool many, const struct options *o, double ceiling) {
  oscar_context_options settings;
  oscar_context_options_default(&settings);
  settings.isa = isa;
  settings.threads = o->threads;
  oscar_context *context = NULL;
  if (oscar_context_create(&settings, &context) != OSCAR_OK) return;
  const struct page_kernels *own = page_kernels_for_many(&context->cpu);
  if (many && !own) {
    oscar_context_free(context);
    return;
  }
  if (!many) context->cpu.wide_bf16 = context->cpu.amx_bf16 = false;
  oscar_codec_set *codecs = make_codecs(context, o);
  oscar_cache_options cache_options;
  oscar_cache_options_default(&cache_options);
  cache_options.layers = o->layers;
  cache_options.kv_heads = o->kv_heads;
  cache_options.head_dim = o->head_dim;
  cache_options.codecs = codecs;
  cache_options.budget_bytes = oscar_cache_bytes_for(&cache_options, o->context, 1, FILL_CHUNK);
  oscar_cache *cache = NULL;
  oscar_sequence *sequence = NULL;
  oscar_attention *attention = NULL;
  oscar_attention_options attention_options = {.query_heads = o->query_heads};
  if (oscar_cache_create(context, &cache_options, &cache) != OSCAR_OK) fail(context, "cache");
  if (oscar_sequence_create(cache, &sequence) != OSCAR_OK) fail(context, "sequence");
  if (oscar_attention_create(cache, &attention_options, &attention) != OSCAR_OK) fail(context, "attention");

  size_t row = (size_t)o->head_dim, chunk = (size_t)FILL_CHUNK * (size_t)o->kv_heads * row;
  int prefill = o->context < PREFILL ? o->context : PREFILL;
  size_t queries = (size_t)prefill * (size_t)o->query_heads * row;
  float *k = random_floats(chunk, 1), *v = random_floats(chunk, 2), *q = random_floats(queries, 3),
        *out = random_floats(queries, 4);
  fill(context, sequence, o, k, v);

  oscar_attention_job job = {sequence, 1, q, out, OSCAR_ATTENTION_BY_NUMBER};
  time_layers(context, attention, o, &job, 3);
  double decode = time_layers(context, attention, o, &job, REPEATS);
  job.n = prefill;
  double chunk_time = time_layers(context, attention, o, &job, 3);
  double bytes = (double)bytes_read(sequence, cache_geometry_of(cache));
  printf(
      "%-11s decode %8.1f us/layer  %6.2f ns/(token, KV head)  %7.1f B/(token, KV head)  %6.2f GB/s  %5.1f%% of the read ceiling"
      "   prefill of %d: %8.1f us/(token, layer)\n",
      many ? own->name : oscar_isa_name(isa), decode / 1e3, decode / o->context / o->kv_heads, bytes / o->context / o->kv_heads,
      bytes / decode, 100 * bytes / decode / ceiling, prefill, chunk_time / prefill / 1e3);

  free(k), free(v), free(q), free(out);
  oscar_attention_free(attention);
  oscar_sequence_free(sequence);
  oscar_cache_free(cache);
  oscar_codec_set_free(codecs);
  oscar_context_free(context);
}

static int number(const char *name, const char *text) {
  char *end;
  long value = strtol(text, &end, 10);
  if (*end || value < 1 || value > 1 << 24) {
    fprintf(stderr, "%s %s: expected a positive number\n", name, text);
    exit(1);
  }
  return (int)value;
}

int main(int argc, char **argv) {
  struct options o = {.context = 8192, .head_dim = 128, .query_heads = 32, .kv_heads = 8, .layers = 4, .kv = "int2"};
  o.threads = cpu_available();
  for (int i = 1; i < argc; i += 2) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
    if (!strcmp(name, "--context"))
      o.context = number(name, value);
    else if (!strcmp(name, "--head-dim"))
      o.head_dim = number(name, value);
    else if (!strcmp(name, "--query-heads"))
      o.query_heads = number(name, value);
    else if (!strcmp(name, "--kv-heads"))
      o.kv_heads = number(name, value);
    else if (!strcmp(name, "--layers"))
      o.layers = number(name, value);
    else if (!strcmp(name, "--threads"))
      o.threads = number(name, value);
    else if (!strcmp(name, "--kv"))
      o.kv = value;
    else {
      fprintf(stderr, "usage: bench_attention [--context N] [--head-dim D] [--query-heads H] [--kv-heads K] [--layers L] "
                      "[--threads T] [--kv bf16|int2|int2-gain|int2-oscar]\n");
      return 1;
    }
  }
  double ceiling = read_ceiling(o.threads);
  printf("%d tokens, %d layers, %d query heads, %d KV heads of %d, %s, %d threads; read ceiling %.1f GB/s\n", o.context, o.layers,
         o.query_heads, o.kv_heads, o.head_dim, o.kv, o.threads, ceiling);
  for (int isa = OSCAR_ISA_PORTABLE; isa <= OSCAR_ISA_NEON_DOT; isa++) measure((oscar_isa)isa, false, &o, ceiling);
  measure(OSCAR_ISA_AUTO, true, &o, ceiling);
  return 0;
}
