/* The sampler against probabilities computed the plain way: sort everything, softmax in long double, cut, renormalize. */
#include "failing_alloc.h"
#include "support.h"

#include "backend/backend.h"
#include "engine/sampler.h"

#include <oscar/cuda.h>

#define FILTERS(temperature_, top_k_, top_p_, min_p_, seed_)                                                                     \
  { .temperature = temperature_, .top_k = top_k_, .top_p = top_p_, .min_p = min_p_, .seed = seed_ }

static const struct sampler_options everything = {.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 1};

static struct sampler *make(oscar_context *c, struct sampler_options options, int vocab) {
  struct sampler *s;
  assert_ok(c, sampler_create(c, &options, vocab, &s));
  return s;
}

static const float *order_logits;
static int by_logit(const void *a, const void *b) {
  int x = *(const int *)a, y = *(const int *)b;
  if (order_logits[x] != order_logits[y]) return order_logits[x] < order_logits[y] ? 1 : -1;
  return x - y;
}

/* The definition: top-k, then top-p of what is left (probabilities at temperature 1), then min-p, then temperature. */
static void expected(const struct sampler_options *o, const float *logits, int vocab, double *probability) {
  int *order = malloc((size_t)vocab * sizeof *order), n = 0;
  long double *p = malloc((size_t)vocab * sizeof *p), sum = 0;
  for (int i = 0; i < vocab; i++) {
    probability[i] = 0;
    if (isfinite(logits[i])) order[n++] = i;
  }
  order_logits = logits;
  qsort(order, (size_t)n, sizeof *order, by_logit);
  if (o->top_k && o->top_k < n) n = o->top_k;
  for (int i = 0; i < n; i++) sum += p[i] = expl((long double)logits[order[i]] - (long double)logits[order[0]]);
  if (o->top_p < 1) {
    long double reached = 0;
    int kept = 0;
    while (kept < n && (kept == 0 || reached < (long double)o->top_p)) reached += p[kept++] / sum;
    n = kept;
  }
  for (int i = 1; i < n; i++)
    if (p[i] < (long double)o->min_p) n = i;
  sum = 0;
  for (int i = 0; i < n; i++)
    sum += p[i] = expl(((long double)logits[order[i]] - (long double)logits[order[0]]) / (long double)o->temperature);
  for (int i = 0; i < n; i++) probability[order[i]] = (double)(p[i] / sum);
  free(order);
  free(p);
}

/* The chi-square quantile of 1 - 1e-5 by Wilson and Hilferty; seeds are fixed, so a pass stays a pass. */
static double chi_square_limit(int freedom) {
  double f = freedom, z = 4.2649;
  return f * pow(1 - 2 / (9 * f) + z * sqrt(2 / (9 * f)), 3);
}

static void check_distribution(oscar_context *c, struct sampler_options options, const float *logits, int vocab) {
  enum { DRAWS = 10000 };
  double *probability = malloc((size_t)vocab * sizeof *probability), statistic = 0, rare = 0;
  int *seen = calloc((size_t)vocab, sizeof *seen), rare_seen = 0, cells = 0;
  expected(&options, logits, vocab, probability);
  struct sampler *s = make(c, options, vocab);
  for (int i = 0; i < DRAWS; i++) {
    int32_t id = -1;
    assert_ok(c, sampler_next(s, logits, &id));
    assert_in_range(id, 0, vocab - 1);
    seen[id]++;
  }
  for (int i = 0; i < vocab; i++) {
    double want = probability[i] * DRAWS;
    if (want == 0) {
      assert_int_equal(seen[i], 0);
    } else if (want < 8) { /* too few for the approximation: one cell together */
      rare += want;
      rare_seen += seen[i];
    } else {
      statistic += (seen[i] - want) * (seen[i] - want) / want;
      cells++;
    }
  }
  if (rare >= 8) {
    statistic += (rare_seen - rare) * (rare_seen - rare) / rare;
    cells++;
  }
  if (cells > 1 && statistic > chi_square_limit(cells - 1))
    fail_msg("chi-square %.1f over %d cells (top-k %d, top-p %g, min-p %g, temperature %g)", statistic, cells, options.top_k,
             (double)options.top_p, (double)options.min_p, (double)options.temperature);
  sampler_free(s);
  free(seen);
  free(probability);
}

