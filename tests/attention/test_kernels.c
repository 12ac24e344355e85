/* The kernels of every instruction set on one page, against sums in double precision over the layout page_form.h states. */
#include "support.h"

#include "attention/kernels.h"

static const struct attention_kernels *tables[3];
static const char *names[3];
static int table_count;

/* The tables this CPU can run. */
static int find_tables(void **state) {
  (void)state;
  for (int isa = OSCAR_ISA_PORTABLE; isa <= OSCAR_ISA_AVX512; isa++) {
    oscar_context_options options;
    oscar_context_options_default(&options);
    options.isa = (oscar_isa)isa;
    oscar_context *context;
    if (oscar_context_create(&options, &context) != OSCAR_OK) continue;
    oscar_context_free(context);
    names[table_count] = oscar_isa_name((oscar_isa)isa);
    tables[table_count++] = attention_kernels_for((oscar_isa)isa);
  }
  return 0;
}

static void *aligned(size_t bytes) {
  void *p = aligned_alloc(64, round_up(bytes + 64, 64));
  assert_non_null(p);
  memset(p, 0, bytes);
  return p;
}

static const int row_counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 31, 64};
static const int dims[] = {16, 48, 64, 80, 96, 128, 256};
static const struct side_form forms[] = {
    {16, 1, 1, 0},  {16, 1, 2, 0},  {48, 3, 2, 0},   {64, 1, 2, 0},    {64, 4, 2, 0},    {80, 1, 1, 0},  {80, 5, 1, 0},
    {96, 3, 2, 0},  {96, 2, 1, 0},  {128, 1, 1, 0},  {128, 1, 2, 0},   {128, 4, 1, 0},   {128, 8, 2, 0}, {112, 1, 1, 0},
    {256, 1, 2, 0}, {256, 8, 2, 0}, {512, 1, 2, 0},  {240, 5, 1, 0},   {1024, 32, 2, 0}, {48, 3, 0, 0},  {64, 4, 0, 32},
    {80, 4, 0, 9},  {112, 3, 0, 1}, {128, 4, 0, 64}, {128, 1, 0, 128}, {240, 2, 2, 0}};

static void fill(uint64_t *seed, int n, float scale, float *x) {
  for (int i = 0; i < n; i++) x[i] = scale * test_normal(seed);
}

/* Random codes; scales around 1 and zeros around 1.5, as fp16. */
static uint8_t *random_side(uint64_t *seed, const struct side_form *f) {
  uint8_t *side = aligned(side_bytes(f));
  for (size_t i = 0; i < side_code_bytes(f); i++) side[i] = (uint8_t)test_random(seed);
  uint16_t *meta = (uint16_t *)(void *)(side + side_code_bytes(f));
  for (int i = 0; f->meta_values == 0 && i < PAGE_TOKENS; i++) meta[i] = (uint16_t)test_random(seed);
  for (int i = 0; i < 4 * f->groups * f->meta_values * 16; i++) {
    bool zero = f->meta_values == 2 && i / 16 % 2;
    meta[i] = f32_to_f16((float)(zero ? 3 * test_uniform(seed) : exp(test_uniform(seed) - .5)));
  }
  return side;
}

static double meta_value(const struct side_form *f, const uint8_t *side, int token, int group, int value) {
  if (f->meta_values == 0 && value == 0) {
    const uint8_t *word = side + side_code_bytes(f) + 2 * token;
    return pow(2, (((word[0] | word[1] << 8) >> 4 * group & 15) - 8) / 4.0);
  }
  if (value == 1 && f->meta_values != 2) return 1;
  size_t at = side_code_bytes(f) + 2 * (size_t)(((token / 16 * f->groups + group) * f->meta_values + value) * 16 + token % 16);
  return (double)f16_to_f32((uint16_t)(side[at] | side[at + 1] << 8));
}

/* First crumb of a group: block p (C/16) div groups. */
static int begin_of(const struct side_form *f, int group) { return group * (f->crumbs / 16) / f->groups * 16; }

static int group_of(const struct side_form *f, int c) {
  int group = 0;
  while (begin_of(f, group + 1) <= c) group++;
  return group;
}

/* "byte k of a lane, bits 2j, is crumb 16 g + 4 j + k of that token" */
static int key_crumb(const struct side_form *f, const uint8_t *side, int token, int c) {
  int g = c / 16, j = c % 16 / 4, k = c % 4;
  return side[((token / 16 * (f->crumbs / 16) + g) * 16 + token % 16) * 4 + k] >> 2 * j & 3;
}

