/* The service on whole models: real codecs, some with means that turn; answers together are those of each alone. */
#include "service_client.h"

enum { COUNT = 4 };
static const int lengths[COUNT] = {40, 130, 450, 300};

static void open_model(struct rig *r, const char *path, int threads, oscar_prefix_reuse reuse) {
  char error[512];
  struct engine_options options;
  struct service_options service;
  engine_options_default(&options);
  options.model_path = path;
  options.context = 1024;
  options.threads = threads;
  options.chunk = threads == 1 ? 200 : 512;
  options.kv_memory_bytes = (size_t)256 << 20;
  if (engine_open(&options, &r->engine, error, sizeof error) != OSCAR_OK) fail_msg("%s", error);
  service_options_default(&service);
  service.reuse = reuse;
  assert_ok(r->engine.context, service_create(&r->engine, &service, &r->service));
}

static void run_all(struct rig *r, int32_t *const *ids, bool together, struct client *clients) {
  for (int i = 0; i < COUNT; i++) {
    client_submit(r->service, &clients[i], client_options(ids[i], lengths[i], 16));
    if (!together) client_wait(&clients[i]);
  }
  for (int i = 0; i < COUNT; i++) client_wait(&clients[i]);
}

static void check_model(const char *name) {
  struct rig r;
  struct client alone[COUNT], together[COUNT];
  int32_t *ids[COUNT];
  int n[COUNT];
  size_t bytes;
  const char *path = test_model(name), *text = calibration_text(&bytes);
  if (!path) skip();
  open_model(&r, path, 2, OSCAR_PREFIX_OFF);
  for (int i = 0; i < COUNT; i++) {
    assert_ok(r.engine.context, tokenizer_encode(model_tokenizer(r.engine.model), text + 5000 * i, 4000, false, &ids[i], &n[i]));
    assert_true(n[i] >= lengths[i]);
  }
  run_all(&r, ids, false, alone);
  service_free(r.service);
  engine_close(&r.engine); /* ids are libc's where the context is not told otherwise */
  open_model(&r, path, 1, OSCAR_PREFIX_EXACT);
  run_all(&r, ids, true, together);
  for (int i = 0; i < COUNT; i++) {
    assert_int_equal(alone[i].answers[0].n, 16);
    assert_int_equal(together[i].answers[0].n, 16);
    assert_memory_equal(alone[i].answers[0].ids, together[i].answers[0].ids, 16 * sizeof(int32_t));
  }
  for (int i = 0; i < COUNT; i++) {
    mem_free(r.engine.context, ids[i]);
    client_clear(&alone[i]);
    client_clear(&together[i]);
  }
  service_free(r.service);
  engine_close(&r.engine);
}

static void answers_of_smollm2(void **state) {
  (void)state;
  check_model("smollm2-135m");
}

static void answers_of_a_model_with_turning_means(void **state) {
  (void)state;
  check_model("qwen2.5-coder-0.5b");
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(answers_of_smollm2)};
  const struct CMUnitTest larger[] = {cmocka_unit_test(answers_of_a_model_with_turning_means)};
  return test_larger(argc, argv) ? cmocka_run_group_tests(larger, NULL, NULL) : cmocka_run_group_tests(tests, NULL, NULL);
}