static void draws_follow_the_exact_probabilities(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  float logits[300];
  uint64_t random = 5;
  for (int i = 0; i < 300; i++) logits[i] = 2 * test_normal(&random);
  logits[17] = NAN;
  logits[18] = -INFINITY;
  logits[19] = INFINITY;
  for (int i = 100; i < 110; i++) logits[i] = 4.0f; /* ties, also across the cuts below */
  static const struct sampler_options cases[] = {
      FILTERS(1, 0, 1, 0, 1),
      FILTERS(0.5f, 0, 1, 0, 2),
      FILTERS(1.7f, 0, 1, 0, 3),
      FILTERS(1, 5, 1, 0, 4),
      FILTERS(1, 40, 1, 0, 5),
      FILTERS(1, 0, 0.5f, 0, 6),
      FILTERS(1, 0, 0.95f, 0, 7),
      FILTERS(1, 0, 1, 0.2f, 8),
      FILTERS(0.8f, 40, 0.95f, 0.05f, 9),
      FILTERS(0.8f, 40, 0.3f, 0.05f, 10),
      FILTERS(0.8f, 40, 0.95f, 0.6f, 11),
      FILTERS(2, 299, 0.99f, 0.001f, 12),
      FILTERS(1, 1000, 0.7f, 0, 13),
      FILTERS(1, 297, 1, 0, 14),
  };
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) check_distribution(c, cases[i], logits, 300);
  oscar_context_free(c);
}

static void extreme_logits_are_drawn_correctly(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  const float flat[] = {-3e38f, -3e38f, -3e38f, -3e38f}, spread[] = {3e38f, -3e38f, 0, 3e38f}, tiny[] = {1e-38f, 0, -1e-38f};
  check_distribution(c, everything, flat, 4);
  check_distribution(c, everything, spread, 4);
  check_distribution(c, everything, tiny, 3);
  struct sampler_options hot = everything, cold = everything;
  hot.temperature = 1e30f;
  cold.temperature = 1e-30f;
  check_distribution(c, hot, (const float[]){5, 0, -5}, 3);
  check_distribution(c, cold, (const float[]){5, 4.999f, 5, -5}, 4);
  oscar_context_free(c);
}

/* Every finite set of options keeps at least the best token. */
static void edges_of_the_filters_keep_the_best(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  const float logits[] = {0.5f, 3, -1, 3, 2.9f};
  static const struct sampler_options only_best[] = {FILTERS(0, 0, 1, 0, 1),       FILTERS(0, 40, 0.95f, 0.05f, 1),
                                                     FILTERS(1, 1, 1, 0, 1),       FILTERS(5, 0, 0, 0, 1),
                                                     FILTERS(5, 1, 0.5f, 0.5f, 1), FILTERS(5, 3, 0, 1, 1)};
  for (size_t i = 0; i < ARRAY_LENGTH(only_best); i++) {
    struct sampler *s = make(c, only_best[i], 5);
    for (int k = 0; k < 100; k++) {
      int32_t id = -1;
      assert_ok(c, sampler_next(s, logits, &id));
      assert_int_equal(id, 1); /* of the two best the one with the lower id */
    }
    sampler_free(s);
  }
  /* min-p 1 keeps what is exactly as likely as the best: both */
  check_distribution(c, (struct sampler_options)FILTERS(1, 0, 1, 1, 3), logits, 5);
  check_distribution(c, (struct sampler_options)FILTERS(1, 4, 1, 1, 4), logits, 5);
  check_distribution(c, (struct sampler_options)FILTERS(1, 4, 0.99f, 1, 4), logits, 5);
  check_distribution(c, everything, logits, 1);
  oscar_context_free(c);
}

/* 0.4 + 0.3 reach 0.7 exactly or not by rounding; one step on either side must not depend on it. */
static void top_p_keeps_the_token_that_crosses_it(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  float logits[4];
  const double p[4] = {0.1, 0.4, 0.2, 0.3};
  for (int i = 0; i < 4; i++) logits[i] = (float)log(p[i]);
  static const struct {
    float top_p;
    int kept;
  } cases[] = {{0.39f, 1}, {0.41f, 2}, {0.69f, 2}, {0.71f, 3}, {0.89f, 3}, {0.91f, 4}, {1, 4}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct sampler *s = make(c, (struct sampler_options)FILTERS(1, 0, cases[i].top_p, 0, 9), 4);
    unsigned seen = 0;
    for (int k = 0; k < 1000; k++) {
      int32_t id;
      assert_ok(c, sampler_next(s, logits, &id));
      seen |= 1u << id;
    }
    static const unsigned sets[] = {0, 1u << 1, 1u << 1 | 1u << 3, 1u << 1 | 1u << 3 | 1u << 2, 15};
    assert_int_equal(seen, sets[cases[i].kept]);
    sampler_free(s);
  }
  oscar_context_free(c);
}