/* "byte k, bits 2j, is that crumb of token 4 j + k of the tile" */
static int value_crumb(const struct side_form *f, const uint8_t *side, int token, int c) {
  int j = token % 16 / 4, k = token % 4;
  return side[((token / 16 * (f->crumbs / 16) + c / 16) * 16 + c % 16) * 4 + k] >> 2 * j & 3;
}

/* The largest difference, relative to the root mean square of the truth. */
static double relative_error(int rows, int n, const float *x, int stride, const double *truth) {
  double worst = 0, energy = 0;
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < n; i++) {
      double e = fabs((double)x[r * stride + i] - truth[r * n + i]);
      if (!(e <= worst)) worst = e;
      energy += truth[r * n + i] * truth[r * n + i];
    }
  return worst / (sqrt(energy / (rows * n)) + 1e-300);
}

static void check(double error, double bound, const char *what, const char *isa, int rows, int size) {
  if (!(error <= bound))
    fail_msg("%s on %s, %d rows, size %d: relative error %g, expected at most %g", what, isa, rows, size, error, bound);
}

static void coded_scores_follow_their_definition(void **state) {
  (void)state;
  uint64_t seed = 1;
  double worst[3] = {0};
  for (size_t i = 0; i < ARRAY_LENGTH(forms); i++) {
    const struct side_form *f = forms + i;
    int width = form_rows(f);
    uint8_t *side = random_side(&seed, f);
    float *mapped = aligned(sizeof(float) * MAX_ROWS * (size_t)width),
          *panel = aligned(sizeof(float) * panel_floats(16, f, NULL));
    float *scores = aligned(sizeof(float) * MAX_ROWS * PAGE_TOKENS);
    double *truth = aligned(sizeof(double) * MAX_ROWS * PAGE_TOKENS);
    fill(&seed, MAX_ROWS * width, 1, mapped);
    for (int r = 0; r < MAX_ROWS; r++)
      for (int c = 0; c < f->crumbs; c++) mapped[r * width + c] *= c % 7 == 3 ? 16 : 1; /* digits weigh up to 4^j */
    for (int r = 0; r < MAX_ROWS; r++)
      for (int t = 0; t < PAGE_TOKENS; t++) {
        const float *q = mapped + r * width;
        double score = (double)q[f->crumbs + f->groups];
        for (int p = 0; p < f->groups; p++) {
          double dot = 0;
          for (int c = begin_of(f, p); c < begin_of(f, p + 1); c++) dot += (double)q[c] * key_crumb(f, side, t, c);
          score += meta_value(f, side, t, p, 0) * (dot - meta_value(f, side, t, p, 1) * (double)q[f->crumbs + p]);
        }
        truth[r * PAGE_TOKENS + t] = score;
      }
    for (int k = 0; k < table_count; k++)
      for (size_t n = 0; n < ARRAY_LENGTH(row_counts); n++) {
        int rows = row_counts[n];
        uint8_t *prepared = aligned((size_t)rows * tables[k]->prepared_bytes(f));
        tables[k]->prepare_queries(f, rows, mapped, prepared);
        struct query_rows queries = {rows, 16, NULL, mapped, prepared};
        memset(scores, 0xFF, sizeof(float) * MAX_ROWS * PAGE_TOKENS);
        tables[k]->score_coded(&queries, f, side, scores, panel);
        double error = relative_error(rows, PAGE_TOKENS, scores, PAGE_TOKENS, truth);
        check(error, k > 0 ? 4e-4 : 1e-5, "coded scores", names[k], rows, f->crumbs);
        if (error > worst[k]) worst[k] = error;
        free(prepared);
      }
    free(side), free(mapped), free(panel), free(scores), free(truth);
  }
  for (int k = 0; k < table_count; k++)
    printf("  %s: largest error of a coded score %.2g of the scores' rms\n", names[k], worst[k]);
}

