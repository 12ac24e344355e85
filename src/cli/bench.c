/*
 * bench.c - `oscar bench`: prompt and decode speed at given depths for each form of the cache, beside the memory ceiling of the
 * same run.
 *
 * Per KV type one cache is filled to each depth in turn; every repetition forks that sequence, so all repetitions see the same
 * history. Decode reads all weights and the whole cache once per token: the bytes and their share of the measured read speed are
 * printed with it.
 *
 * The peak of memory is counted anew for each form of the cache: neither the buffer that the read speed is measured on nor the
 * forms before it are in it. It is that of all tests of this form so far, so that it grows with depth.
 */
#include "cli/kv_list.h"
#include "cli/models.h"
#include "cli/options.h"
#include "cli/progress.h"

#include "base/sort.h"
#include "base/team.h"

#include <jansson.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const struct usage usage = {
    .command = "bench",
    .operands = "",
    .about = "Measures prompt and decode speed (medians) at one or more depths of history, for each form of the cache, and the "
             "memory\n"
             "read speed of this machine in the same run.",
    .examples = "oscar bench -m smollm2-135m\n"
                "oscar bench -m qwen2.5-coder-1.5b --depth 0,4096,8192 --kv bf16,int2 -r 5 --json\n",
};

enum format { TEXT, MARKDOWN, CSV, JSON };
static const char *const format_names[] = {"text", "markdown", "csv", "json"};

struct bench_arguments {
  const char *kv, *depths, *rotation, *format;
  int prompt, decode, repetitions, chunk;
};

#define AT(field) offsetof(struct bench_arguments, field)
static const struct option_spec bench_options[] = {
    {"kv", 0, OPTION_TEXT, AT(kv), "LIST", .help = "forms of the cache, separated by commas"},
    {"depth", 'd', OPTION_TEXT, AT(depths), "LIST", .help = "tokens already in the cache, separated by commas"},
    {"n-prompt", 'p', OPTION_INT, AT(prompt), "N", .help = "prompt tokens to time; 0: skip", 0, 1 << 20},
    {"n-gen", 'n', OPTION_INT, AT(decode), "N", .help = "decoded tokens to time; 0: skip", 0, 1 << 20},
    {"repetitions", 'r', OPTION_INT, AT(repetitions), "N", .help = "times each test is run", 1, 1000},
    {"chunk", 0, OPTION_INT, AT(chunk), "N", .help = "prompt tokens per forward pass", 1, 8192,
     .default_text = "512, on a GPU 2048"},
    {"rotation", 0, OPTION_TEXT, AT(rotation), "FILE",
     .help = "fitted codecs from 'oscar calibrate', for the type they were fitted for",
     .default_text = "the user's cache folder, fitted on first use"},
    {"format", 0, OPTION_TEXT, AT(format), "NAME", .help = "text, markdown, csv or json; --json is short for the last",
     .default_text = "text"},
};

enum { DEPTH_ROOM = 16, REPETITION_ROOM = 1000 };

struct bench {
  const struct loaded_model *m;
  const struct bench_arguments *a;
  int chunk;
  const struct progress *progress;
  int64_t depths[DEPTH_ROOM];
  int n_depths;
  double read_bytes_per_s; /* of memory, all threads */
  float *logits;
  int32_t *ids;
  enum format format;
  json_t *rows;       /* of format JSON */
  bool peak_is_known; /* of the form of the cache that is measured */
};

static int parse_depths(const char *text, struct bench *b) {
  while (*text) {
    size_t length = strcspn(text, ",");
    char number[24];
    snprintf(number, sizeof number, "%.*s", (int)(length < 23 ? length : 23), text);
    if (b->n_depths == DEPTH_ROOM || !parse_int64(number, &b->depths[b->n_depths]) || b->depths[b->n_depths] < 0)
      return wrong_use("bench: --depth '%s' is not a list of up to %d token counts", text, DEPTH_ROOM);
    b->n_depths++;
    text += length;
    if (*text == ',') text++;
  }
  return b->n_depths ? EXIT_DONE : wrong_use("bench: --depth needs at least one token count");
}

/* Bytes per second of reading a buffer far larger than the caches, where the model runs; best of three: the ceiling for decode.
 */
static oscar_status measure_read_speed(struct bench *b) {
  if (b->m->cuda) return backend_cuda_read_speed(b->m->backend, &b->read_bytes_per_s);
  const size_t words = ((size_t)1 << 30) / sizeof(uint64_t);
  const int threads = b->m->context->options.threads;
  uint64_t *buffer = mem_alloc(b->m->context, words, sizeof *buffer);
  if (!buffer) return OSCAR_NO_MEMORY;
  team_before_openmp(b->m->context);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size_t i = 0; i < words; i++) buffer[i] = i;
  volatile uint64_t sink = 0; /* keeps the reads */
  for (int r = 0; r < 3; r++) {
    uint64_t sum = 0;
    int64_t begun = time_ns();
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
    for (size_t i = 0; i < words; i++) sum += buffer[i];
    double speed = (double)(words * sizeof *buffer) * 1e9 / (double)(time_ns() - begun);
    sink = sink + sum;
    if (speed > b->read_bytes_per_s) b->read_bytes_per_s = speed;
  }
  mem_free(b->m->context, buffer);
  return OSCAR_OK;
}

