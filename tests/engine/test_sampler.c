/* The sampler against probabilities computed the plain way: sort everything, softmax in long double, cut, renormalize. */
#include "support.h"

#include "backend/backend.h"
#include "engine/sampler.h"

#include <oscar/cuda.h>

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
      {1, 0, 1, 0, 1},
      {0.5f, 0, 1, 0, 2},
      {1.7f, 0, 1, 0, 3},
      {1, 5, 1, 0, 4},
      {1, 40, 1, 0, 5},
      {1, 0, 0.5f, 0, 6},
      {1, 0, 0.95f, 0, 7},
      {1, 0, 1, 0.2f, 8},
      {0.8f, 40, 0.95f, 0.05f, 9},
      {0.8f, 40, 0.3f, 0.05f, 10},
      {0.8f, 40, 0.95f, 0.6f, 11},
      {2, 299, 0.99f, 0.001f, 12},
      {1, 1000, 0.7f, 0, 13},
      {1, 297, 1, 0, 14},
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
  static const struct sampler_options only_best[] = {{0, 0, 1, 0, 1}, {0, 40, 0.95f, 0.05f, 1}, {1, 1, 1, 0, 1},
                                                     {5, 0, 0, 0, 1}, {5, 1, 0.5f, 0.5f, 1},    {5, 3, 0, 1, 1}};
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
  check_distribution(c, (struct sampler_options){1, 0, 1, 1, 3}, logits, 5);
  check_distribution(c, (struct sampler_options){1, 4, 1, 1, 4}, logits, 5);
  check_distribution(c, (struct sampler_options){1, 4, 0.99f, 1, 4}, logits, 5);
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
    struct sampler *s = make(c, (struct sampler_options){1, 0, cases[i].top_p, 0, 9}, 4);
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
  static const struct sampler_options filters[] = {{0, 0, 1, 0, 0},     {0.8f, 40, 0.95f, 0.05f, 1}, {1, 128, 1, 0, 2},
                                                   {1, 1, 1, 0, 3},     {1.7f, 100, 0.5f, 0, 4},     {0.3f, 7, 1, 0.2f, 5},
                                                   {5, 64, 0, 0.5f, 6}, {1, 128, 0.999f, 0, 7},      {1, 33, 0.9f, 0.001f, 8},
                                                   {100, 128, 1, 0, 9}, {1, 2, 0.6f, 0, 10}};
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
  static const struct {
    struct sampler_options options;
    bool described;
  } cases[] = {{{0, 0, 1, 0, 1}, true},
               {{0, 5000, 0.5f, 0, 1}, true},
               {{1, 0, 1, 0, 1}, false},
               {{1, 0, 0.9f, 0, 1}, false},
               {{1, MOST_RANKED, 1, 0, 1}, true},
               {{1, MOST_RANKED + 1, 1, 0, 1}, false},
               {{0.8f, 40, 0.95f, 0.05f, 1}, true}};
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
  static const struct sampler_options wrong[] = {
      {-1, 0, 1, 0, 0},    {NAN, 0, 1, 0, 0}, {INFINITY, 0, 1, 0, 0}, {1, -1, 1, 0, 0},   {1, 0, 1.5f, 0, 0},
      {1, 0, -0.1f, 0, 0}, {1, 0, NAN, 0, 0}, {1, 0, 1, -0.1f, 0},    {1, 0, 1, 1.1f, 0}, {1, 0, 1, NAN, 0}};
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
  static const struct sampler_options cases[] = {
      {0, 0, 1, 0, 1}, {0.8f, 40, 0.95f, 0.05f, 1}, {1, 0, 0.95f, 0, 1}, {1, 0, 1, 0.05f, 1}, {1, 0, 1, 0, 1}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct sampler *s = make(c, cases[i], VOCAB);
    int32_t id;
    int64_t start = time_ns();
    for (int k = 0; k < ROUNDS; k++) assert_ok(c, sampler_next(s, logits, &id));
    printf("top-k %d, top-p %g, min-p %g, temperature %g: %.3f ms a token of %d\n", cases[i].top_k, (double)cases[i].top_p,
           (double)cases[i].min_p, (double)cases[i].temperature, (double)(time_ns() - start) / 1e6 / ROUNDS, VOCAB);
    sampler_free(s);
  }
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
      cmocka_unit_test(a_gpu_chooses_the_same_tokens),
      cmocka_unit_test(only_few_candidates_are_described),
      cmocka_unit_test(wrong_options_are_refused),
      cmocka_unit_test(a_large_vocabulary_is_fast),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
