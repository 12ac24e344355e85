/* Sums against slow loops over their definitions, the output moment against a dense softmax matrix, wrong use against errors. */
#include "calib_data.h"

enum { LAYERS = 2, QUERY_HEADS = 6, KV_HEADS = 2, GROUP = 3, DIM = 16, TOKENS = 700 };

static oscar_calib *make(oscar_context *c, int layers, int query_heads, int kv_heads, int d) {
  oscar_calib *calib = NULL;
  oscar_calib_geometry g = {layers, query_heads, kv_heads, d};
  assert_ok(c, oscar_calib_create(c, &g, &calib));
  return calib;
}

/* 1/(n heads) sum of x'x over the query heads of one KV head, element by element. */
static void slow_moment(const struct layer_data *x, const float *rows, int kv_head, double *out) {
  int d = x->head_dim, group = x->query_heads / x->kv_heads;
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) {
      double sum = 0;
      for (int t = 0; t < x->n; t++)
        for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
          const float *row = row_of(rows, x->query_heads, d, t, h);
          sum += (double)row[i] * (double)row[j];
        }
      out[i * d + j] = sum / ((double)x->n * group);
    }
}

static void slow_mean(const struct layer_data *x, const float *rows, int kv_head, double *out) {
  for (int i = 0; i < x->head_dim; i++) {
    out[i] = 0;
    for (int t = 0; t < x->n; t++) out[i] += (double)row_of(rows, x->kv_heads, x->head_dim, t, kv_head)[i] / x->n;
  }
}

static void statistics_equal_their_definitions(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make(c, LAYERS, QUERY_HEADS, KV_HEADS, DIM);
  struct layer_data x[LAYERS];
  double got[DIM * DIM], want[DIM * DIM];
  for (int l = LAYERS - 1; l >= 0; l--) { /* layers in any order */
    x[l] = layer_data_make(TOKENS, QUERY_HEADS, KV_HEADS, DIM, 10 + (uint64_t)l);
    assert_ok(c, feed(calib, l, &x[l], 300));
  }
  assert_int_equal(oscar_calib_tokens(calib), TOKENS);
  for (int l = 0; l < LAYERS; l++)
    for (int h = 0; h < KV_HEADS; h++) {
      assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_QUERY_MOMENT, l, h, got));
      slow_moment(&x[l], x[l].q, h, want);
      assert_near(DIM * DIM, got, want, 1e-12);
      assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_OUTPUT_MOMENT, l, h, got));
      slow_moment(&x[l], x[l].o, h, want);
      assert_near(DIM * DIM, got, want, 1e-12);
      assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_KEY_MEAN, l, h, got));
      slow_mean(&x[l], x[l].k, h, want);
      assert_near(DIM, got, want, 1e-12);
      assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_VALUE_MEAN, l, h, got));
      slow_mean(&x[l], x[l].v, h, want);
      assert_near(DIM, got, want, 1e-12);
    }
  for (int l = 0; l < LAYERS; l++) layer_data_free(&x[l]);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

static void moments_are_symmetric_to_the_bit(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 2);
  oscar_calib *calib = make(c, 1, QUERY_HEADS, KV_HEADS, DIM);
  struct layer_data x = layer_data_make(TOKENS, QUERY_HEADS, KV_HEADS, DIM, 3);
  double m[DIM * DIM];
  assert_ok(c, feed(calib, 0, &x, 64));
  assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_QUERY_MOMENT, 0, 1, m));
  for (int i = 0; i < DIM; i++)
    for (int j = 0; j < DIM; j++) assert_true(m[i * DIM + j] == m[j * DIM + i]);
  layer_data_free(&x);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

