/*
 * bench/steps.c - what a step of several tokens of one sequence costs over a step of one: the price of guesses
 * (engine/speculate.h).
 *
 *   bench_steps MODEL.gguf [--kv TYPE] [--depths N,N,...] [--repeats N] [--threads N]
 *
 * At every depth of history steps of 1, 2, 3, 4, 6, 8, 12 and 16 tokens, each with logits of all, take turns; after each the
 * sequence is rewound. Lines: depth, tokens, milliseconds (median, least), and the median over that of one token.
 */
#include "base/sort.h"
#include "engine/engine.h"
#include "engine/openmp.h"

#include <stdlib.h>
#include <string.h>

#define MOST 101

static const int lengths[] = {1, 2, 3, 4, 6, 8, 12, 16};
enum { LENGTHS = (int)ARRAY_LENGTH(lengths), LONGEST = 16, INTO_PAGE = 8 };

static oscar_context *context;

static void check(oscar_status status) {
  if (status == OSCAR_OK) return;
  fprintf(stderr, "bench_steps: %s\n", oscar_last_error(context));
  exit(1);
}

/* Steps begin some tokens into a page and stay in it, so that none demotes another. */
static void measure(struct engine *engine, const int32_t *ids, int64_t depth, int repeats) {
  static double ms[LENGTHS][MOST];
  const int64_t base = depth / OSCAR_PAGE_TOKENS * OSCAR_PAGE_TOKENS + INTO_PAGE;
  const size_t vocab = (size_t)model_geometry_of(engine->model)->vocab;
  float *logits = mem_alloc(context, LONGEST * vocab, sizeof *logits);
  oscar_sequence *sequence;
  if (!logits) check(OSCAR_NO_MEMORY);
  check(oscar_sequence_create(engine->cache, &sequence));
  for (int64_t at = 0; at < base; at += engine->options.chunk) {
    const int n = base - at < engine->options.chunk ? (int)(base - at) : engine->options.chunk;
    check(runner_forward(engine->runner, sequence, n, ids + at, 0, NULL, NULL));
  }
  for (int r = -1; r < repeats; r++) /* the first round touches memory */
    for (int i = 0; i < LENGTHS; i++) {
      int64_t resume;
      const int64_t begun = time_ns();
      check(runner_forward(engine->runner, sequence, lengths[i], ids + base, lengths[i], logits, NULL));
      if (r >= 0) ms[i][r] = (double)(time_ns() - begun) / 1e6;
      check(oscar_sequence_truncate(sequence, base, OSCAR_REWIND_REFILL, &resume));
    }
  double one = 0;
  for (int i = 0; i < LENGTHS; i++) {
    sort_doubles(ms[i], (size_t)repeats);
    if (i == 0) one = ms[i][repeats / 2];
    printf("%lld,%d,%.2f,%.2f,%.2f\n", (long long)depth, lengths[i], ms[i][repeats / 2], ms[i][0], ms[i][repeats / 2] / one);
  }
  fflush(stdout);
  oscar_sequence_free(sequence);
  mem_free(context, logits);
}

static int64_t deepest(const char *depths) {
  int64_t most = 0;
  for (const char *at = depths; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) most = atoll(at) > most ? atoll(at) : most;
  return most;
}

int main(int argc, char **argv) {
  openmp_limit_spinning(argv); /* as the program does */
  struct engine_options options;
  engine_options_default(&options);
  int repeats = 15;
  const char *depths = "0,8192";
  for (int i = 1; i < argc; i++) {
    const bool more = i + 1 < argc;
    if (argv[i][0] != '-')
      options.model_path = argv[i];
    else if (more && !strcmp(argv[i], "--kv"))
      options.kv = argv[++i];
    else if (more && !strcmp(argv[i], "--depths"))
      depths = argv[++i];
    else if (more && !strcmp(argv[i], "--repeats"))
      repeats = atoi(argv[++i]);
    else if (more && !strcmp(argv[i], "--threads"))
      options.threads = atoi(argv[++i]);
    else
      options.model_path = NULL, i = argc;
  }
  if (!options.model_path || repeats < 1 || repeats > MOST) {
    fprintf(stderr, "usage: bench_steps MODEL.gguf [--kv TYPE] [--depths N,...] [--repeats 1..%d] [--threads N]\n", MOST);
    return 1;
  }
  const int64_t tokens = deepest(depths) + INTO_PAGE + LONGEST;
  struct engine engine;
  char error[1024];
  options.context = tokens;
  if (engine_open(&options, &engine, error, sizeof error) != OSCAR_OK) {
    fprintf(stderr, "bench_steps: %s\n", error);
    return 1;
  }
  context = engine.context;
  int32_t *ids = mem_alloc(context, (size_t)tokens, sizeof *ids);
  if (!ids) check(OSCAR_NO_MEMORY);
  for (int64_t i = 0; i < tokens; i++) /* varied ids; speed does not depend on them */
    ids[i] = (int32_t)(i % 1024 * 7919 % model_geometry_of(engine.model)->vocab);
  printf("depth,tokens,ms,least,over_one\n");
  for (const char *at = depths; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) measure(&engine, ids, atoll(at), repeats);
  mem_free(context, ids);
  engine_close(&engine);
  return 0;
}
