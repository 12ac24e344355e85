/*
 * bench_serving MODEL [KV] [RUNNING] [PROMPT] [DEVICE] - what a service does to those it serves.
 *
 * RUNNING answers (8) to short prompts are under way when a prompt of PROMPT tokens (8192) comes in. Printed are the tokens a
 * second of all answers before that, the time to the first token of the long prompt, and how long a running answer had to wait
 * for a token at most and at the 99th percentile, before it came and while it was computed. As many runs again with prompts that
 * begin alike.
 */
#include "base/sort.h"
#include "engine/openmp.h"
#include "engine/service.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_RUNNING = 64, SHORT_PROMPT = 32, MOST_GAPS = 1 << 16 };

struct stream {
  int64_t last_ns, first_ns;
  int64_t tokens;
  bool done;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static double gaps[MOST_GAPS]; /* milliseconds between tokens of an answer */
static int n_gaps;

static void fail(const char *what) {
  fprintf(stderr, "%s\n", what);
  exit(1);
}

static void observe(void *user, const struct request_event *e) {
  struct stream *s = user;
  const int64_t now = time_ns();
  pthread_mutex_lock(&lock);
  if (e->kind == EVENT_TEXT) {
    if (s->last_ns && n_gaps < MOST_GAPS) gaps[n_gaps++] = (double)(now - s->last_ns) * 1e-6;
    if (!s->first_ns) s->first_ns = now;
    s->last_ns = now;
    s->tokens += e->n_tokens;
  }
  if (e->kind == EVENT_FINISHED && e->error) fail(e->error);
  if (e->kind == EVENT_DONE) s->done = true;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
}

static uint64_t submit(struct service *service, struct stream *s, const int32_t *ids, int n, int max_tokens) {
  struct request_options o;
  struct service_error error;
  uint64_t id;
  request_options_default(&o);
  o.ids = ids;
  o.n = n;
  o.max_tokens = max_tokens;
  o.sampling.temperature = 0;
  o.ignore_end = o.return_tokens = true;
  o.observer = observe;
  o.observer_user = s;
  if (service_submit(service, &o, &id, &error) != OSCAR_OK) fail(error.text);
  return id;
}

static void wait_tokens(const struct stream *s, int64_t tokens) {
  pthread_mutex_lock(&lock);
  while (s->tokens < tokens && !s->done) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
}

static void report_gaps(const char *when, double seconds) {
  pthread_mutex_lock(&lock);
  sort_doubles(gaps, (size_t)n_gaps);
  if (n_gaps)
    printf("%s: %7.1f tokens/s, between tokens %6.1f ms (median) %6.1f ms (99 %%) %6.1f ms (most)\n", when, n_gaps / seconds,
           gaps[n_gaps / 2], gaps[n_gaps * 99 / 100], gaps[n_gaps - 1]);
  n_gaps = 0;
  pthread_mutex_unlock(&lock);
}

static void random_ids(int32_t *ids, int n, int vocab, uint64_t seed) {
  for (int i = 0; i < n; i++) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    ids[i] = (int32_t)((seed >> 33) % (uint64_t)vocab);
  }
}

int main(int argc, char **argv) {
  openmp_limit_spinning(argv); /* as the program does */
  struct engine engine;
  struct engine_options options;
  struct service_options serving;
  struct service *service;
  struct service_stats stats;
  char error[1024];
  static struct stream running[MOST_RUNNING], longer;
  if (argc < 2) fail("bench_serving MODEL [KV] [RUNNING] [PROMPT] [DEVICE]");
  const int count = argc > 3 ? atoi(argv[3]) : 8, prompt = argc > 4 ? atoi(argv[4]) : 8192;
  engine_options_default(&options);
  options.model_path = argv[1];
  options.kv = argc > 2 ? argv[2] : "int2";
  options.device = argc > 5 ? argv[5] : "cpu";
  options.kv_memory_bytes = (size_t)2 << 30;
  if (count < 1 || count > MOST_RUNNING) fail("1 to 64 answers");
  if (engine_open(&options, &engine, error, sizeof error) != OSCAR_OK) fail(error);
  service_options_default(&serving);
  if (service_create(&engine, &serving, &service) != OSCAR_OK) fail(oscar_last_error(engine.context));
  const int vocab = model_geometry_of(engine.model)->vocab;
  int32_t *ids = malloc((size_t)prompt * sizeof *ids);
  if (!ids || prompt >= options.context + engine.options.context) fail("a prompt of that size does not fit");

  uint64_t id[MOST_RUNNING];
  for (int i = 0; i < count; i++) {
    random_ids(ids, SHORT_PROMPT, vocab, 100 + (uint64_t)i);
    id[i] = submit(service, &running[i], ids, SHORT_PROMPT, 0);
  }
  for (int i = 0; i < count; i++) wait_tokens(&running[i], 1);
  n_gaps = 0;
  int64_t begun = time_ns();
  wait_tokens(&running[0], running[0].tokens + 100);
  report_gaps("answers alone      ", (double)(time_ns() - begun) * 1e-9);
  random_ids(ids, prompt, vocab, 1);
  begun = time_ns();
  submit(service, &longer, ids, prompt, 1);
  while (!longer.done) wait_tokens(&longer, 1);
  report_gaps("beside a prompt    ", (double)(time_ns() - begun) * 1e-9);
  printf("the prompt of %d: first token after %.2f s, %.0f tokens/s\n", prompt, (double)(longer.first_ns - begun) * 1e-9,
         prompt / ((double)(longer.first_ns - begun) * 1e-9));
  for (int i = 0; i < count; i++) service_cancel(service, id[i]);
  for (int i = 0; i < count; i++)
    while (!running[i].done) wait_tokens(&running[i], INT64_MAX);
  n_gaps = 0;
  random_ids(ids, prompt, vocab, 2);
  memset(&longer, 0, sizeof longer);
  begun = time_ns();
  submit(service, &longer, ids, prompt, 1);
  while (!longer.done) wait_tokens(&longer, 1);
  printf("alone              : first token after %.2f s, %.0f tokens/s\n", (double)(longer.first_ns - begun) * 1e-9,
         prompt / ((double)(longer.first_ns - begun) * 1e-9));
  service_stats_get(service, &stats);
  printf("%lld steps, %lld tokens of prompts computed, %lld generated\n", (long long)stats.steps, (long long)stats.computed,
         (long long)stats.generated);
  service_free(service);
  engine_close(&engine);
  free(ids);
  return 0;
}