static void chunks_do_not_matter(void **state) {
  (void)state;
  static const int chunks[] = {TOKENS, 1, 7, 64, 257};
  static const oscar_calib_statistic moments[] = {OSCAR_CALIB_QUERY_MOMENT, OSCAR_CALIB_OUTPUT_MOMENT, OSCAR_CALIB_PROXY_MOMENT};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct layer_data x = layer_data_make(TOKENS, QUERY_HEADS, KV_HEADS, DIM, 5);
  double got[DIM * DIM], want[ARRAY_LENGTH(moments)][DIM * DIM];
  for (size_t i = 0; i < ARRAY_LENGTH(chunks); i++) {
    oscar_calib *calib = make(c, 1, QUERY_HEADS, KV_HEADS, DIM);
    assert_ok(c, feed(calib, 0, &x, chunks[i]));
    assert_ok(c, oscar_calib_begin_proxy(calib));
    assert_ok(c, feed(calib, 0, &x, chunks[i]));
    assert_int_equal(oscar_calib_tokens(calib), TOKENS);
    for (size_t m = 0; m < ARRAY_LENGTH(moments); m++) {
      assert_ok(c, oscar_calib_get(calib, moments[m], 0, 1, i ? got : want[m]));
      if (i) assert_near(DIM * DIM, got, want[m], 1e-12);
    }
    oscar_calib_free(calib);
  }
  layer_data_free(&x);
  oscar_context_free(c);
}

/* S [n][n], S = causal softmax(q k' / sqrt(d)) of one query head. */
static void dense_softmax(const struct layer_data *x, int query_head, double *s) {
  int n = x->n, d = x->head_dim, kv_head = query_head / (x->query_heads / x->kv_heads);
  memset(s, 0, (size_t)n * (size_t)n * sizeof *s);
  for (int t = 0; t < n; t++) {
    double sum = 0;
    for (int j = 0; j <= t; j++) {
      double score = 0;
      for (int i = 0; i < d; i++)
        score += (double)row_of(x->q, x->query_heads, d, t, query_head)[i] * (double)row_of(x->k, x->kv_heads, d, j, kv_head)[i];
      sum += s[t * n + j] = exp(score / sqrt(d));
    }
    for (int j = 0; j <= t; j++) s[t * n + j] /= sum;
  }
}

static void the_output_moment_is_values_weighted_by_attention(void **state) {
  (void)state;
  enum { N = 60 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make(c, 1, QUERY_HEADS, KV_HEADS, DIM);
  struct layer_data x = layer_data_make(N, QUERY_HEADS, KV_HEADS, DIM, 21);
  static double s[N * N], gram[N * N];
  double want[KV_HEADS][DIM * DIM] = {{0}}, got[DIM * DIM];
  for (int h = 0; h < QUERY_HEADS; h++) {
    int kv = h / GROUP;
    dense_softmax(&x, h, s);
    for (int a = 0; a < N; a++) /* S'S */
      for (int b = 0; b < N; b++) {
        gram[a * N + b] = 0;
        for (int t = 0; t < N; t++) gram[a * N + b] += s[t * N + a] * s[t * N + b];
      }
    for (int i = 0; i < DIM; i++) /* V' (S'S) V */
      for (int j = 0; j < DIM; j++)
        for (int a = 0; a < N; a++)
          for (int b = 0; b < N; b++)
            want[kv][i * DIM + j] += gram[a * N + b] * (double)row_of(x.v, KV_HEADS, DIM, a, kv)[i] *
                                     (double)row_of(x.v, KV_HEADS, DIM, b, kv)[j] / (N * GROUP);
    for (int t = 0; t < N; t++) /* what a model would hand over */
      for (int i = 0; i < DIM; i++) {
        double o = 0;
        for (int j = 0; j <= t; j++) o += s[t * N + j] * (double)row_of(x.v, KV_HEADS, DIM, j, kv)[i];
        x.o[(t * QUERY_HEADS + h) * DIM + i] = (float)o;
      }
  }
  assert_ok(c, feed(calib, 0, &x, 25));
  for (int kv = 0; kv < KV_HEADS; kv++) {
    assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_OUTPUT_MOMENT, 0, kv, got));
    assert_near(DIM * DIM, got, want[kv], 1e-6);
  }
  layer_data_free(&x);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