static void coded_values_follow_their_definition(void **state) {
  (void)state;
  uint64_t seed = 2;
  double worst[3] = {0};
  for (size_t i = 0; i < ARRAY_LENGTH(forms); i++) {
    const struct side_form *f = forms + i;
    int width = form_rows(f), stride = width + 16;
    uint8_t *side = random_side(&seed, f);
    float *p = aligned(sizeof(float) * MAX_ROWS * PAGE_TOKENS), *panel = aligned(sizeof(float) * panel_floats(16, NULL, f));
    float *out = aligned(sizeof(float) * MAX_ROWS * (size_t)stride);
    double *truth = aligned(sizeof(double) * MAX_ROWS * (size_t)width);
    for (int r = 0; r < MAX_ROWS; r++)
      for (int t = 0; t < PAGE_TOKENS; t++) /* flat rows, peaked rows, rows without a token */
        p[r * PAGE_TOKENS + t] = r % 8 == 7 ? 0 : (float)exp((r % 3 * 4 + 1) * -test_uniform(&seed));
    for (int r = 0; r < MAX_ROWS; r++)
      for (int t = 0; t < PAGE_TOKENS; t++) {
        double weight = (double)p[r * PAGE_TOKENS + t], *row = truth + r * width;
        for (int c = 0; c < f->crumbs; c++)
          row[c] += weight * meta_value(f, side, t, group_of(f, c), 0) * value_crumb(f, side, t, c);
        for (int g = 0; g < f->groups; g++)
          row[f->crumbs + g] -= weight * meta_value(f, side, t, g, 0) * meta_value(f, side, t, g, 1);
        row[f->crumbs + f->groups] += weight;
      }
    for (int k = 0; k < table_count; k++)
      for (size_t n = 0; n < ARRAY_LENGTH(row_counts); n++) {
        int rows = row_counts[n];
        memset(out, 0, sizeof(float) * MAX_ROWS * (size_t)stride);
        for (int r = 0; r < MAX_ROWS; r++)
          for (int c = width; c < stride; c++) out[r * stride + c] = 7;
        tables[k]->accumulate_coded(rows, f, p, side, out, stride, panel);
        double error = relative_error(rows, width, out, stride, truth);
        check(error, k > 0 ? 1e-4 : 4e-6, "coded values", names[k], rows, f->crumbs);
        if (error > worst[k]) worst[k] = error;
        for (int r = 0; r < MAX_ROWS; r++)
          for (int c = r < rows ? width : 0; c < stride; c++) assert_true(out[r * stride + c] == (c < width ? 0 : 7));
        tables[k]->accumulate_coded(rows, f, p, side, out, stride, panel); /* adds to what is there */
        for (int c = 0; c < width; c++) truth[c] *= 2;
        check(relative_error(1, width, out, stride, truth), 1e-4, "coded values, twice", names[k], rows, f->crumbs);
        for (int c = 0; c < width; c++) truth[c] /= 2;
      }
    free(side), free(p), free(panel), free(out), free(truth);
  }
  for (int k = 0; k < table_count; k++) printf("  %s: largest error of a coded sum %.2g of the sums' rms\n", names[k], worst[k]);
}

static void waves_turn_and_add_up_by_their_definition(void **state) {
  (void)state;
  enum { TABLE = 80 }; /* pairs in the table, of which some are used */
  static const int pair_counts[] = {1, 5, 8, 16, 33, 64, 77};
  uint64_t seed = 8;
  float *table = aligned(sizeof(float) * TABLE * 2 * PAGE_TOKENS), *scores = aligned(sizeof(float) * MAX_ROWS * PAGE_TOKENS);
  float *from = aligned(sizeof(float) * MAX_ROWS * 200), *waves = aligned(sizeof(float) * MAX_ROWS * 200);
  double *truth = aligned(sizeof(double) * MAX_ROWS * PAGE_TOKENS);
  fill(&seed, TABLE * 2 * PAGE_TOKENS, 1, table);
  fill(&seed, MAX_ROWS * 200, 1, from);
  for (size_t i = 0; i < ARRAY_LENGTH(pair_counts); i++) {
    int pairs = pair_counts[i];
    uint16_t pair[TABLE];
    float turn[2 * TABLE];
    for (int k = 0; k < pairs; k++) {
      pair[k] = (uint16_t)(k + (k > pairs / 2 ? TABLE - pairs : 0));
      turn[k] = (float)cos(k * .37);
      turn[pairs + k] = (float)sin(k * .37);
    }
    for (int r = 0; r < MAX_ROWS; r++)
      for (int t = 0; t < PAGE_TOKENS; t++) {
        truth[r * PAGE_TOKENS + t] = 3;
        for (int k = 0; k < pairs; k++) { /* a cos(x) + b sin(x) = A cos(x - y) + B sin(x - y) with A, B turned by y */
          double a = (double)from[r * 200 + k], b = (double)from[r * 200 + pairs + k], c = (double)turn[k],
                 s = (double)turn[pairs + k];
          truth[r * PAGE_TOKENS + t] += (a * c + b * s) * (double)table[2 * pair[k] * PAGE_TOKENS + t] +
                                        (b * c - a * s) * (double)table[(2 * pair[k] + 1) * PAGE_TOKENS + t];
        }
      }
    for (int k = 0; k < table_count; k++)
      for (size_t n = 0; n < ARRAY_LENGTH(row_counts); n++) {
        int rows = row_counts[n];
        for (int j = 0; j < MAX_ROWS * PAGE_TOKENS; j++) scores[j] = 3;
        tables[k]->turn_waves(rows, pairs, turn, from, 200, waves);
        tables[k]->score_waves(rows, pairs, waves, table, pair, scores);
        check(relative_error(rows, PAGE_TOKENS, scores, PAGE_TOKENS, truth), 4e-6, "waves", names[k], rows, pairs);
        for (int j = rows * PAGE_TOKENS; j < MAX_ROWS * PAGE_TOKENS; j++) assert_true(scores[j] == 3);
      }
  }
  free(table), free(scores), free(from), free(waves), free(truth);
}

