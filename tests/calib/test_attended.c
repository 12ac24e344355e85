/* What attention does with coded keys, against its definition in double, query by query and key by key. */
#include "calib/attended.h"
#include "calib_data.h"

enum { QUERY_HEADS = 4, KV_HEADS = 2, GROUP = 2, DIM = 16, TOKENS = 700, SINK = 1, RECENT = 2 };

struct setup {
  int stride, window, chunk;
  bool rope, gram;
};

static oscar_rope *make_rope(oscar_context *c, oscar_rope_layout layout) {
  float frequencies[DIM / 2];
  oscar_rope *rope = NULL;
  for (int i = 0; i < DIM / 2; i++) frequencies[i] = (float)pow(300, -2.0 * i / DIM);
  assert_ok(c, oscar_rope_create(c, &(oscar_rope_spec){layout, DIM, frequencies}, &rope));
  return rope;
}

/* W_O'W_O of random W_O, per query head. */
static void make_gram(float *gram) {
  uint64_t seed = 5;
  for (int h = 0; h < QUERY_HEADS; h++) {
    double w[DIM][DIM];
    for (int i = 0; i < DIM; i++)
      for (int j = 0; j < DIM; j++) w[i][j] = (double)test_normal(&seed);
    for (int i = 0; i < DIM; i++)
      for (int j = 0; j < DIM; j++) {
        double sum = 0;
        for (int k = 0; k < DIM; k++) sum += w[k][i] * w[k][j];
        gram[(h * DIM + i) * DIM + j] = (float)sum;
      }
  }
}

static void round_rows(float *x, int n) {
  for (int i = 0; i < n; i++) x[i] = bf16_to_f32(f32_to_bf16(x[i]));
}

static oscar_calib *make(oscar_context *c, const struct setup *s, oscar_rope *rope, const float *gram) {
  oscar_calib *calib = NULL;
  oscar_calib_geometry g = {1, QUERY_HEADS, KV_HEADS, DIM};
  oscar_attended_options options;
  oscar_attended_options_default(&options);
  options.sink_pages = SINK;
  options.recent_pages = RECENT;
  options.query_stride = s->stride;
  assert_ok(c, oscar_calib_create(c, &g, &calib));
  assert_ok(c, oscar_calib_attend(calib, &options));
  assert_ok(c, oscar_calib_describe_layer(calib, 0, s->rope ? rope : NULL, s->window, s->gram ? gram : NULL));
  return calib;
}

struct truth { /* of one KV head */
  double metric[DIM * DIM], attended_key[DIM], attended_wave[DIM], attended, value_error, weights[TOKENS], value_weights[TOKENS];
};

static double inner(const double *a, const float *gram, const double *b) {
  double sum = 0;
  for (int i = 0; i < DIM; i++)
    for (int j = 0; j < DIM; j++) sum += a[i] * (gram ? (double)gram[i * DIM + j] : i == j) * b[j];
  return sum;
}

/* One query head, one query: adds to the head's sums. */
static void slow_query(const struct setup *s, const struct layer_data *x, const float *gram, int head, int t,
                       struct truth *truth) {
  int kv = head / GROUP, first = s->window > 0 && t >= s->window ? t - s->window + 1 : 0;
  const float *q = row_of(x->q, QUERY_HEADS, DIM, t, head), *o = row_of(x->o, QUERY_HEADS, DIM, t, head);
  const float *g = s->gram ? gram + head * DIM * DIM : NULL;
  double p[TOKENS], max = -INFINITY, sum = 0, total = 0, trace = 0;
  for (int j = first; j <= t; j++) {
    const float *k = row_of(x->k, KV_HEADS, DIM, j, kv);
    p[j] = 0;
    for (int i = 0; i < DIM; i++) p[j] += (double)q[i] * (double)k[i] / sqrt(DIM);
    max = fmax(max, p[j]);
  }
  for (int j = first; j <= t; j++) sum += p[j] = exp(p[j] - max);
  for (int i = 0; i < DIM; i++) trace += g ? (double)g[i * (DIM + 1)] : 1;
  for (int j = first; j <= t; j++) {
    int page = j / 64;
    if (page < SINK || page + RECENT >= t / 64) continue; /* read exactly */
    double away[DIM];
    for (int i = 0; i < DIM; i++) away[i] = (double)row_of(x->v, KV_HEADS, DIM, j, kv)[i] - (double)o[i];
    double square = pow(p[j] / sum, 2), weight = square * inner(away, g, away);
    truth->weights[j] += weight;
    truth->value_weights[j] += square;
    truth->value_error += square * trace / DIM;
    total += weight;
  }
  for (int i = 0; i < DIM; i++)
    for (int j = 0; j < DIM; j++) truth->metric[i * DIM + j] += total * (double)q[i] * (double)q[j] / DIM;
}

