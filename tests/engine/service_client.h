/*
 * tests/engine/service_client.h - a service on a small random model, and requests whose events are collected and checked for
 * order.
 */
#ifndef OSCAR_TEST_SERVICE_CLIENT_H
#define OSCAR_TEST_SERVICE_CLIENT_H

#include "engine/service.h"
#include "model/small_model.h"

#include <pthread.h>

struct client_answer {
  char *text;
  size_t bytes;
  int32_t *ids;
  float *logprobs;
  int n;
  bool finished;
  enum finish_reason reason;
  oscar_status status;
  char stopped_by[64], error[256];
  struct request_usage usage;
};

struct client {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  int choices;
  struct client_answer answers[16];
  bool done;
  struct request_usage usage;
  uint64_t id;
  int cancel_after; /* tokens; 0: never. The canceller is another thread: who calls is told */
  int events;
};

static inline void client_take_text(struct client_answer *a, const struct request_event *e) {
  a->text = realloc(a->text, a->bytes + e->bytes + 1);
  memcpy(a->text + a->bytes, e->text, e->bytes);
  a->bytes += e->bytes;
  a->text[a->bytes] = '\0';
  a->ids = realloc(a->ids, (size_t)(a->n + e->n_tokens + 1) * sizeof *a->ids);
  a->logprobs = realloc(a->logprobs, (size_t)(a->n + e->n_tokens + 1) * sizeof *a->logprobs);
  for (int i = 0; i < e->n_tokens; i++) {
    a->logprobs[a->n] = e->tokens[i].logprob;
    a->ids[a->n++] = e->tokens[i].id;
  }
}

/* Assertions of cmocka leave by longjmp, which another thread must not: a broken rule ends the program. */
#define client_require(rule)                                                                                                     \
  do {                                                                                                                           \
    if (!(rule)) {                                                                                                               \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #rule);                                                                 \
      abort();                                                                                                                   \
    }                                                                                                                            \
  } while (0)

static inline void client_observe(void *user, const struct request_event *e) {
  struct client *c = user;
  pthread_mutex_lock(&c->lock);
  client_require(!c->done);
  c->events++;
  if (e->kind == EVENT_DONE) {
    for (int i = 0; i < c->choices; i++) client_require(c->answers[i].finished);
    c->usage = *e->usage;
    c->done = true;
  } else {
    struct client_answer *a = &c->answers[e->choice];
    client_require(e->choice >= 0 && e->choice < c->choices && !a->finished);
    if (e->kind == EVENT_TEXT) client_take_text(a, e);
    if (e->kind == EVENT_FINISHED) {
      a->finished = true;
      a->reason = e->reason;
      a->status = e->status;
      a->usage = *e->usage;
      if (e->stopped_by) snprintf(a->stopped_by, sizeof a->stopped_by, "%s", e->stopped_by);
      if (e->error) snprintf(a->error, sizeof a->error, "%s", e->error);
    }
  }
  pthread_cond_broadcast(&c->changed);
  pthread_mutex_unlock(&c->lock);
}

static inline void client_init(struct client *c) {
  *c = (struct client){0};
  pthread_mutex_init(&c->lock, NULL);
  pthread_cond_init(&c->changed, NULL);
}

static inline void client_clear(struct client *c) {
  for (int i = 0; i < 16; i++) {
    free(c->answers[i].text);
    free(c->answers[i].ids);
    free(c->answers[i].logprobs);
  }
  pthread_mutex_destroy(&c->lock);
  pthread_cond_destroy(&c->changed);
  *c = (struct client){0};
}

static inline oscar_status client_try(struct service *s, struct client *c, struct request_options options,
                                      struct service_error *error) {
  client_init(c);
  c->choices = options.choices;
  options.observer = client_observe;
  options.observer_user = c;
  return service_submit(s, &options, &c->id, error);
}

static inline void client_submit(struct service *s, struct client *c, struct request_options options) {
  struct service_error error;
  if (client_try(s, c, options, &error) != OSCAR_OK) fail_msg("submit: %s: %s", oscar_status_name(error.status), error.text);
  assert_true(c->id != 0);
}

static inline void client_wait(struct client *c) {
  pthread_mutex_lock(&c->lock);
  while (!c->done) pthread_cond_wait(&c->changed, &c->lock);
  pthread_mutex_unlock(&c->lock);
}

static inline void client_wait_tokens(struct client *c, int tokens) {
  pthread_mutex_lock(&c->lock);
  while (!c->done && c->answers[0].n < tokens) pthread_cond_wait(&c->changed, &c->lock);
  pthread_mutex_unlock(&c->lock);
}

/* Whatever the answer is, its tokens are reported. */
static inline struct request_options client_options(const int32_t *ids, int n, int max_tokens) {
  struct request_options o;
  request_options_default(&o);
  o.ids = ids;
  o.n = n;
  o.max_tokens = max_tokens;
  o.sampling = (struct sampler_options){.top_p = 1};
  o.ignore_end = true;
  o.return_tokens = true;
  return o;
}

/* ---- a service ---- */

struct rig {
  struct engine engine;
  struct service *service;
};

/* budget: in tokens of one sequence, beside which there is room for a little; 0: for 40 whole contexts */
struct rig_options {
  const char *path, *kv;
  int64_t context, budget_tokens;
  int chunk, threads;
  struct service_options service;
};

static inline struct rig_options rig_options(const char *path) {
  struct rig_options o = {.path = path, .kv = "int2-hadamard", .context = 1024, .chunk = 128, .threads = 2};
  service_options_default(&o.service);
  o.service.max_running = 8;
  o.service.reuse = OSCAR_PREFIX_EXACT;
  return o;
}

static inline void rig_open(struct rig *r, const struct rig_options *o) {
  char error[512];
  struct engine_options options;
  engine_options_default(&options);
  options.model_path = o->path;
  options.kv = o->kv;
  options.context = o->context;
  options.chunk = o->chunk;
  options.threads = o->threads;
  options.recent_tokens = 128;
  oscar_cache_options cache = {.layers = SMALL_LAYERS,
                               .kv_heads = SMALL_KV_HEADS,
                               .head_dim = SMALL_HEAD_DIM,
                               .sink_pages = 1,
                               .recent_pages = 2}; /* BF16, more than any form needs */
  const int64_t tokens = o->budget_tokens ? o->budget_tokens : o->context;
  options.kv_memory_bytes = oscar_cache_bytes_for(&cache, tokens, o->budget_tokens ? 1 : 40, o->chunk);
  if (engine_open(&options, &r->engine, error, sizeof error) != OSCAR_OK) fail_msg("%s", error);
  assert_ok(r->engine.context, service_create(&r->engine, &o->service, &r->service));
}

static inline void rig_close(struct rig *r) {
  service_free(r->service);
  assert_ok(r->engine.context, oscar_cache_check(r->engine.cache));
  engine_close(&r->engine);
}

static inline void some_ids(uint64_t seed, int n, int32_t *ids) {
  for (int i = 0; i < n; i++) ids[i] = (int32_t)(test_random(&seed) % SMALL_VOCAB);
}

#endif