static void the_proxy_equals_its_definition(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make(c, 1, QUERY_HEADS, KV_HEADS, DIM);
  struct layer_data x = layer_data_make(TOKENS, QUERY_HEADS, KV_HEADS, DIM, 8);
  double s[DIM * DIM], got[DIM * DIM], want[DIM * DIM] = {0};
  static double w[TOKENS];
  const int head = 1;
  assert_ok(c, feed(calib, 0, &x, 300));
  assert_ok(c, oscar_calib_begin_proxy(calib));
  assert_ok(c, feed(calib, 0, &x, 300));
  slow_moment(&x, x.q, head, s);
  double mean = 0;
  for (int t = 0; t < TOKENS; t++) {
    const float *k = row_of(x.k, KV_HEADS, DIM, t, head);
    w[t] = 0;
    for (int i = 0; i < DIM; i++)
      for (int j = 0; j < DIM; j++) w[t] += (double)k[i] * s[i * DIM + j] * (double)k[j];
    mean += w[t] / TOKENS;
  }
  for (int t = 0; t < TOKENS; t++) {
    const float *v = row_of(x.v, KV_HEADS, DIM, t, head);
    for (int i = 0; i < DIM; i++)
      for (int j = 0; j < DIM; j++) want[i * DIM + j] += w[t] / mean * (double)v[i] * (double)v[j] / TOKENS;
  }
  assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_PROXY_MOMENT, 0, head, got));
  assert_near(DIM * DIM, got, want, 1e-11);
  layer_data_free(&x);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

static void a_broken_model_is_named_and_leaves_no_trace(void **state) {
  (void)state;
  static const float bad[] = {NAN, INFINITY, -INFINITY};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make(c, 3, QUERY_HEADS, KV_HEADS, DIM);
  struct layer_data x = layer_data_make(20, QUERY_HEADS, KV_HEADS, DIM, 2);
  for (int l = 0; l < 3; l++) assert_ok(c, feed(calib, l, &x, 20));
  double before[DIM * DIM], after[DIM * DIM];
  assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_QUERY_MOMENT, 1, 0, before));
  float *const arrays[] = {x.q, x.k, x.v, x.o};
  static const char *const names[] = {"query", "key", "value", "output"};
  for (size_t a = 0; a < ARRAY_LENGTH(arrays); a++)
    for (size_t b = 0; b < ARRAY_LENGTH(bad); b++) {
      size_t at = (size_t)(7 * (arrays[a] == x.q || arrays[a] == x.o ? QUERY_HEADS : KV_HEADS) + 1) * DIM + 3;
      float old = arrays[a][at];
      arrays[a][at] = bad[b];
      assert_int_equal(feed(calib, 1, &x, 20), OSCAR_NUMERIC);
      assert_non_null(strstr(oscar_last_error(c), "layer 1"));
      assert_non_null(strstr(oscar_last_error(c), names[a]));
      assert_non_null(strstr(oscar_last_error(c), "head 1, token 7 of the chunk, channel 3"));
      arrays[a][at] = old;
    }
  assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_QUERY_MOMENT, 1, 0, after));
  assert_memory_equal(before, after, sizeof before);
  assert_ok(c, oscar_calib_begin_proxy(calib));
  x.v[5] = NAN;
  assert_int_equal(feed(calib, 2, &x, 20), OSCAR_NUMERIC);
  assert_non_null(strstr(oscar_last_error(c), "layer 2"));
  layer_data_free(&x);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

static void wrong_use_is_refused(void **state) {
  (void)state;
  static const oscar_calib_geometry wrong[] = {{0, 1, 1, 16},  {1, 0, 1, 16}, {1, 1, 0, 16},   {1, 3, 2, 16},
                                               {-1, 1, 1, 16}, {1, 1, 1, 0},  {1, 1, 1, 1025}, {1, 1, 2, 16}};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = NULL;
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) {
    assert_int_equal(oscar_calib_create(c, &wrong[i], &calib), OSCAR_INVALID_ARGUMENT);
    assert_null(calib);
  }
  calib = make(c, 2, QUERY_HEADS, KV_HEADS, DIM);
  struct layer_data x = layer_data_make(20, QUERY_HEADS, KV_HEADS, DIM, 2);
  double m[DIM * DIM];
  assert_int_equal(oscar_calib_get(calib, OSCAR_CALIB_KEY_MEAN, 0, 0, m), OSCAR_INVALID_ARGUMENT); /* no tokens */
  assert_int_equal(oscar_calib_begin_proxy(calib), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(feed(calib, 2, &x, 20), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(feed(calib, -1, &x, 20), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_calib_add(calib, 0, 0, x.q, x.k, x.v, x.o), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_calib_add(calib, 0, 20, x.q, x.k, x.v, NULL), OSCAR_INVALID_ARGUMENT);
  assert_ok(c, feed(calib, 0, &x, 20));
  assert_int_equal(oscar_calib_begin_proxy(calib), OSCAR_INVALID_ARGUMENT); /* layer 1 is missing */
  assert_non_null(strstr(oscar_last_error(c), "layer 1"));
  assert_ok(c, feed(calib, 1, &x, 20));
  assert_int_equal(oscar_calib_get(calib, OSCAR_CALIB_KEY_MEAN, 2, 0, m), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_calib_get(calib, OSCAR_CALIB_KEY_MEAN, 0, KV_HEADS, m), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_calib_get(calib, OSCAR_CALIB_PROXY_MOMENT, 0, 0, m), OSCAR_INVALID_ARGUMENT); /* one pass only */
  assert_int_equal(oscar_calib_get(calib, (oscar_calib_statistic)99, 0, 0, m), OSCAR_INVALID_ARGUMENT);
  assert_ok(c, oscar_calib_begin_proxy(calib));
  assert_int_equal(oscar_calib_begin_proxy(calib), OSCAR_INVALID_ARGUMENT);
  assert_ok(c, feed(calib, 0, &x, 20));
  assert_int_equal(oscar_calib_get(calib, OSCAR_CALIB_PROXY_MOMENT, 0, 0, m), OSCAR_INVALID_ARGUMENT); /* half a pass */
  assert_ok(c, feed(calib, 1, &x, 20));
  assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_PROXY_MOMENT, 0, 0, m));
  layer_data_free(&x);
  oscar_calib_free(calib);
  oscar_calib_free(NULL);
  oscar_context_free(c);
}

