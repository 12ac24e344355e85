/*
 * bench/cuda_prefill.c - attention of prompts on a GPU: many queries of one sequence over what is cached and themselves.
 *
 *   bench_cuda_prefill [--query-heads N] [--kv-heads N] [--head-dim N] [--case LIST] [--form NAME] [--csv FILE]
 *                      [--way prefill|decode|wide]
 *
 * A case is "8 on 102408", the last 8 of 102408 tokens, or "8192", all of them; several have commas between them.
 *
 * A cache of one layer is filled with random rows, so coded pages are made as in use; then the queries of the last tokens are run
 * again and again. TFLOPS count 4 head_dim operations for every pair of a query and a position that it sees, as is usual,
 * whatever the kernel does besides: bringing queries into the space of codes and sums out of it, turning means. The time includes
 * everything that a layer's attention enqueues, but not planning, which is done once for all layers.
 */
#include "attention/cuda/device.h"
#include "base/sort.h"
#include "cuda/device.h"
#include "encode_codecs.h"

#include <oscar/attention.h>
#include <oscar/cache.h>

#define CHUNK       4096
#define ROUNDS      7
#define MOST_TOKENS (1 << 20)

struct options {
  int query_heads, kv_heads, head_dim;
  const char *cases, *form, *csv; /* form: of the cache; NULL: all */
  enum attention_way way;
};

#define USUAL_CASES "8192,32768,4096 on 36864,4096 on 106496,512 on 102912,64 on 102464,16 on 102416,8 on 102408,4 on 102404"
struct work {
  char name[32];
  int tokens, queries;
};
/* The first of a list, and how many characters it takes with the comma after it; 0: it is no case. */
static int read_case(const char *list, struct work *work) {
  const int length = (int)strcspn(list, ",");
  int end = 0;
  snprintf(work->name, sizeof work->name, "%.*s", length, list);
  if (sscanf(list, "%d on %d%n", &work->queries, &work->tokens, &end) != 2) {
    end = 0;
    if (sscanf(list, "%d%n", &work->tokens, &end) != 1) return 0;
    work->queries = work->tokens;
  }
  if (end != length || work->queries < 1 || work->queries > work->tokens || work->tokens > MOST_TOKENS) return 0;
  return length + (list[length] == ',');
}

static const struct {
  const char *name;
  bool coded;
  oscar_row_form form;
  int turning; /* of 4 quarters of the pairs */
} forms[] = {{"int2, four gains, turning mean", true, OSCAR_ROW_LOG_GAINS, 4},
             {"int2, four gains, three quarters turning", true, OSCAR_ROW_LOG_GAINS, 3},
             {"int2, four gains, half turning", true, OSCAR_ROW_LOG_GAINS, 2},
             {"int2, four gains, a quarter turning", true, OSCAR_ROW_LOG_GAINS, 1},
             {"int2, four gains", true, OSCAR_ROW_LOG_GAINS, 0},
             {"int2, one gain", true, OSCAR_ROW_GAIN, 0},
             {"bf16", false, OSCAR_ROW_GAIN, 0}};

static oscar_context *context;
static oscar_cuda *cuda;

static void check(oscar_status status) {
  if (status == OSCAR_OK) return;
  fprintf(stderr, "%s\n", oscar_last_error(context));
  exit(1);
}

static oscar_codec_set *make_set(const struct options *o, int form) {
  if (!forms[form].coded) return NULL;
  const oscar_codec_set_info info = {1, o->kv_heads, o->head_dim, "bench", "", ""};
  oscar_codec_set *set;
  check(oscar_codec_set_create(context, &info, &set));
  for (int side = 0; side < 2; side++)
    for (int head = 0; head < o->kv_heads; head++) {
      oscar_codec *codec = make_turning_codec(context, o->head_dim, forms[form].form, (oscar_side)side,
                                              side == OSCAR_KEYS ? forms[form].turning : 0, head);
      check(oscar_codec_set_assign(set, 0, head, (oscar_side)side, codec));
      oscar_codec_release(codec);
    }
  return set;
}

static void *device_copy(const float *x, size_t floats) {
  void *memory;
  check(cuda_alloc(cuda, floats * sizeof *x, &memory));
  check(cuda_upload(cuda, memory, x, floats * sizeof *x));
  return memory;
}

/* The last step, of `queries` tokens, is left open. */
static oscar_sequence *fill(oscar_cache *cache, const struct options *o, int tokens, int queries) {
  const size_t width = (size_t)(o->kv_heads * o->head_dim);
  oscar_sequence *s;
  check(oscar_sequence_create(cache, &s));
  const size_t most = queries > CHUNK ? (size_t)queries : CHUNK;
  float *x = malloc(most * width * sizeof *x);
  if (!x) exit(1);
  for (size_t i = 0; i < most * width; i++) x[i] = i < CHUNK * width ? normal() : x[i - CHUNK * width];
  float *rows = device_copy(x, most * width);
  free(x);
  for (int at = 0, n; at < tokens; at += n) {
    n = tokens - at > queries ? tokens - queries - at : queries;
    if (at + n <= tokens - queries && n > CHUNK) n = CHUNK;
    check(oscar_sequence_begin(s, n));
    check(oscar_sequence_write(s, 0, rows, rows));
    if (at + n < tokens) check(oscar_sequence_commit(s));
  }
  check(oscar_cuda_wait(cuda));
  cuda_release(cuda, rows, most * width * sizeof *x);
  return s;
}