/* One test: medians over the repetitions. Bytes are those that a decoded token reads; 0 for prompts. */
struct row {
  const char *kv, *test;
  int tokens;
  int64_t depth;
  double median, min, max, bytes_per_token, gb_per_s, share;
  size_t peak_bytes; /* of the process; 0: not known */
};

static void print_head(enum format format) {
  if (format == TEXT)
    printf("%-14s %-7s %6s %7s %10s %10s %10s %9s %8s %7s %9s\n", "cache", "test", "tokens", "depth", "tokens/s", "min", "max",
           "MB/token", "GB/s", "of read", "peak MiB");
  else if (format == MARKDOWN)
    printf("| cache | test | tokens | depth | tokens/s | lowest | highest | MB per token | GB/s | of read | peak MiB |\n"
           "|---|---|---|---|---|---|---|---|---|---|---|\n");
  else if (format == CSV)
    printf("cache,test,tokens,depth,tokens_per_s,min,max,bytes_per_token,gb_per_s,share_of_read_speed,peak_bytes\n");
}

static void print_row(enum format format, const struct row *r) {
  const bool decode = r->bytes_per_token > 0;
  char peak[32] = "?";
  if (r->peak_bytes) snprintf(peak, sizeof peak, "%.1f", (double)r->peak_bytes / 1048576);
  if (format == TEXT) {
    printf("%-14s %-7s %6d %7lld %10.2f %10.2f %10.2f", r->kv, r->test, r->tokens, (long long)r->depth, r->median, r->min,
           r->max);
    if (decode)
      printf(" %9.1f %8.2f %6.0f%%", r->bytes_per_token * 1e-6, r->gb_per_s, 100 * r->share);
    else
      printf(" %9s %8s %7s", "", "", "");
    printf(" %9s\n", peak);
  } else if (format == MARKDOWN) {
    printf("| %s | %s | %d | %lld | %.2f | %.2f | %.2f |", r->kv, r->test, r->tokens, (long long)r->depth, r->median, r->min,
           r->max);
    if (decode)
      printf(" %.1f | %.2f | %.0f %% | %s |\n", r->bytes_per_token * 1e-6, r->gb_per_s, 100 * r->share, peak);
    else
      printf(" | | | %s |\n", peak);
  } else if (format == CSV) {
    printf("%s,%s,%d,%lld,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g,", r->kv, r->test, r->tokens, (long long)r->depth, r->median, r->min,
           r->max, r->bytes_per_token, r->gb_per_s, r->share);
    if (r->peak_bytes) printf("%zu", r->peak_bytes);
    putchar('\n');
  }
  fflush(stdout);
}

static json_t *row_to_json(const struct row *r) {
  json_t *peak = r->peak_bytes ? json_integer((json_int_t)r->peak_bytes) : json_null();
  return json_pack("{s:s, s:s, s:i, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:o}", "kv", r->kv, "test", r->test, "tokens", r->tokens,
                   "depth", (json_int_t)r->depth, "tokens_per_s", r->median, "min", r->min, "max", r->max, "bytes_per_token",
                   r->bytes_per_token, "gb_per_s", r->gb_per_s, "share_of_read_speed", r->share, "peak_bytes", peak);
}

static void report_row(const struct bench *b, struct row *r, double *speeds) {
  const int n = b->a->repetitions;
  sort_doubles(speeds, (size_t)n);
  r->median = n % 2 ? speeds[n / 2] : (speeds[n / 2 - 1] + speeds[n / 2]) / 2;
  r->min = speeds[0];
  r->max = speeds[n - 1];
  r->gb_per_s = r->median * r->bytes_per_token * 1e-9;
  r->share = r->median * r->bytes_per_token / b->read_bytes_per_s;
  r->peak_bytes = b->peak_is_known ? mem_peak_bytes() : 0;
  if (b->format == JSON)
    json_array_append_new(b->rows, row_to_json(r));
  else
    print_row(b->format, r);
}