static void silence_gives_zeros_not_nans(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make(c, 1, QUERY_HEADS, KV_HEADS, DIM);
  struct layer_data x = layer_data_make(20, QUERY_HEADS, KV_HEADS, DIM, 2);
  memset(x.q, 0, 20 * QUERY_HEADS * DIM * sizeof *x.q); /* no query asks, so no key has weight */
  double m[DIM * DIM];
  assert_ok(c, feed(calib, 0, &x, 20));
  assert_ok(c, oscar_calib_begin_proxy(calib));
  assert_ok(c, feed(calib, 0, &x, 20));
  assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_PROXY_MOMENT, 0, 0, m));
  for (int i = 0; i < DIM * DIM; i++) assert_true(m[i] == 0);
  layer_data_free(&x);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

/* Pair t % 8 of channels sees queries along (3, 7) and keys along (7, -3): k S k' is zero up to the rounding of S, of either
 * sign. */
static void keys_nobody_looks_at_have_no_weight(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make(c, 1, 1, 1, DIM);
  struct layer_data x = layer_data_make(TOKENS, 1, 1, DIM, 12);
  uint64_t seed = 13;
  double m[DIM * DIM];
  memset(x.q, 0, TOKENS * DIM * sizeof *x.q);
  memset(x.k, 0, TOKENS * DIM * sizeof *x.k);
  for (int t = 0; t < TOKENS; t++) {
    float scale = (float)(test_random(&seed) % (1 << 21)); /* exact in float; the sums of squares need more than 53 bits */
    float *q = x.q + t * DIM + t % 8 * 2, *k = x.k + t * DIM + t % 8 * 2;
    q[0] = 3 * scale;
    q[1] = 7 * scale;
    k[0] = t ? 7 : 1; /* one key has a weight */
    k[1] = t ? -3 : 1;
  }
  for (int i = 0; i < 20; i++) assert_ok(c, feed(calib, 0, &x, 100));
  assert_ok(c, oscar_calib_begin_proxy(calib));
  for (int i = 0; i < 20; i++) assert_ok(c, feed(calib, 0, &x, 100));
  assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_PROXY_MOMENT, 0, 0, m));
  for (int i = 0; i < DIM; i++) assert_true(isfinite(m[i * DIM + i]) && m[i * DIM + i] >= 0);
  layer_data_free(&x);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(statistics_equal_their_definitions),
      cmocka_unit_test(moments_are_symmetric_to_the_bit),
      cmocka_unit_test(chunks_do_not_matter),
      cmocka_unit_test(the_output_moment_is_values_weighted_by_attention),
      cmocka_unit_test(the_proxy_equals_its_definition),
      cmocka_unit_test(a_broken_model_is_named_and_leaves_no_trace),
      cmocka_unit_test(wrong_use_is_refused),
      cmocka_unit_test(silence_gives_zeros_not_nans),
      cmocka_unit_test(keys_nobody_looks_at_have_no_weight),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