static double measure(const struct options *o, const struct work *work, int form) {
  oscar_codec_set *set = make_set(o, form);
  oscar_cache_options options;
  oscar_cache_options_default(&options);
  options.layers = 1, options.kv_heads = o->kv_heads, options.head_dim = o->head_dim;
  options.codecs = set, options.cuda = cuda;
  options.budget_bytes = (size_t)6 << 30;
  oscar_cache *cache;
  check(oscar_cache_create(context, &options, &cache));
  oscar_attention *attention;
  check(oscar_attention_create(cache, &(oscar_attention_options){.query_heads = o->query_heads}, &attention));
  attention_choose(attention, o->way);
  oscar_sequence *sequence = fill(cache, o, work->tokens, work->queries);
  const size_t floats = (size_t)work->queries * (size_t)(o->query_heads * o->head_dim);
  float *host = malloc(floats * sizeof *host);
  if (!host) exit(1);
  for (size_t i = 0; i < floats; i++) host[i] = i < 1 << 20 ? normal() : host[i - (1 << 20)];
  float *q = device_copy(host, floats), *out = device_copy(host, floats);
  free(host);
  const oscar_attention_job job = {sequence, work->queries, q, out, OSCAR_ATTENTION_BY_NUMBER};
  double times[ROUNDS];
  for (int i = -2; i < ROUNDS; i++) {
    check(oscar_cuda_wait(cuda));
    const int64_t begin = time_ns();
    const int repeats = 4;
    for (int k = 0; k < repeats; k++) check(oscar_attention_run(attention, 0, 0, &job, 1));
    check(oscar_cuda_wait(cuda));
    if (i >= 0) times[i] = 1e-9 * (double)(time_ns() - begin) / repeats;
  }
  sort_doubles(times, ROUNDS);
  oscar_sequence_abort(sequence);
  cuda_release(cuda, q, floats * sizeof *q);
  cuda_release(cuda, out, floats * sizeof *out);
  oscar_attention_free(attention);
  oscar_cache_free(cache);
  oscar_codec_set_free(set);
  return times[ROUNDS / 2];
}

/* 0, which no option allows, for what is no number. */
static int number_of(const char *text) {
  char *end;
  const long x = strtol(text, &end, 10);
  return *end == '\0' && x > 0 && x <= 4096 ? (int)x : 0;
}

static bool parse(int argc, char **argv, struct options *o) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const char *name = argv[i], *value = argv[i + 1];
    if (!strcmp(name, "--query-heads"))
      o->query_heads = number_of(value);
    else if (!strcmp(name, "--kv-heads"))
      o->kv_heads = number_of(value);
    else if (!strcmp(name, "--head-dim"))
      o->head_dim = number_of(value);
    else if (!strcmp(name, "--case"))
      o->cases = value;
    else if (!strcmp(name, "--form"))
      o->form = value;
    else if (!strcmp(name, "--csv"))
      o->csv = value;
    else if (!strcmp(name, "--way"))
      o->way = !strcmp(value, "decode") ? ATTENTION_DECODE : !strcmp(value, "wide") ? ATTENTION_DECODE_WIDE : ATTENTION_PREFILL;
    else
      return false;
  }
  struct work work;
  for (const char *at = o->cases; *at;) {
    const int read = read_case(at, &work);
    if (read == 0) return false;
    at += read;
  }
  return argc % 2 == 1 && o->kv_heads > 0 && o->query_heads > 0 && o->query_heads % o->kv_heads == 0 && o->head_dim > 0 &&
         o->head_dim <= MOST_DIM;
}

int main(int argc, char **argv) {
  struct options o = {.query_heads = 32, .kv_heads = 8, .head_dim = 128, .cases = USUAL_CASES};
  if (!parse(argc, argv, &o)) {
    fprintf(stderr, "usage: bench_cuda_prefill [--query-heads N] [--kv-heads N] [--head-dim N] [--case LIST] [--form NAME] "
                    "[--csv FILE] [--way prefill|decode|wide]\n");
    return 2;
  }
  if (oscar_context_create(NULL, &context) != OSCAR_OK) return 1;
  check(oscar_cuda_create(context, NULL, &cuda));
  oscar_cuda_info info;
  oscar_cuda_describe(cuda, &info);
  FILE *csv = o.csv ? fopen(o.csv, "w") : NULL;
  if (csv) fprintf(csv, "gpu,query_heads,kv_heads,head_dim,case,form,ms,tflops\n");
  printf("%s, %d query and %d KV heads of %d\n", info.name, o.query_heads, o.kv_heads, o.head_dim);
  printf("%-16s %-40s %9s %8s\n", "queries", "form", "ms", "TFLOPS");
  struct work work;
  for (const char *at = o.cases; *at;) {
    at += read_case(at, &work);
    for (size_t form = 0; form < ARRAY_LENGTH(forms); form++) {
      if (o.form && strcmp(o.form, forms[form].name) != 0) continue;
      const double time = measure(&o, &work, (int)form);
      const double queries = work.queries, before = work.tokens - queries;
      const double pairs = queries * before + queries * (queries + 1) / 2;
      const double tflops = 4e-12 * pairs * (double)(o.query_heads * o.head_dim) / time;
      printf("%-16s %-40s %9.3f %8.1f\n", work.name, forms[form].name, time * 1e3, tflops);
      if (csv)
        fprintf(csv, "%s,%d,%d,%d,%s,\"%s\",%.4f,%.2f\n", info.name, o.query_heads, o.kv_heads, o.head_dim, work.name,
                forms[form].name, time * 1e3, tflops);
      fflush(stdout);
    }
  }
  if (csv) fclose(csv);
  oscar_cuda_free(cuda);
  oscar_context_free(context);
  return 0;
}