static void greedy_takes_the_lowest_of_equals_and_no_broken_logit(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct sampler_options greedy = everything;
  greedy.temperature = 0;
  struct sampler *s = make(c, greedy, 6);
  int32_t id;
  assert_ok(c, sampler_next(s, (const float[]){NAN, -1, INFINITY, 2, 2, -INFINITY}, &id));
  assert_int_equal(id, 3);
  assert_ok(c, sampler_next(s, (const float[]){-0.0f, 0.0f, -0.0f, 0, 0, 0}, &id));
  assert_int_equal(id, 0);
  assert_ok(c, sampler_next(s, (const float[]){NAN, NAN, NAN, NAN, NAN, -3e38f}, &id));
  assert_int_equal(id, 5);
  sampler_free(s);
  oscar_context_free(c);
}

static void nothing_finite_is_an_error(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  const float broken[] = {NAN, INFINITY, -INFINITY};
  for (int t = 0; t < 2; t++) {
    struct sampler_options options = everything;
    options.temperature = (float)t;
    struct sampler *s = make(c, options, 3);
    int32_t id = 77;
    assert_int_equal(sampler_next(s, broken, &id), OSCAR_NUMERIC);
    assert_int_equal(id, 77);
    assert_ok(c, sampler_next(s, (const float[]){NAN, 0, NAN}, &id)); /* and it works again */
    assert_int_equal(id, 1);
    sampler_free(s);
  }
  oscar_context_free(c);
}

static void a_seed_fixes_the_ids(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  float logits[1000];
  uint64_t random = 11;
  for (int i = 0; i < 1000; i++) logits[i] = test_normal(&random);
  struct sampler_options options;
  sampler_options_default(&options);
  options.seed = 42;
  struct sampler *a = make(c, options, 1000), *b = make(c, options, 1000);
  options.seed = 43;
  struct sampler *other = make(c, options, 1000);
  int same = 0;
  for (int i = 0; i < 500; i++) {
    int32_t x, y, z;
    assert_ok(c, sampler_next(a, logits, &x));
    assert_ok(c, sampler_next(b, logits, &y));
    assert_ok(c, sampler_next(other, logits, &z));
    assert_int_equal(x, y);
    same += x == z;
  }
  assert_in_range(same, 0, 100); /* 40 candidates: about 1 in 30 by chance */
  sampler_free(a);
  sampler_free(b);
  sampler_free(other);

  /* Equal weights show the generator itself: floor(256 * its first outputs / 2^64), seed 0. Computed with the published C code
   * of splitmix64 and xoshiro256++. */
  static const int32_t published[] = {83, 97, 92, 2, 126, 5, 219, 216, 75, 19, 80, 16, 26, 24, 16, 102};
  float equal[256] = {0};
  struct sampler_options zero = everything;
  zero.seed = 0;
  struct sampler *s = make(c, zero, 256);
  for (size_t i = 0; i < ARRAY_LENGTH(published); i++) {
    int32_t id;
    assert_ok(c, sampler_next(s, equal, &id));
    assert_int_equal(id, published[i]);
  }
  sampler_free(s);
  oscar_context_free(c);
}

/* ---- penalties, bias, mask ---- */

/* The definitions, for one token after the other: how often it stands in the last `window` tokens is counted anew each time. */
static void expected_logits(const struct sampler_options *o, const float *logits, int vocab, const int32_t *before, int n_before,
                            const bool *allowed, float *changed) {
  for (int id = 0; id < vocab; id++) {
    double logit = (double)logits[id];
    for (int i = 0; i < o->n_bias; i++)
      if (o->bias[i].id == id) logit = (double)(float)(logit + (double)o->bias[i].bias);
    int times = 0;
    for (int i = 0; i < n_before; i++)
      if ((o->penalty_window < 0 || i >= n_before - o->penalty_window) && before[i] == id) times++;
    if (times > 0 && o->repeat_penalty != 0)
      logit = (double)(float)(logit > 0 ? logit / (double)o->repeat_penalty : logit * (double)o->repeat_penalty);
    if (times > 0) logit -= (double)o->presence_penalty + times * (double)o->frequency_penalty;
    changed[id] = allowed && !allowed[id] ? -INFINITY : (float)logit;
  }
}

static void set_bits(const bool *allowed, int vocab, uint64_t *bits) {
  for (int i = 0; i < (vocab + 63) / 64; i++) bits[i] = ~(uint64_t)0; /* past the vocabulary, too: nobody looks there */
  for (int i = 0; i < vocab; i++)
    if (!allowed[i]) bits[i / 64] &= ~((uint64_t)1 << i % 64);
}