static oscar_status feed(const struct bench *b, struct runner *runner, oscar_sequence *sequence, int64_t tokens, int outputs) {
  for (int64_t done = 0; done < tokens;) {
    if (b->progress && !b->progress->report(b->progress->user, "history", done, tokens))
      return set_error(b->m->context, OSCAR_CANCELLED, "the benchmark was stopped");
    int n = tokens - done < b->chunk ? (int)(tokens - done) : b->chunk;
    bool last = done + n == tokens;
    oscar_status status = runner_forward(runner, sequence, n, b->ids + done % 1024, last ? outputs : 0, b->logits, NULL);
    if (status != OSCAR_OK) return status;
    done += n;
  }
  return OSCAR_OK;
}

/* One repetition on a fork of `base`: `tokens` at once (prompt) or one by one (decode). Gives tokens per second. */
static oscar_status time_once(const struct bench *b, struct runner *runner, const oscar_sequence *base, int tokens,
                              bool one_by_one, double *speed, size_t *cache_bytes) {
  oscar_sequence *sequence = NULL;
  oscar_status status = oscar_sequence_fork(base, &sequence);
  if (status != OSCAR_OK) return status;
  struct bench quiet = *b;
  quiet.progress = NULL;
  if (one_by_one)
    status = runner_forward(runner, sequence, 1, b->ids, 1, b->logits, NULL); /* not timed: the first touch of new pages */
  if (b->m->cuda && status == OSCAR_OK) status = oscar_cuda_wait(b->m->cuda); /* for the history */
  const int64_t begun = time_ns();
  if (!one_by_one && status == OSCAR_OK) status = feed(&quiet, runner, sequence, tokens, 1);
  for (int i = 0; one_by_one && i < tokens && status == OSCAR_OK; i++)
    status = runner_forward(runner, sequence, 1, b->ids + i % 1024, 1, b->logits, NULL);
  *speed = (double)tokens * 1e9 / (double)(time_ns() - begun);
  *cache_bytes = oscar_sequence_bytes(sequence);
  oscar_sequence_free(sequence);
  return status;
}

static oscar_status time_test(const struct bench *b, struct runner *runner, const oscar_sequence *base, const char *kv,
                              int64_t depth, bool one_by_one) {
  const int tokens = one_by_one ? b->a->decode : b->a->prompt;
  double speeds[REPETITION_ROOM];
  size_t cache_bytes = 0;
  if (tokens == 0) return OSCAR_OK;
  for (int i = 0; i < b->a->repetitions; i++) {
    oscar_status status = time_once(b, runner, base, tokens, one_by_one, &speeds[i], &cache_bytes);
    if (status != OSCAR_OK) return status;
  }
  struct row row = {.kv = kv, .test = one_by_one ? "decode" : "prompt", .tokens = tokens, .depth = depth};
  if (one_by_one) row.bytes_per_token = (double)model_read_bytes_per_token(b->m->model) + (double)cache_bytes;
  report_row(b, &row, speeds);
  return OSCAR_OK;
}

static oscar_status bench_cache(struct bench *b, const char *kv, const oscar_codec_set *codecs) {
  int64_t deepest = 0;
  for (int i = 0; i < b->n_depths; i++) deepest = b->depths[i] > deepest ? b->depths[i] : deepest;
  const int longest = b->a->prompt > b->a->decode + 1 ? b->a->prompt : b->a->decode + 1;
  oscar_cache_options options;
  model_cache_options(b->m->model, &options);
  options.codecs = codecs;
  options.budget_bytes = oscar_cache_bytes_for(&options, deepest + longest, 2, b->chunk);
  b->peak_is_known = mem_peak_restart();
  oscar_cache *cache = NULL;
  struct runner *runner = NULL;
  oscar_status status = oscar_cache_create(b->m->context, &options, &cache);
  if (status == OSCAR_OK) status = runner_create(b->m->model, cache, b->chunk, &runner);
  for (int i = 0; i < b->n_depths && status == OSCAR_OK; i++) {
    oscar_sequence *base = NULL;
    status = oscar_sequence_create(cache, &base);
    if (status == OSCAR_OK) status = feed(b, runner, base, b->depths[i], 0);
    if (b->progress) b->progress->report(b->progress->user, "history", 1, 1);
    if (status == OSCAR_OK) status = time_test(b, runner, base, kv, b->depths[i], false);
    if (status == OSCAR_OK) status = time_test(b, runner, base, kv, b->depths[i], true);
    if (base) oscar_sequence_free(base);
  }
  runner_free(runner);
  oscar_cache_free(cache);
  return status;
}

static oscar_status prepare(struct bench *b) {
  const struct model_geometry *g = model_geometry_of(b->m->model);
  b->logits = mem_alloc(b->m->context, (size_t)g->vocab, sizeof *b->logits);
  b->ids = mem_alloc(b->m->context, (size_t)1024 + (size_t)b->chunk, sizeof *b->ids);
  if (!b->logits || !b->ids) return OSCAR_NO_MEMORY;
  for (int i = 0; i < 1024 + b->chunk; i++)
    b->ids[i] = (int32_t)((int64_t)(i % 1024) * 7919 % g->vocab); /* varied ids; speed does not depend on them */
  for (int i = 0; i < b->n_depths; i++)
    if (b->depths[i] + b->a->prompt + b->a->decode > g->context_trained)
      log_line(
          b->m->context, OSCAR_LOG_WARNING,
          "a depth of %lld with %d tokens on top is more than the %lld this model was trained for: its speed can be measured, "
          "its text would be poor",
          (long long)b->depths[i], b->a->prompt + b->a->decode, (long long)g->context_trained);
  return measure_read_speed(b);
}