static void finish_truth(const struct layer_data *x, const oscar_rope *rope, int kv, struct truth *truth) {
  for (int j = 0; j < x->n; j++) {
    truth->attended += truth->weights[j];
    for (int i = 0; i < DIM; i++) truth->attended_key[i] += truth->weights[j] * (double)row_of(x->k, KV_HEADS, DIM, j, kv)[i];
    for (int i = 0; i < DIM / 2; i++) {
      double angle = (double)oscar_rope_describe(rope)->frequencies[i] * j;
      truth->attended_wave[i] += truth->weights[j] * cos(angle);
      truth->attended_wave[DIM / 2 + i] += truth->weights[j] * sin(angle);
    }
  }
}

static void check_plain_sums(const struct layer_data *x, const struct attended_layer *l, const oscar_rope *rope, int kv) {
  double moment[DIM * DIM] = {0}, values[DIM * DIM] = {0}, wave[DIM * DIM] = {0}, sum[DIM] = {0};
  for (int t = SINK * 64; t < x->n; t++) {
    const float *k = row_of(x->k, KV_HEADS, DIM, t, kv), *v = row_of(x->v, KV_HEADS, DIM, t, kv);
    for (int i = 0; i < DIM; i++) {
      sum[i] += (double)k[i];
      for (int j = 0; j < DIM; j++) {
        double angle = (double)oscar_rope_describe(rope)->frequencies[j % (DIM / 2)] * t;
        if (j <= i) moment[i * DIM + j] += (double)k[i] * (double)k[j];
        if (j <= i) values[i * DIM + j] += (double)v[i] * (double)v[j];
        wave[i * DIM + j] += (double)k[i] * (j < DIM / 2 ? cos(angle) : sin(angle));
      }
    }
  }
  assert_int_equal(l->tokens, x->n - SINK * 64);
  for (int i = 0; i < DIM; i++)
    for (int j = i + 1; j < DIM; j++) /* upper triangles are not kept */
      assert_true(l->heads[kv].key_moment[i * DIM + j] == 0);
  assert_near(DIM * DIM, l->heads[kv].key_moment, moment, 1e-12);
  assert_near(DIM * DIM, l->heads[kv].value_moment, values, 1e-12);
  assert_near(DIM, l->heads[kv].key_sum, sum, 1e-12);
  if (l->rotary_dim) assert_near(DIM * DIM, l->heads[kv].key_wave, wave, 1e-12);
}

static void check_setup(const struct setup *s) {
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 2);
  oscar_rope *rope = make_rope(c, OSCAR_ROPE_HALVES);
  static float gram[QUERY_HEADS * DIM * DIM];
  make_gram(gram);
  struct layer_data x = layer_data_make(TOKENS, QUERY_HEADS, KV_HEADS, DIM, 3);
  round_rows(x.k, TOKENS * KV_HEADS * DIM); /* what is kept of them */
  round_rows(x.v, TOKENS * KV_HEADS * DIM);
  oscar_calib *calib = make(c, s, rope, gram);
  assert_ok(c, feed(calib, 0, &x, s->chunk));
  attended_close_sequences(calib);
  attended_close_sequences(calib); /* counts nothing twice */
  const struct attended_layer *l = &calib->attended->layers[0];
  for (int kv = 0; kv < KV_HEADS; kv++) {
    static struct truth truth;
    memset(&truth, 0, sizeof truth);
    for (int head = kv * GROUP; head < (kv + 1) * GROUP; head++)
      for (int t = s->stride / 2; t < TOKENS; t += s->stride) slow_query(s, &x, gram, head, t, &truth);
    finish_truth(&x, rope, kv, &truth);
    double metric[DIM * DIM], mean[DIM];
    assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_KEY_METRIC, 0, kv, metric));
    assert_near(DIM * DIM, metric, truth.metric, 1e-4);
    assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_ATTENDED_KEY_MEAN, 0, kv, mean));
    for (int i = 0; i < DIM; i++) truth.attended_key[i] /= truth.attended;
    assert_near(DIM, mean, truth.attended_key, 1e-4);
    if (s->rope) assert_near(DIM, l->heads[kv].attended_wave, truth.attended_wave, 1e-4);
    assert_true(fabs(l->heads[kv].value_error / truth.value_error - 1) < 1e-4);
    assert_near(TOKENS, l->value_weights + kv * l->capacity, truth.value_weights, 1e-4);
    check_plain_sums(&x, l, rope, kv);
  }
  oscar_calib_free(calib);
  oscar_rope_release(rope);
  layer_data_free(&x);
  oscar_context_free(c);
}

static void weights_follow_their_definition(void **state) {
  (void)state;
  static const struct setup setups[] = {{1, 0, 700, true, true},   {1, 0, 64, true, true},    {3, 0, 97, true, true},
                                        {1, 300, 211, true, true}, {4, 0, 150, false, false}, {1, 0, 700, true, false}};
  for (size_t i = 0; i < ARRAY_LENGTH(setups); i++) check_setup(&setups[i]);
}

