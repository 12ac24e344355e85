/* Tens of thousands of random operations against the model, in roomy and in tight budgets. */
#include "support.h"

static void random_operations_agree_with_the_model(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(geometries); i++)
    for (int tight = 0; tight < 3; tight++) {
      const int operations = geometries[i].head_dim < 64 ? 2000 : 400; /* what takes time is the reference encoder */
      struct world w;
      uint64_t random = i * 3 + (uint64_t)tight;
      oscar_context *context = test_context(OSCAR_ISA_AUTO, 1);
      world_open(&w, context, &geometries[i], tight == 0 ? MODEL_TOKENS : 400, tight == 2 ? 2 : 4, 200);
      for (int n = 0; n < operations; n++) {
        operate(&w, choose_random, &random);
        assert_ok(context, oscar_cache_check(w.cache));
        if (n % 500 == 499) compare_all(&w);
      }
      compare_all(&w);
      for (size_t s = 0; s < ARRAY_LENGTH(w.twins); s++) {
        if (w.twins[s]) twin_free(w.twins[s]);
        w.twins[s] = NULL;
      }
      assert_int_equal(usage_of(&w).held_bytes, 0);
      assert_int_equal(usage_of(&w).exact_pages + usage_of(&w).coded_pages, 0);
      close_world(&w);
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(random_operations_agree_with_the_model)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