/* sampler_choose of logits = sampler_next of the logits as the definitions change them, id for id. */
static void changes_follow_their_definitions(void **state) {
  (void)state;
  enum { VOCAB = 203, BEFORE = 90, ROUNDS = 60 };
  static const struct token_bias biases[] = {{7, 2.5f}, {8, -INFINITY}, {9, 1}, {9, 0.25f}, {202, 3}, {0, -4}};
  static const struct sampler_options cases[] = {
      {.temperature = 1, .top_p = 1, .repeat_penalty = 1.3f, .penalty_window = -1},
      {.temperature = 1, .top_p = 1, .repeat_penalty = 0.5f, .penalty_window = 20},
      {.temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .presence_penalty = 1.5f, .penalty_window = 64},
      {.temperature = 0.8f, .top_p = 0.9f, .frequency_penalty = 0.7f, .penalty_window = -1},
      {.temperature = 1, .top_p = 1, .frequency_penalty = -0.5f, .presence_penalty = -1, .penalty_window = 1000},
      {.temperature = 0, .top_p = 1, .repeat_penalty = 2, .presence_penalty = 1, .frequency_penalty = 0.1f, .penalty_window = 50},
      {.temperature = 1, .top_p = 1, .bias = biases, .n_bias = 6},
      {.temperature = 2,
       .top_k = 150,
       .top_p = 1,
       .repeat_penalty = 1.1f,
       .presence_penalty = 0.5f,
       .frequency_penalty = 0.5f,
       .penalty_window = 33,
       .bias = biases,
       .n_bias = 6},
      {.temperature = 1, .top_p = 1, .repeat_penalty = 3, .presence_penalty = 9, .penalty_window = 0}, /* no window: nothing */
      {.temperature = 1, .top_p = 1, .repeat_penalty = 1, .penalty_window = -1},
  };
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  uint64_t random = 77;
  for (size_t k = 0; k < ARRAY_LENGTH(cases); k++) {
    struct sampler_options plain = {
        .temperature = cases[k].temperature, .top_k = cases[k].top_k, .top_p = cases[k].top_p, .min_p = cases[k].min_p};
    struct sampler *s = make(c, cases[k], VOCAB), *reference = make(c, plain, VOCAB);
    int differs = 0;
    for (int round = 0; round < ROUNDS; round++) {
      float logits[VOCAB], changed[VOCAB];
      int32_t before[BEFORE];
      bool allowed[VOCAB];
      uint64_t bits[(VOCAB + 63) / 64];
      for (int i = 0; i < VOCAB; i++) logits[i] = 2 * test_normal(&random), allowed[i] = test_random(&random) % 3 > 0;
      logits[17] = NAN, logits[18] = -INFINITY, logits[19] = INFINITY;
      const int n_before = (int)(test_random(&random) % (BEFORE + 1));
      for (int i = 0; i < n_before; i++) before[i] = (int32_t)(test_random(&random) % (i % 2 ? VOCAB : 20));
      const bool masked = round % 2;
      set_bits(allowed, VOCAB, bits);
      expected_logits(&cases[k], logits, VOCAB, before, n_before, masked ? allowed : NULL, changed);
      int32_t got = -1, want = -2;
      assert_ok(c, sampler_choose(s, logits, before, n_before, masked ? bits : NULL, &got));
      assert_ok(c, sampler_next(reference, changed, &want));
      if (got != want) fail_msg("case %zu, round %d: %d, expected %d", k, round, got, want);
      if (masked) assert_true(allowed[got]);
      differs += memcmp(logits, changed, sizeof logits) != 0;
    }
    assert_true(differs >= ROUNDS / 2); /* the mask at least */
    sampler_free(s);
    sampler_free(reference);
  }
  oscar_context_free(c);
}

/* Numbers worked out by hand: 2 / 1.25 - 0.5 - 2 * 0.25 = 0.6 and -1 * 1.25 - 0.5 - 0.25 = -2. */
static void penalties_by_hand(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  const struct sampler_options options = {
      .top_p = 1, .repeat_penalty = 1.25f, .presence_penalty = 0.5f, .frequency_penalty = 0.25f, .penalty_window = -1};
  struct sampler *s = make(c, options, 4);
  const int32_t before[] = {0, 1, 0};
  int32_t id;
  assert_ok(c, sampler_choose(s, (const float[]){2, -1, 0.59f, -9}, before, 3, NULL, &id));
  assert_int_equal(id, 0);
  assert_ok(c, sampler_choose(s, (const float[]){2, -1, 0.61f, -9}, before, 3, NULL, &id));
  assert_int_equal(id, 2);
  const uint64_t two = 1u << 1 | 1u << 3;
  assert_ok(c, sampler_choose(s, (const float[]){2, -1, 0.61f, -2.01f}, before, 3, &two, &id));
  assert_int_equal(id, 1);
  assert_ok(c, sampler_choose(s, (const float[]){2, -1, 0.61f, -1.99f}, before, 3, &two, &id));
  assert_int_equal(id, 3);
  sampler_free(s);
  oscar_context_free(c);
}

