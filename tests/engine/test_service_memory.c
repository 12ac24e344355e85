/* Memory runs out at any moment: requests end with a reason, the service goes on or never began, and nothing is lost. */
#include "../failing_alloc.h"
#include "service_client.h"

struct parts {
  struct failing_alloc alloc;
  struct engine engine;
};

static void open_parts(struct parts *p, const char *path) {
  oscar_context *context = failing_context(&p->alloc);
  struct engine *e = &p->engine;
  *e = (struct engine){.context = context};
  engine_options_default(&e->options);
  assert_ok(context, backend_create_cpu(context, &e->backend));
  assert_ok(context, model_load(context, e->backend, path, &e->model));
  oscar_cache_options cache;
  e->options.context = 512;
  e->options.chunk = 64;
  e->options.recent_tokens = 64;
  assert_ok(context, engine_cache_options(context, e->model, &e->options, NULL, &cache));
  cache.budget_bytes = oscar_cache_bytes_for(&cache, 512, 2, 64);
  assert_ok(context, oscar_cache_create(context, &cache, &e->cache));
  assert_ok(context, runner_create(e->model, e->cache, 64, &e->runner));
}

/* Returns how many of the answers had no memory. */
static int serve_some(struct service *service) {
  struct client c[4];
  struct service_error error;
  int32_t ids[150];
  int failed = 0;
  some_ids(1, 150, ids);
  for (int i = 0; i < 4; i++) {
    struct request_options o = client_options(ids, 150 - 20 * i, 70);
    o.session = i == 0 ? "a" : NULL;
    o.session_text = i == 0 ? "text" : NULL;
    o.choices = i == 1 ? 2 : 1;
    o.logprobs = i == 2 ? 3 : -1;
    client_submit(service, &c[i], o);
  }
  for (int i = 0; i < 4; i++) {
    client_wait(&c[i]);
    for (int k = 0; k < c[i].choices; k++) {
      const struct client_answer *a = &c[i].answers[k];
      assert_true(a->reason == FINISH_LENGTH || (a->reason == FINISH_ERROR && a->status == OSCAR_NO_MEMORY && a->error[0]));
      failed += a->reason == FINISH_ERROR;
    }
  }
  int32_t *tokens = NULL;
  int n;
  (void)service_session_tokens(service, "a", &tokens, &n, &error);
  free(tokens);
  for (int i = 0; i < 4; i++) client_clear(&c[i]);
  return failed;
}

static void memory_may_run_out_at_any_moment(void **state) {
  (void)state;
  struct small_model model;
  static struct parts p;
  struct service_options options;
  int created = 0, failed = 0, whole = 0;
  small_model_make(&model, "llama", false, 11);
  service_options_default(&options);
  options.max_running = 4;
  options.speculation = SPECULATION_LOOKUP;
  for (long n = 0; whole < 2 && n < 4000; n += n < 30 ? 1 : n < 200 ? 5 : 37) {
    struct service *service;
    open_parts(&p, model.path);
    p.alloc.until_failure = n;
    if (service_create(&p.engine, &options, &service) == OSCAR_OK) {
      const int without = serve_some(service);
      created++;
      failed += without > 0;
      whole += p.alloc.failures == 0;
      service_free(service);
    }
    p.alloc.until_failure = -1;
    assert_ok(p.engine.context, oscar_cache_check(p.engine.cache));
    runner_free(p.engine.runner);
    oscar_cache_free(p.engine.cache);
    model_free(p.engine.model);
    p.engine.backend->ops->free(p.engine.backend);
    failing_context_free(p.engine.context, &p.alloc);
  }
  printf("  %d services, %d with answers that had no memory\n", created, failed);
  assert_true(failed > 0 && whole > 0);
  small_model_free(&model);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(memory_may_run_out_at_any_moment)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
