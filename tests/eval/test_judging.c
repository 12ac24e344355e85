/* Judging answers at their edges; intervals and tests against published or hand-made numbers. */
#include "support.h"

#include "eval/answer.h"
#include "eval/statistics.h"

static const char number[][ANSWER_WORD] = {"7301945"};
static const char numbers[][ANSWER_WORD] = {"1111111", "2222222", "3333333"};
static const char names[][ANSWER_WORD] = {"QXZPA", "LMTEB"};
static const char id[][ANSWER_WORD] = {"3f2a9c1e-7b4d-42a0"};

#define JUDGE(shape, text, ended, expected) answer_judge(shape, text, strlen(text), ended, (int)ARRAY_LENGTH(expected), expected)

static void expect_right(enum word_shape shape, const char *text, int count, const char (*expected)[ANSWER_WORD], bool right) {
  const struct answer_state s = answer_judge(shape, text, strlen(text), true, count, expected);
  if (!s.decided || s.right != right) fail_msg("judged wrongly: %s", text);
}

static void a_value_counts_as_a_whole_word_only(void **state) {
  (void)state;
  static const char *const right[] = {" 7301945",    "7301945.",  "The number is: **7301945**\n", "(7301945), not 1234567",
                                      "\"7301945\"", "42 7301945" /* two digits are no candidate */};
  static const char *const wrong[] = {"",         " 730194",          " 73019456", "7,301,945",      "730 1945",    "x7301945",
                                      "7301945_", "1234567, 7301945", "7301944",   "I do not know.", "1234 7301945"};
  for (size_t i = 0; i < ARRAY_LENGTH(right); i++) expect_right(WORD_DIGITS, right[i], 1, number, true);
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) expect_right(WORD_DIGITS, wrong[i], 1, number, false);
}

static void all_values_must_be_given_before_a_wrong_one(void **state) {
  (void)state;
  expect_right(WORD_DIGITS, "3333333, 1111111 and 2222222.", 3, numbers, true);
  expect_right(WORD_DIGITS, "1. 3333333\n2. 1111111\n3. 1111111\n4. 2222222\n5. 9999999", 3, numbers, true);
  expect_right(WORD_DIGITS, "3333333, 1111111", 3, numbers, false);
  expect_right(WORD_DIGITS, "3333333, 9999999, 1111111, 2222222", 3, numbers, false);
  expect_right(WORD_NAME, "VAR LMTEB, VAR QXZPA", 2, names, true);
  expect_right(WORD_NAME, "LMTEB and QXZP", 2, names, false);
  expect_right(WORD_NAME, "LMTEB QXZPAB", 2, names, false);
  expect_right(WORD_NAME, "Lmteb, LMTEB, QXZPA", 2, names, true); /* no candidate: small letters */
  expect_right(WORD_ID, " \"3f2a9c1e-7b4d-42a0\".", 1, id, true);
  expect_right(WORD_ID, "a well-known key: 3f2a9c1e-7b4d-42a0", 1, id, true);
  expect_right(WORD_ID, "3f2a9c1e-7b4d-42a1", 1, id, false);
  expect_right(WORD_ID, "3f2a9c1e-7b4d-42a", 1, id, false);
  expect_right(WORD_ID, "3f2a9c1e-7b4d", 1, id, false);
}

static void an_answer_is_decided_as_soon_as_it_can_be(void **state) {
  (void)state;
  assert_false(JUDGE(WORD_DIGITS, " 7301945", false, number).decided); /* another digit may follow */
  assert_true(JUDGE(WORD_DIGITS, " 7301945.", false, number).right);
  assert_true(JUDGE(WORD_DIGITS, " 7301945.", false, number).decided);
  assert_false(JUDGE(WORD_DIGITS, " 1234567", false, number).decided);
  assert_true(JUDGE(WORD_DIGITS, " 1234567 ", false, number).decided);
  assert_false(JUDGE(WORD_DIGITS, " 1234567 ", false, number).right);
  assert_false(JUDGE(WORD_DIGITS, "", false, number).decided);
  assert_true(JUDGE(WORD_DIGITS, "", true, number).decided);
  assert_false(JUDGE(WORD_DIGITS, "3333333, 1111111, ", false, numbers).decided);
}

/* Table I of R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998),
 * method 3. */
static void intervals_are_the_published_ones(void **state) {
  (void)state;
  static const struct {
    int successes, trials;
    double low, high;
  } known[] = {{81, 263, 0.2553, 0.3662}, {15, 148, 0.0624, 0.1605}, {0, 20, 0.0000, 0.1611}, {1, 29, 0.0061, 0.1718}};
  for (size_t i = 0; i < ARRAY_LENGTH(known); i++) {
    double low, high, mirrored_low, mirrored_high;
    wilson_interval(known[i].successes, known[i].trials, &low, &high);
    assert_true(fabs(low - known[i].low) < 5e-5 && fabs(high - known[i].high) < 5e-5);
    wilson_interval(known[i].trials - known[i].successes, known[i].trials, &mirrored_low, &mirrored_high);
    assert_true(fabs(low - (1 - mirrored_high)) < 1e-12 && fabs(high - (1 - mirrored_low)) < 1e-12);
  }
  double low, high;
  wilson_interval(20, 20, &low, &high);
  assert_true(high == 1);
  wilson_interval(0, 0, &low, &high);
  assert_true(low == 0 && high == 1);
}

static void paired_results_are_tested_exactly(void **state) {
  (void)state;
  assert_true(mcnemar_p(0, 0) == 1);
  assert_true(fabs(mcnemar_p(5, 5) - 1) < 1e-12);
  assert_true(fabs(mcnemar_p(1, 9) - 22.0 / 1024) < 1e-12); /* 2 (1 + 10) / 2^10 */
  assert_true(fabs(mcnemar_p(9, 1) - 22.0 / 1024) < 1e-12);
  assert_true(fabs(mcnemar_p(0, 6) - 2.0 / 64) < 1e-12);
  assert_true(mcnemar_p(0, 100) < 1e-29);
}

static void signs_are_flipped_in_all_ways(void **state) {
  (void)state;
  assert_true(sign_flip_p(NULL, 0) == 1);
  const double alike[5] = {1, 2, 0.5, 3, 1};
  assert_true(fabs(sign_flip_p(alike, 5) - 2.0 / 32) < 1e-12); /* all or none flipped */
  const double mixed[3] = {1, -1,
                           4}; /* |sum| is 4 or more in 6 of 8 ways: (+-1, +-1, +-4) but for those that cancel 4 down to 2 */
  assert_true(fabs(sign_flip_p(mixed, 3) - 6.0 / 8) < 1e-12);
  const double zero[2] = {0, 0};
  assert_true(sign_flip_p(zero, 2) == 1);
  double many[100];
  for (int i = 0; i < 100; i++) many[i] = i % 2 ? 1 : -1;
  assert_true(sign_flip_p(many, 100) > 0.99);
  for (int i = 0; i < 100; i++) many[i] = i < 50 ? 1 : -0.2;
  assert_true(sign_flip_p(many, 100) < 0.001 && sign_flip_p(many, 100) > 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_value_counts_as_a_whole_word_only),       cmocka_unit_test(all_values_must_be_given_before_a_wrong_one),
      cmocka_unit_test(an_answer_is_decided_as_soon_as_it_can_be), cmocka_unit_test(intervals_are_the_published_ones),
      cmocka_unit_test(paired_results_are_tested_exactly),         cmocka_unit_test(signs_are_flipped_in_all_ways)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