static void nothing_allowed_is_an_error(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  const struct token_bias forbidden[] = {{0, -INFINITY}, {1, -INFINITY}};
  struct sampler *s = make(c, everything, 3);
  const float logits[] = {1, 2, NAN};
  const uint64_t none = 0, broken = 4, beyond = 1u << 3;
  int32_t id = 77;
  assert_int_equal(sampler_choose(s, logits, NULL, 0, &none, &id), OSCAR_NUMERIC);
  assert_int_equal(sampler_choose(s, logits, NULL, 0, &broken, &id), OSCAR_NUMERIC);
  assert_int_equal(sampler_choose(s, logits, NULL, 0, &beyond, &id), OSCAR_NUMERIC);
  assert_non_null(strstr(oscar_last_error(c), "forbidden"));
  sampler_free(s);
  struct sampler_options options = everything;
  options.bias = forbidden;
  options.n_bias = 2;
  s = make(c, options, 3);
  assert_int_equal(sampler_next(s, logits, &id), OSCAR_NUMERIC);
  assert_int_equal(id, 77);
  assert_ok(c, sampler_next(s, (const float[]){9, 9, 0}, &id)); /* and it works again */
  assert_int_equal(id, 2);
  sampler_free(s);
  options.repeat_penalty = 2;
  options.penalty_window = -1;
  s = make(c, options, 3);
  for (int32_t wrong = -1; wrong <= 3; wrong += 4)
    assert_int_equal(sampler_choose(s, logits, &wrong, 1, NULL, &id), OSCAR_INVALID_ARGUMENT);
  sampler_free(s);
  oscar_context_free(c);
}

static void the_bias_is_copied(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  struct token_bias bias = {1, 10};
  struct sampler_options options = {.top_p = 1, .bias = &bias, .n_bias = 1};
  struct sampler *s;
  sweep_allocations(c, &f, sampler_create(c, &options, 3, &s));
  bias = (struct token_bias){2, 99};
  int32_t id;
  assert_ok(c, sampler_next(s, (const float[]){0, 0, 0}, &id));
  assert_int_equal(id, 1);
  sampler_free(s);
  failing_context_free(c, &f);
}

/* ---- likelihoods ---- */

static void check_rank(int vocab, const float *logits, int n) {
  int *order = malloc((size_t)vocab * sizeof *order), finite = 0;
  struct ranked_token *ranked = malloc(((size_t)n + 1) * sizeof *ranked);
  for (int i = 0; i < vocab; i++)
    if (isfinite(logits[i])) order[finite++] = i;
  order_logits = logits;
  qsort(order, (size_t)finite, sizeof *order, by_logit);
  long double sum = 0;
  for (int i = finite - 1; i >= 0; i--) sum += expl((long double)logits[order[i]] - (long double)logits[order[0]]);
  ranked[n] = (struct ranked_token){-7, -7}; /* behind the list */
  for (int id = 0; id<vocab; id += vocab> 50 ? 13 : 1) {
    float logprob;
    sampler_rank(vocab, logits, id, &logprob, n, ranked);
    if (isfinite(logits[id])) {
      const long double want = (long double)logits[id] - (long double)logits[order[0]] - logl(sum);
      assert_true(fabsl((long double)logprob - want) <= 1e-7L * (1 + fabsl(want)));
    } else {
      assert_true(logprob == -INFINITY);
    }
  }
  for (int i = 0; i < n; i++) {
    if (i >= finite) {
      assert_int_equal(ranked[i].id, -1);
      assert_true(ranked[i].logprob == -INFINITY);
      continue;
    }
    const long double want = (long double)logits[order[i]] - (long double)logits[order[0]] - logl(sum);
    assert_int_equal(ranked[i].id, order[i]);
    assert_true(fabsl((long double)ranked[i].logprob - want) <= 1e-7L * (1 + fabsl(want)));
  }
  assert_int_equal(ranked[n].id, -7);
  free(order);
  free(ranked);
}