static void exact_pages_follow_their_definition(void **state) {
  (void)state;
  uint64_t seed = 3;
  for (size_t i = 0; i < ARRAY_LENGTH(dims); i++) {
    int d = dims[i], stride = d + 32;
    float *q = aligned(sizeof(float) * (size_t)(MAX_ROWS * d)), *p = aligned(sizeof(float) * MAX_ROWS * PAGE_TOKENS);
    float *scores = aligned(sizeof(float) * MAX_ROWS * PAGE_TOKENS), *out = aligned(sizeof(float) * (size_t)(MAX_ROWS * stride));
    float *panel = aligned(sizeof(float) * panel_floats(d, NULL, NULL));
    uint16_t *page = aligned(sizeof(uint16_t) * (size_t)(PAGE_TOKENS * d));
    double *score_truth = aligned(sizeof(double) * MAX_ROWS * PAGE_TOKENS),
           *out_truth = aligned(sizeof(double) * (size_t)(MAX_ROWS * d));
    fill(&seed, MAX_ROWS * d, 1, q);
    fill(&seed, MAX_ROWS * PAGE_TOKENS, 1, p);
    for (int j = 0; j < PAGE_TOKENS * d; j++) page[j] = f32_to_bf16(test_normal(&seed));
    int tokens = (int)i * 9 + 1;
    for (int j = tokens * d; j < PAGE_TOKENS * d; j++) page[j] = 0x7FC0; /* NaN where nothing was written */
    for (int r = 0; r < MAX_ROWS; r++)
      for (int t = 0; t < tokens; t++)
        for (int j = 0; j < d; j++) {
          double x = (double)bf16_to_f32(page[t * d + j]);
          score_truth[r * tokens + t] += (double)q[r * d + j] * x;
          out_truth[r * d + j] += (double)p[r * PAGE_TOKENS + t] * x;
        }
    for (int k = 0; k < table_count; k++)
      for (size_t n = 0; n < ARRAY_LENGTH(row_counts); n++) {
        int rows = row_counts[n];
        struct query_rows queries = {rows, d, q, NULL, NULL};
        tables[k]->score_exact(&queries, page, scores, panel);
        check(relative_error(rows, tokens, scores, PAGE_TOKENS, score_truth), 4e-6, "exact scores", names[k], rows, d);
        memset(out, 0, sizeof(float) * (size_t)(MAX_ROWS * stride));
        tables[k]->accumulate_exact(rows, d, tokens, p, page, out, stride, panel);
        check(relative_error(rows, d, out, stride, out_truth), 4e-6, "exact values", names[k], rows, d);
      }
    free(q), free(p), free(scores), free(out), free(panel), free(page), free(score_truth), free(out_truth);
  }
}

static void matrix_products_follow_their_definition(void **state) {
  (void)state;
  uint64_t seed = 4;
  enum { N = 144, K = 80 };
  float *a = aligned(sizeof(float) * MAX_ROWS * K), *b = aligned(sizeof(float) * N * K), *c = aligned(sizeof(float) * N * K);
  float *out = aligned(sizeof(float) * MAX_ROWS * N);
  double *truth = aligned(sizeof(double) * MAX_ROWS * N);
  fill(&seed, MAX_ROWS * K, 1, a);
  fill(&seed, N * K, 1, b);
  for (int n = 0; n < N; n++)
    for (int k = 0; k < K; k++) c[k * N + n] = b[n * K + k];
  for (int r = 0; r < MAX_ROWS; r++)
    for (int n = 0; n < N; n++)
      for (int k = 0; k < K; k++) truth[r * N + n] += (double)a[r * K + k] * (double)b[n * K + k];
  for (int k = 0; k < table_count; k++)
    for (int rows = 1; rows <= MAX_ROWS; rows++) {
      tables[k]->multiply_transposed(rows, N, K, a, b, out);
      check(relative_error(rows, N, out, N, truth), 4e-6, "product with a transpose", names[k], rows, N);
      memset(out, 0, sizeof(float) * MAX_ROWS * N);
      tables[k]->multiply_add(rows, N, K, a, K, c, out, N);
      check(relative_error(rows, N, out, N, truth), 4e-6, "product", names[k], rows, N);
    }
  free(a), free(b), free(c), free(out), free(truth);
}