static oscar_status bench_all(struct bench *b, struct kv_list *list) {
  const struct loaded_model *m = b->m;
  oscar_status status = prepare(b);
  if (status == OSCAR_OK) status = kv_list_obtain(list, m->model, b->a->rotation, b->progress);
  if (status != OSCAR_OK) return status;
  char backend[256], bytes[32], threads[32] = "";
  loaded_model_describe(m, backend, sizeof backend);
  if (!m->cuda) snprintf(threads, sizeof threads, " (%d threads)", m->context->options.threads);
  const struct model_geometry *g = model_geometry_of(m->model);
  const double weights = (double)model_read_bytes_per_token(m->model);
  if (b->format == TEXT || b->format == MARKDOWN)
    printf("%s: %s of weights read per token; %s; memory read speed %.2f GB/s%s: at most %.1f tokens/s with an empty "
           "cache\n\n",
           g->name, format_bytes(weights, bytes, sizeof bytes), backend, b->read_bytes_per_s * 1e-9, threads,
           b->read_bytes_per_s / weights);
  print_head(b->format);
  for (int i = 0; i < list->count && status == OSCAR_OK; i++) status = bench_cache(b, list->names[i], list->sets[i]);
  if (status == OSCAR_OK && b->format == JSON) {
    json_t *root =
        json_pack("{s:s, s:s, s:i, s:f, s:f, s:O}", "model", g->name, "backend", backend, "threads", m->context->options.threads,
                  "read_gb_per_s", b->read_bytes_per_s * 1e-9, "weight_bytes_per_token", weights, "rows", b->rows);
    json_dumpf(root, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
    putchar('\n');
    json_decref(root);
  }
  return status;
}

static int run_bench(const struct engine_options *engine, struct kv_list *list, struct bench *b) {
  interrupt_watch();
  struct progress_line line;
  progress_begin(&line);
  b->progress = &line.progress;
  b->rows = b->format == JSON ? json_array() : NULL;
  struct loaded_model m;
  int code = loaded_model_open(engine, &m);
  if (code == EXIT_DONE) {
    b->m = &m;
    b->chunk = engine_chunk(b->a->chunk, m.cuda);
    oscar_status status = bench_all(b, list);
    progress_end(&line);
    if (status != OSCAR_OK) code = failed_with(status, oscar_last_error(m.context));
    mem_free(m.context, b->logits);
    mem_free(m.context, b->ids);
    kv_list_free(list); /* before the context that its codecs belong to */
    loaded_model_close(&m);
  }
  if (b->rows) json_decref(b->rows);
  b->m = NULL;
  b->progress = NULL;
  return code;
}

static int choose_format(const char *name, bool json, enum format *format) {
  *format = json ? JSON : TEXT;
  if (!name) return EXIT_DONE;
  for (int i = 0; i < (int)ARRAY_LENGTH(format_names); i++)
    if (strcmp(name, format_names[i]) == 0) {
      if (json && i != JSON) return wrong_use("bench: --json and --format %s; one of them", name);
      *format = (enum format)i;
      return EXIT_DONE;
    }
  return wrong_use("bench: --format '%s'; expected text, markdown, csv or json", name);
}

int command_bench(int argc, char **argv) {
  struct engine_options engine;
  struct bench_arguments a = {.kv = "bf16,int2", .depths = "0", .prompt = 512, .decode = 64, .repetitions = 5};
  struct output_arguments output = {0};
  engine_options_default(&engine);
  const struct option_group groups[] = {
      model_group(&engine), {"Benchmark", bench_options, (int)ARRAY_LENGTH(bench_options), &a}, output_group(&output)};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  struct kv_list list;
  struct bench b = {.a = &a};
  char path[PATH_MAX];
  code = kv_list_parse("bench", a.kv, &list);
  if (code == EXIT_DONE) code = kv_list_check_runnable("bench", &list);
  if (code == EXIT_DONE) code = parse_depths(a.depths, &b);
  if (code == EXIT_DONE) code = choose_format(a.format, output.json, &b.format);
  if (code == EXIT_DONE) code = engine_options_resolve("bench", &engine, path, sizeof path);
  if (code == EXIT_DONE) code = run_bench(&engine, &list, &b);
  kv_list_free(&list);
  return code;
}