static void likelihoods_are_those_of_a_sorted_softmax(void **state) {
  (void)state;
  enum { VOCAB = 5000 };
  static float logits[VOCAB];
  static const int lengths[] = {0, 1, 2, 20, 128};
  uint64_t random = 5;
  for (int kind = 0; kind < 5; kind++) {
    for (int i = 0; i < VOCAB; i++) {
      const float x = test_normal(&random);
      logits[i] = kind == 0 ? 3 * x : kind == 1 ? roundf(x) : kind == 2 ? (float)i * 0.01f : kind == 3 ? -0.5f : 1000 + 40 * x;
      if (kind == 1 && i % 5 == 0) logits[i] = i % 2 ? NAN : INFINITY;
    }
    for (size_t i = 0; i < ARRAY_LENGTH(lengths); i++) check_rank(VOCAB, logits, lengths[i]);
  }
  check_rank(4, (const float[]){1e38f, -1e38f, -INFINITY, 0}, 4);
  check_rank(3, (const float[]){NAN, -2, INFINITY}, 5);
  check_rank(1, (const float[]){-7}, 1);
}

/* ---- on a GPU ---- */

/* Logits of one of several kinds: far apart, many that are equal, all equal, some that are not finite, only a few that are. */
static void fill_logits(int kind, int vocab, float *logits, uint64_t *seed) {
  for (int i = 0; i < vocab; i++) {
    const float x = test_normal(seed);
    logits[i] = kind == 0 ? 3 * x : kind == 1 ? roundf(x) : kind == 2 ? -1.5f : kind == 3 ? 40 * x : x;
    if (kind == 1 && i % 3 == 0) logits[i] = copysignf(0, x); /* zeros of both signs are equal */
    if (kind == 4 && i % 7) logits[i] = i % 2 ? NAN : INFINITY;
    if (kind == 5 && i % (vocab / 3 + 1) != vocab / 5) logits[i] = -INFINITY;
  }
}

static void a_gpu_chooses_the_same_tokens(void **state) {
  (void)state;
  if (oscar_cuda_count() == 0) skip();
  enum { KINDS = 6, ROUNDS = 20 };
  static const struct sampler_options filters[] = {
      FILTERS(0, 0, 1, 0, 0),     FILTERS(0.8f, 40, 0.95f, 0.05f, 1), FILTERS(1, 128, 1, 0, 2),
      FILTERS(1, 1, 1, 0, 3),     FILTERS(1.7f, 100, 0.5f, 0, 4),     FILTERS(0.3f, 7, 1, 0.2f, 5),
      FILTERS(5, 64, 0, 0.5f, 6), FILTERS(1, 128, 0.999f, 0, 7),      FILTERS(1, 33, 0.9f, 0.001f, 8),
      FILTERS(100, 128, 1, 0, 9), FILTERS(1, 2, 0.6f, 0, 10)};
  static const int vocabs[] = {1, 15, 300, 16383, 151936, 262144};
  enum { ROWS = KINDS * ARRAY_LENGTH(filters) };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_cuda *cuda;
  struct backend *be;
  assert_ok(c, oscar_cuda_create(c, NULL, &cuda));
  assert_ok(c, backend_create_cuda(c, cuda, WEIGHTS_BF16, &be));
  uint64_t seed = 11;
  for (size_t v = 0; v < ARRAY_LENGTH(vocabs); v++) {
    const int vocab = vocabs[v];
    float *logits = malloc((size_t)ROWS * (size_t)vocab * sizeof *logits), *device, *each, *ids;
    struct sampler *on_host[ROWS], *described[ROWS];
    assert_non_null(logits);
    assert_ok(c, be->ops->reserve_samples(be, ROWS, vocab));
    assert_ok(c, be->ops->buffer_alloc(be, (size_t)ROWS * (size_t)vocab, &device));
    assert_ok(c, be->ops->buffer_alloc(be, ROWS * sizeof(struct sampling) / sizeof(float), &each));
    assert_ok(c, be->ops->buffer_alloc(be, ROWS, &ids));
    for (int row = 0; row < (int)ROWS; row++) {
      fill_logits(row % KINDS, vocab, logits + (size_t)row * (size_t)vocab, &seed);
      on_host[row] = make(c, filters[row / KINDS], vocab);
      described[row] = make(c, filters[row / KINDS], vocab);
    }
    assert_ok(c, be->ops->upload(be, device, logits, (size_t)ROWS * (size_t)vocab));
    for (int round = 0; round < ROUNDS; round++) {
      struct sampling sampling[ROWS];
      int32_t got[ROWS];
      for (int row = 0; row < (int)ROWS; row++) assert_true(sampler_describe(described[row], &sampling[row]));
      assert_ok(c, be->ops->upload(be, each, (const float *)(const void *)sampling, ROWS * (sizeof *sampling / sizeof(float))));
      assert_ok(c, be->ops->sample(be, ROWS, vocab, device, (const struct sampling *)(const void *)each, (int32_t *)(void *)ids));
      assert_ok(c, be->ops->download(be, (float *)(void *)got, ids, ROWS));
      for (int row = 0; row < (int)ROWS; row++) {
        int32_t expected_id = -1;
        const oscar_status status = sampler_next(on_host[row], logits + (size_t)row * (size_t)vocab, &expected_id);
        if (status == OSCAR_NUMERIC) {
          assert_int_equal(got[row], -1);
          continue;
        }
        assert_ok(c, status);
        if (got[row] != expected_id)
          fail_msg("vocabulary %d, row %d, round %d: %d on a GPU, %d here", vocab, row, round, got[row], expected_id);
      }
    }
    for (int row = 0; row < (int)ROWS; row++) sampler_free(on_host[row]), sampler_free(described[row]);
    be->ops->buffer_free(be, device);
    be->ops->buffer_free(be, each);
    be->ops->buffer_free(be, ids);
    free(logits);
  }
  be->ops->free(be);
  oscar_cuda_free(cuda);
  oscar_context_free(c);
}