static void exponentials_are_within_two_units_of_libm(void **state) {
  (void)state;
  for (int k = 0; k < table_count; k++) {
    double worst = 0;
    for (int i = 0; i < 20000; i++) {
      float scores[PAGE_TOKENS], x[PAGE_TOKENS];
      for (int t = 0; t < PAGE_TOKENS; t++) x[t] = scores[t] = t ? -(float)(i * 63 + t - 1) * 7e-5f : 0;
      struct softmax_state s = {.max = -INFINITY, .hi = PAGE_TOKENS};
      tables[k]->softmax(1, scores, &s);
      for (int t = 0; t < PAGE_TOKENS; t++) {
        double truth = exp((double)x[t]);
        if (x[t] < -87.33f) {
          assert_true((double)scores[t] <= truth * 1.0001);
          continue;
        }
        double error = fabs((double)scores[t] - truth) / (ldexp(1, ilogb(truth)) * 0x1p-23);
        if (!(error <= worst)) worst = error;
      }
    }
    printf("  %s: e^x within %.2f ulp\n", names[k], worst);
    assert_true(worst <= 2);
  }
}

static void softmax_carries_max_and_sum_over_pages(void **state) {
  (void)state;
  enum { PAGES = 6 };
  uint64_t seed = 5;
  for (int k = 0; k < table_count; k++)
    for (int trial = 0; trial < 200; trial++) {
      float scores[PAGES][PAGE_TOKENS], p[PAGE_TOKENS];
      int lo[PAGES], hi[PAGES];
      double max = -INFINITY, sum = 0, weighted = 0;
      for (int page = 0; page < PAGES; page++) {
        lo[page] = (int)(test_random(&seed) % 65);
        hi[page] = trial == 0 ? 0 : (int)(test_random(&seed) % 65); /* ranges may be empty; in trial 0 all are */
        for (int t = 0; t < PAGE_TOKENS; t++) {
          bool seen = t >= lo[page] && t < hi[page];
          scores[page][t] = (float)(trial % 5) * 30 * test_normal(&seed);
          if (seen && (double)scores[page][t] > max) max = (double)scores[page][t];
        }
      }
      struct softmax_state s = {.max = -INFINITY};
      double carried = 0;
      for (int page = 0; page < PAGES; page++) {
        for (int t = lo[page]; t < hi[page]; t++) {
          double e = exp((double)scores[page][t] - max);
          sum += e, weighted += e * (page * 64 + t);
        }
        for (int t = 0; t < PAGE_TOKENS; t++) p[t] = t >= lo[page] && t < hi[page] ? scores[page][t] : NAN;
        s.lo = lo[page], s.hi = hi[page];
        tables[k]->softmax(1, p, &s);
        carried *= (double)s.rescale;
        for (int t = 0; t < PAGE_TOKENS; t++) {
          if (t < lo[page] || t >= hi[page]) assert_true(p[t] == 0);
          carried += (double)p[t] * (page * 64 + t);
        }
      }
      if (isinf(max)) {
        assert_true(isinf(s.max) && s.sum == 0 && carried == 0);
        continue;
      }
      assert_true((double)s.max == max);
      assert_true(fabs((double)s.sum - sum) <= 1e-6 * sum);
      assert_true(fabs(carried - weighted) <= 2e-6 * weighted + 1e-6);
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(coded_scores_follow_their_definition),      cmocka_unit_test(coded_values_follow_their_definition),
      cmocka_unit_test(waves_turn_and_add_up_by_their_definition), cmocka_unit_test(exact_pages_follow_their_definition),
      cmocka_unit_test(matrix_products_follow_their_definition),   cmocka_unit_test(exponentials_are_within_two_units_of_libm),
      cmocka_unit_test(softmax_carries_max_and_sum_over_pages),
  };
  return cmocka_run_group_tests(tests, find_tables, NULL);
}
