/* The diagnostics of the default model against what must hold. */
#include "support.h"

#include "eval/diagnostics.h"

static void a_model_is_measured_head_by_head(void **state) {
  (void)state;
  const char *path = test_model("smollm2-135m");
  if (!path) skip();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 0);
  struct backend *backend;
  struct model *model;
  assert_ok(c, backend_create_cpu(c, &backend));
  assert_ok(c, model_load(c, backend, path, &model));
  static const char *const kv[] = {"int8", "bf16", "int2-hadamard", "int2-plain"};
  oscar_codec_set *sets[4] = {NULL};
  for (int i = 0; i < 4; i++) assert_ok(c, codec_set_obtain(model, kv[i], NULL, NULL, &sets[i]));
  size_t bytes;
  const char *text = calibration_text(&bytes);
  int32_t *ids;
  int count;
  assert_ok(c, tokenizer_encode(model_tokenizer(model), text, bytes, false, &ids, &count));
  struct diagnose_options options;
  diagnose_options_default(&options);
  options.context = 500; /* the last page is not full */
  options.tokens = 1000;
  options.chunk = 96;
  struct diagnose_result r;
  assert_ok(c, eval_diagnose(model, &options, ids, count, 4, kv, sets, NULL, &r));
  assert_int_equal(r.tokens, 1000);
  assert_int_equal(r.samples, 2 * 7); /* 399, 415, ... 495 of both windows */
  assert_int_equal(r.count, 3);
  double previous = 1e9;
  for (int i = 0; i < r.count; i++) {
    double mean = 0;
    for (int layer = 0; layer < r.layers; layer++) {
      const struct head_sums sums = diagnose_layer(&r, i, layer);
      const struct head_errors e = head_errors_of(&sums);
      assert_int_equal(sums.queries, r.samples * r.query_heads);
      assert_true(isfinite(e.logit_snr) && isfinite(e.output_snr_both) && e.coded_mass > 0 && e.coded_mass < 0.9);
      mean += e.output_snr_both / r.layers;
    }
    printf("  %-14s output %.1f dB\n", r.kv[i], mean);
    assert_true(mean < previous - 1);
    previous = mean;
  }
  assert_true(r.crumbs[0] == 4 && r.crumbs[(size_t)r.layers * (size_t)r.head_dim] == 1);
  for (int i = 0; i + 1 < r.head_dim; i++) assert_true(r.eigenvalues[i] >= r.eigenvalues[i + 1]);
  assert_true(r.eigenvalues[0] > 0);
  diagnose_result_free(c, &r);

  options.context = 384; /* no position of it reads codes */
  assert_int_equal(eval_diagnose(model, &options, ids, count, 4, kv, sets, NULL, &r), OSCAR_INVALID_ARGUMENT);
  options.context = 500;
  assert_int_equal(eval_diagnose(model, &options, ids, 400, 4, kv, sets, NULL, &r), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(eval_diagnose(model, &options, ids, count, 1, kv + 1, sets + 1, NULL, &r), OSCAR_INVALID_ARGUMENT);
  for (int i = 0; i < 4; i++) oscar_codec_set_free(sets[i]);
  mem_free(c, ids);
  model_free(model);
  backend->ops->free(backend);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(a_model_is_measured_head_by_head)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