/* What is ranked is drawn as the definition says for every random number, and what is not is left to the host. */
static void only_few_candidates_are_described(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct sampling sampling;
  static const struct token_bias bias = {3, 1};
  static const struct {
    struct sampler_options options;
    bool described;
  } cases[] = {{FILTERS(0, 0, 1, 0, 1), true},
               {FILTERS(0, 5000, 0.5f, 0, 1), true},
               {FILTERS(1, 0, 1, 0, 1), false},
               {FILTERS(1, 0, 0.9f, 0, 1), false},
               {FILTERS(1, MOST_RANKED, 1, 0, 1), true},
               {FILTERS(1, MOST_RANKED + 1, 1, 0, 1), false},
               {FILTERS(0.8f, 40, 0.95f, 0.05f, 1), true},
               {{.top_p = 1, .repeat_penalty = 1, .penalty_window = 64}, true},
               {{.top_p = 1, .repeat_penalty = 2, .presence_penalty = 1}, true}, /* of no tokens */
               {{.top_p = 1, .repeat_penalty = 2, .penalty_window = 64}, false},
               {{.top_p = 1, .presence_penalty = 0.1f, .penalty_window = -1}, false},
               {{.top_p = 1, .frequency_penalty = -0.1f, .penalty_window = 1}, false},
               {{.temperature = 1, .top_k = 5, .top_p = 1, .bias = &bias, .n_bias = 1}, false}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct sampler *a = make(c, cases[i].options, 10), *b = make(c, cases[i].options, 10);
    assert_int_equal(sampler_describe(a, &sampling), cases[i].described);
    if (!cases[i].described) { /* nothing was drawn */
      const float logits[10] = {1, 2, 3, 2, 1, 2, 3, 2, 1, 2};
      int32_t x, y;
      for (int k = 0; k < 20; k++) {
        assert_ok(c, sampler_next(a, logits, &x));
        assert_ok(c, sampler_next(b, logits, &y));
        assert_int_equal(x, y);
      }
    }
    sampler_free(a);
    sampler_free(b);
  }
  oscar_context_free(c);
}