/* Two sequences: the second begins at position 0 again and sees nothing of the first. */
static void sequences_do_not_see_each_other(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_rope *rope = make_rope(c, OSCAR_ROPE_ADJACENT);
  const struct setup s = {1, 0, 256, true, false};
  struct layer_data x = layer_data_make(TOKENS, QUERY_HEADS, KV_HEADS, DIM, 8),
                    y = layer_data_make(500, QUERY_HEADS, KV_HEADS, DIM, 9);
  oscar_calib *both = make(c, &s, rope, NULL), *first = make(c, &s, rope, NULL), *second = make(c, &s, rope, NULL);
  assert_ok(c, feed(both, 0, &x, 256));
  oscar_calib_begin_sequence(both);
  assert_ok(c, feed(both, 0, &y, 256));
  assert_ok(c, feed(first, 0, &x, 256));
  assert_ok(c, feed(second, 0, &y, 256));
  double a[DIM * DIM], b[DIM * DIM], sum[DIM * DIM];
  assert_ok(c, oscar_calib_get(first, OSCAR_CALIB_KEY_METRIC, 0, 1, a));
  assert_ok(c, oscar_calib_get(second, OSCAR_CALIB_KEY_METRIC, 0, 1, b));
  for (int i = 0; i < DIM * DIM; i++) a[i] += b[i];
  assert_ok(c, oscar_calib_get(both, OSCAR_CALIB_KEY_METRIC, 0, 1, sum));
  assert_near(DIM * DIM, sum, a, 1e-12);
  assert_ok(c, oscar_calib_get(both, OSCAR_CALIB_ATTENDED_KEY_MEAN, 0, 1, sum));
  const struct attended_head *h[] = {&both->attended->layers[0].heads[1], &first->attended->layers[0].heads[1],
                                     &second->attended->layers[0].heads[1]};
  assert_true(fabs(h[0]->attended - h[1]->attended - h[2]->attended) < 1e-12 * h[0]->attended);
  oscar_calib_free(both);
  oscar_calib_free(first);
  oscar_calib_free(second);
  layer_data_free(&x);
  layer_data_free(&y);
  oscar_rope_release(rope);
  oscar_context_free(c);
}

static void sums_do_not_depend_on_threads(void **state) {
  (void)state;
  double metric[2][DIM * DIM];
  for (int i = 0; i < 2; i++) {
    oscar_context *c = test_context(OSCAR_ISA_AUTO, 1 + 2 * i);
    oscar_rope *rope = make_rope(c, OSCAR_ROPE_HALVES);
    const struct setup s = {2, 0, 300, true, false};
    struct layer_data x = layer_data_make(TOKENS, QUERY_HEADS, KV_HEADS, DIM, 8);
    oscar_calib *calib = make(c, &s, rope, NULL);
    assert_ok(c, feed(calib, 0, &x, 300));
    assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_KEY_METRIC, 0, 0, metric[i]));
    oscar_calib_free(calib);
    oscar_rope_release(rope);
    layer_data_free(&x);
    oscar_context_free(c);
  }
  assert_memory_equal(metric[0], metric[1], sizeof metric[0]);
}

static void wrong_calls_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib_geometry g = {2, QUERY_HEADS, KV_HEADS, DIM};
  oscar_attended_options options;
  oscar_attended_options_default(&options);
  oscar_calib *calib = NULL;
  assert_ok(c, oscar_calib_create(c, &g, &calib));
  double out[DIM * DIM];
  assert_int_equal(oscar_calib_describe_layer(calib, 0, NULL, 0, NULL), OSCAR_INVALID_ARGUMENT);
  options.query_stride = 0;
  assert_int_equal(oscar_calib_attend(calib, &options), OSCAR_INVALID_ARGUMENT);
  options.query_stride = 1;
  assert_ok(c, oscar_calib_attend(calib, &options));
  assert_int_equal(oscar_calib_attend(calib, &options), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_calib_describe_layer(calib, 2, NULL, 0, NULL), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_calib_describe_layer(calib, 0, NULL, -1, NULL), OSCAR_INVALID_ARGUMENT);
  static float gram[QUERY_HEADS * DIM * DIM];
  gram[7] = NAN;
  assert_int_equal(oscar_calib_describe_layer(calib, 0, NULL, 0, gram), OSCAR_NUMERIC);
  assert_ok(c, oscar_calib_describe_layer(calib, 0, NULL, 0, NULL));
  assert_int_equal(oscar_calib_describe_layer(calib, 0, NULL, 0, NULL), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_calib_get(calib, OSCAR_CALIB_KEY_METRIC, 0, 0, out), OSCAR_INVALID_ARGUMENT); /* no tokens */
  oscar_calib_free(calib);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(weights_follow_their_definition),
      cmocka_unit_test(sequences_do_not_see_each_other),
      cmocka_unit_test(sums_do_not_depend_on_threads),
      cmocka_unit_test(wrong_calls_are_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
