/* KL divergence and log sums against their definitions in long double; the whole evaluation on the default model against what
 * must hold. */
#include "support.h"

#include "engine/logits.h"
#include "eval/eval.h"

static void divergence_is_its_definition(void **state) {
  (void)state;
  enum { VOCAB = 1000 };
  uint64_t seed = 1;
  for (int round = 0; round < 20; round++) {
    static float a[VOCAB], b[VOCAB], p[VOCAB];
    const float spread = (float)(round + 1);
    for (int i = 0; i < VOCAB; i++) {
      a[i] = spread * test_normal(&seed);
      b[i] = a[i] + 0.1f * (float)round * test_normal(&seed);
    }
    long double za = 0, zb = 0, kl = 0;
    for (int i = 0; i < VOCAB; i++) {
      za += expl((long double)a[i]);
      zb += expl((long double)b[i]);
    }
    for (int i = 0; i < VOCAB; i++) {
      long double pi = expl((long double)a[i]) / za;
      p[i] = (float)pi;
      kl += pi * (((long double)a[i] - logl(za)) - ((long double)b[i] - logl(zb)));
    }
    double log_a, log_b;
    int32_t best;
    logits_summary(a, VOCAB, &log_a, &best);
    for (int i = 0; i < VOCAB; i++) assert_true(a[i] <= a[best]);
    logits_summary(b, VOCAB, &log_b, &best);
    assert_true(fabs(log_a - (double)logl(za)) < 1e-6 * (1 + fabs(log_a)));
    assert_true(fabs(logits_divergence(p, a, log_a, b, log_b, VOCAB) - (double)kl) < 2e-6 * (1 + spread));
  }
}

static void equal_rows_have_no_divergence_and_ties_go_to_the_lowest_id(void **state) {
  (void)state;
  const float x[4] = {1, 3, 3, 2}, p[4] = {0.0723f, 0.5346f, 0.5346f, 0.1966f};
  double log_sum;
  int32_t best;
  logits_summary(x, 4, &log_sum, &best);
  assert_int_equal(best, 1);
  assert_true(logits_divergence(p, x, log_sum, x, log_sum, 4) == 0);
}

static void caches_rank_as_they_must(void **state) {
  (void)state;
  const char *path = test_model("smollm2-135m");
  if (!path) skip();
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 0);
  struct backend *backend;
  struct model *model;
  assert_ok(c, backend_create_cpu(c, &backend));
  assert_ok(c, model_load(c, backend, path, &model));
  static const char *const kv[] = {"int8", "bf16", "q4_0", "int2-hadamard", "int2-plain"};
  enum { TYPES = ARRAY_LENGTH(kv) };
  oscar_codec_set *sets[TYPES] = {NULL};
  for (int i = 0; i < TYPES; i++)
    if (strcmp(kv[i], "q4_0") != 0) assert_ok(c, codec_set_obtain(model, kv[i], NULL, NULL, &sets[i]));
  size_t bytes;
  const char *text = calibration_text(&bytes);
  int32_t *ids;
  int count;
  assert_ok(c, tokenizer_encode(model_tokenizer(model), text, bytes, false, &ids, &count));
  struct eval_options options;
  eval_options_default(&options);
  options.context = 768;
  const int windows = rounds(1, 2);
  options.tokens = 850 * windows;
  struct eval_result r;
  assert_ok(c, eval_perplexity(model, &options, ids, count, TYPES, kv, sets, NULL, &r));
  assert_int_equal(r.tokens, 768 * windows);
  assert_int_equal(r.scored, windows * 767);
  assert_int_equal(r.counted, windows * (768 - 384));
  assert_int_equal(r.runs, TYPES); /* bf16 once */
  assert_string_equal(r.run[0].kv, "bf16");
  assert_true(r.run[0].kld_max == 0 && r.run[0].top1 == 1 && r.run[0].ppl_ratio == 1);
  assert_true(r.run[0].bits_per_element >= 16 && r.run[0].bits_per_element < 17);
  for (int i = 1; i < TYPES; i++) {
    const struct eval_run *a = &r.run[i];
    printf("  %-14s KL %.5f, top-1 %.3f, ppl x %.4f, %.3f bits\n", a->kv, a->kld_mean, a->top1, a->ppl_ratio,
           a->bits_per_element);
    assert_true(a->kld_mean > r.run[i - 1].kld_mean);
    assert_true(a->kld_p99 >= a->kld_mean && a->kld_max >= a->kld_p99 && a->kld_se > 0);
    assert_true(a->cache_bytes < r.run[0].cache_bytes);
  }
  assert_true(r.run[1].kld_mean < 0.005);
  assert_true(r.run[2].bits_per_element == (16 + 4.5) / 2); /* 6 pages of 12 are exact */
  eval_result_free(c, &r);

  options.context = 384; /* no position of it reads codes */
  assert_int_equal(eval_perplexity(model, &options, ids, count, TYPES, kv, sets, NULL, &r), OSCAR_INVALID_ARGUMENT);
  options.context = 768;
  assert_int_equal(eval_perplexity(model, &options, ids, 700, TYPES, kv, sets, NULL, &r), OSCAR_INVALID_ARGUMENT);
  for (int i = 0; i < TYPES; i++) oscar_codec_set_free(sets[i]);
  mem_free(c, ids);
  model_free(model);
  backend->ops->free(backend);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(divergence_is_its_definition),
                                     cmocka_unit_test(equal_rows_have_no_divergence_and_ties_go_to_the_lowest_id),
                                     cmocka_unit_test(caches_rank_as_they_must)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