static void wrong_options_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  const struct sampler_options wrong[] = {
      FILTERS(-1, 0, 1, 0, 0),
      FILTERS(NAN, 0, 1, 0, 0),
      FILTERS(INFINITY, 0, 1, 0, 0),
      FILTERS(1, -1, 1, 0, 0),
      FILTERS(1, 0, 1.5f, 0, 0),
      FILTERS(1, 0, -0.1f, 0, 0),
      FILTERS(1, 0, NAN, 0, 0),
      FILTERS(1, 0, 1, -0.1f, 0),
      FILTERS(1, 0, 1, 1.1f, 0),
      FILTERS(1, 0, 1, NAN, 0),
      {.top_p = 1, .repeat_penalty = -1},
      {.top_p = 1, .repeat_penalty = NAN},
      {.top_p = 1, .repeat_penalty = 1e-3f},
      {.top_p = 1, .repeat_penalty = INFINITY},
      {.top_p = 1, .presence_penalty = NAN},
      {.top_p = 1, .presence_penalty = -INFINITY},
      {.top_p = 1, .frequency_penalty = NAN},
      {.top_p = 1, .frequency_penalty = INFINITY},
      {.top_p = 1, .penalty_window = -2},
      {.top_p = 1, .n_bias = -1},
      {.top_p = 1, .n_bias = 1},
      {.top_p = 1, .bias = &(const struct token_bias){10, 1}, .n_bias = 1},
      {.top_p = 1, .bias = &(const struct token_bias){-1, 1}, .n_bias = 1},
      {.top_p = 1, .bias = &(const struct token_bias){1, NAN}, .n_bias = 1},
      {.top_p = 1, .bias = &(const struct token_bias){1, INFINITY}, .n_bias = 1},
      {.top_p = 1, .bias = &(const struct token_bias){1, 2e6f}, .n_bias = 1},
  };
  struct sampler *s;
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) {
    assert_int_equal(sampler_create(c, &wrong[i], 10, &s), OSCAR_INVALID_ARGUMENT);
    assert_null(s);
  }
  assert_int_equal(sampler_create(c, &everything, 0, &s), OSCAR_INVALID_ARGUMENT);
  sampler_free(NULL);
  oscar_context_free(c);
}

static void a_large_vocabulary_is_fast(void **state) {
  (void)state;
  enum { VOCAB = 151936, ROUNDS = 5 };
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  float *logits = malloc(VOCAB * sizeof *logits);
  uint64_t random = 3;
  for (int i = 0; i < VOCAB; i++) logits[i] = 3 * test_normal(&random);
  static const struct sampler_options cases[] = {FILTERS(0, 0, 1, 0, 1), FILTERS(0.8f, 40, 0.95f, 0.05f, 1),
                                                 FILTERS(1, 0, 0.95f, 0, 1), FILTERS(1, 0, 1, 0.05f, 1), FILTERS(1, 0, 1, 0, 1)};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct sampler *s = make(c, cases[i], VOCAB);
    int32_t id;
    int64_t start = time_ns();
    for (int k = 0; k < ROUNDS; k++) assert_ok(c, sampler_next(s, logits, &id));
    printf("top-k %d, top-p %g, min-p %g, temperature %g: %.3f ms a token of %d\n", cases[i].top_k, (double)cases[i].top_p,
           (double)cases[i].min_p, (double)cases[i].temperature, (double)(time_ns() - start) / 1e6 / ROUNDS, VOCAB);
    sampler_free(s);
  }
  enum { BEFORE = 32768 };
  static int32_t before[BEFORE];
  for (int i = 0; i < BEFORE; i++) before[i] = (int32_t)(test_random(&random) % VOCAB);
  struct sampler *s = make(c, (struct sampler_options){.top_p = 1, .presence_penalty = 1, .penalty_window = -1}, VOCAB);
  int32_t id;
  int64_t start = time_ns();
  for (int k = 0; k < ROUNDS; k++) assert_ok(c, sampler_choose(s, logits, before, BEFORE, NULL, &id));
  printf("penalties of %d tokens: %.3f ms\n", BEFORE, (double)(time_ns() - start) / 1e6 / ROUNDS);
  struct ranked_token ranked[20];
  float logprob;
  start = time_ns();
  for (int k = 0; k < ROUNDS; k++) sampler_rank(VOCAB, logits, 5, &logprob, 20, ranked);
  printf("likelihood and the 20 most likely: %.3f ms\n", (double)(time_ns() - start) / 1e6 / ROUNDS);
  sampler_free(s);
  free(logits);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(draws_follow_the_exact_probabilities),
      cmocka_unit_test(extreme_logits_are_drawn_correctly),
      cmocka_unit_test(edges_of_the_filters_keep_the_best),
      cmocka_unit_test(top_p_keeps_the_token_that_crosses_it),
      cmocka_unit_test(greedy_takes_the_lowest_of_equals_and_no_broken_logit),
      cmocka_unit_test(nothing_finite_is_an_error),
      cmocka_unit_test(a_seed_fixes_the_ids),
      cmocka_unit_test(changes_follow_their_definitions),
      cmocka_unit_test(penalties_by_hand),
      cmocka_unit_test(nothing_allowed_is_an_error),
      cmocka_unit_test(the_bias_is_copied),
      cmocka_unit_test(likelihoods_are_those_of_a_sorted_softmax),
      cmocka_unit_test(a_gpu_chooses_the_same_tokens),
      cmocka_unit_test(only_few_candidates_are_described),
      cmocka_unit_test(wrong_options_are_refused),
      cmocka_unit_test(a_large_vocabulary_is_fast),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
