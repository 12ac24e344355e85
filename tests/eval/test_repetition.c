/* Repetition of sequences made by hand; of random ones, against the definitions taken word by word. */
#include "support.h"

#include "eval/repetition.h"

static void hand_made_sequences_have_the_numbers_worked_out_by_hand(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct repetition r;
  /* all different */
  const int32_t different[6] = {5, 3, 9, 1, 7, 2};
  assert_ok(c, repetition_of(c, different, 6, &r));
  assert_true(r.repeated_4 == 0 && r.distinct_1 == 1 && r.distinct_2 == 1 && r.longest == 0 && r.loop_period == 0);
  /* 1 2 3 4 1 2 3 4: of five 4-grams the last is the first again; 4 of 8 tokens, 4 of 7 pairs; "1 2 3 4" twice */
  const int32_t twice[8] = {1, 2, 3, 4, 1, 2, 3, 4};
  assert_ok(c, repetition_of(c, twice, 8, &r));
  assert_true(fabs(r.repeated_4 - 1.0 / 5) < 1e-12 && r.distinct_1 == 0.5 && fabs(r.distinct_2 - 4.0 / 7) < 1e-12);
  assert_true(r.longest == 4 && r.loop_period == 0); /* twice is no loop */
  /* one token 40 times: one 4-gram of 37; the stretch of 39 overlaps itself; a loop of period 1 */
  int32_t same[40] = {0};
  assert_ok(c, repetition_of(c, same, 40, &r));
  assert_true(fabs(r.repeated_4 - 36.0 / 37) < 1e-12 && r.longest == 39 && r.loop_period == 1 && r.loop_tokens == 40);
  /* fewer than LOOP_TOKENS are no loop */
  assert_ok(c, repetition_of(c, same, 31, &r));
  assert_int_equal(r.loop_period, 0);
  /* too short for any 4-gram; nothing at all */
  assert_ok(c, repetition_of(c, twice, 3, &r));
  assert_true(r.repeated_4 == 0 && r.distinct_1 == 1 && r.longest == 0);
  assert_ok(c, repetition_of(c, twice, 0, &r));
  assert_true(r.repeated_4 == 0 && r.distinct_1 == 1 && r.distinct_2 == 1 && r.longest == 0);
  oscar_context_free(c);
}

static void a_loop_is_seen_at_the_end_only(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct repetition r;
  int32_t ids[100];
  for (int i = 0; i < 100; i++) ids[i] = i < 50 ? 1000 + i : i % 12; /* 50 tokens of a period of 12: more than 3 times */
  assert_ok(c, repetition_of(c, ids, 100, &r));
  assert_int_equal(r.loop_period, 12);
  assert_int_equal(r.loop_tokens, 50);
  assert_int_equal(r.longest, 38);
  ids[99] = 5000; /* the loop was left */
  assert_ok(c, repetition_of(c, ids, 100, &r));
  assert_int_equal(r.loop_period, 0);
  for (int i = 0; i < 100; i++) ids[i] = i < 65 ? 1000 + i : i % 12; /* 35 tokens: less than 3 times */
  assert_ok(c, repetition_of(c, ids, 100, &r));
  assert_int_equal(r.loop_period, 0);
  oscar_context_free(c);
}

static int first_place(const int32_t *ids, int at, int n) {
  for (int i = 0; i < at; i++)
    if (memcmp(ids + i, ids + at, (size_t)n * sizeof *ids) == 0) return i;
  return at;
}

static double distinct(const int32_t *ids, int count, int n) {
  int new = 0;
  for (int i = 0; i + n <= count; i++) new += first_place(ids, i, n) == i;
  return (double)new / (count - n + 1);
}

static void random_sequences_have_the_numbers_of_the_definition(void **state) {
  (void)state;
  enum { N = 300 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  uint64_t seed = 5;
  for (int round = 0; round < 20; round++) {
    int32_t ids[N];
    for (int i = 0; i < N; i++) ids[i] = (int32_t)(test_random(&seed) % (uint64_t)(2 + round)) - 1;
    int longest = 0;
    for (int i = 0; i < N; i++)
      for (int j = i + 1; j < N; j++) {
        int n = 0;
        while (j + n < N && ids[i + n] == ids[j + n]) n++;
        if (n > longest) longest = n;
      }
    struct repetition r;
    assert_ok(c, repetition_of(c, ids, N, &r));
    assert_int_equal(r.longest, longest);
    assert_true(fabs(r.repeated_4 - (1 - distinct(ids, N, 4))) < 1e-12);
    assert_true(fabs(r.distinct_1 - distinct(ids, N, 1)) < 1e-12 && fabs(r.distinct_2 - distinct(ids, N, 2)) < 1e-12);
  }
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(hand_made_sequences_have_the_numbers_worked_out_by_hand),
                                     cmocka_unit_test(a_loop_is_seen_at_the_end_only),
                                     cmocka_unit_test(random_sequences_have_the_numbers_of_the_definition)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
