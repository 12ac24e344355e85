/* Diagnostics of a head against a slow computation in double that applies the reading rule page by page; spectra against numbers
 * worked out by hand. */
#include "failing_alloc.h"

#include "eval/diagnostics.h"
#include "eval/spectra.h"

enum { D = 16, GROUP = 2, TOKENS = 6 * 64 + 20, STRIDE = 7, SAMPLES = TOKENS / STRIDE };

static float keys[TOKENS * D], values[TOKENS * D], queries[SAMPLES * GROUP * D];
static int positions[SAMPLES];

static void make_data(uint64_t seed) {
  for (int i = 0; i < TOKENS * D; i++) {
    keys[i] = test_normal(&seed) * (float)(1 + i % D) / 4 + (float)(i % 3);
    values[i] = test_normal(&seed);
  }
  for (int i = 0; i < SAMPLES * GROUP * D; i++) queries[i] = test_normal(&seed);
  for (int i = 0; i < SAMPLES; i++) positions[i] = (i + 1) * STRIDE - 1;
}

static struct head_view view_of(int sink, int recent, int window) {
  return (struct head_view){.tokens = TOKENS,
                            .head_dim = D,
                            .group = GROUP,
                            .samples = SAMPLES,
                            .positions = positions,
                            .q = queries,
                            .k = keys,
                            .v = values,
                            .window = window,
                            .sink_pages = sink,
                            .recent_pages = recent};
}

/* Codecs of `crumbs` per channel without means, Hadamard-rotated. */
static oscar_codec_set *codecs_of(oscar_context *c, int crumbs) {
  const oscar_codec_set_info info = {1, 1, D, "test", "", ""};
  const oscar_plain_options options = {true, crumbs, 0, 1, 1};
  oscar_codec_set *set = NULL;
  assert_ok(c, oscar_codec_set_create_plain(c, &info, &options, &set));
  return set;
}

/* A key codec whose mean turns with the position. */
static oscar_codec *rotating_codec(oscar_context *c) {
  const float frequencies[D / 2] = {1, 0.5f, 0.25f, 0.1f, 0.05f, 0.02f, 0.01f, 0.005f}, mean[4] = {6, 0, 2, 5};
  const uint16_t pairs[2] = {0, 3};
  oscar_rope *rope = NULL;
  oscar_codec *codec = NULL;
  assert_ok(c, oscar_rope_create(c, &(oscar_rope_spec){OSCAR_ROPE_ADJACENT, D, frequencies}, &rope));
  const oscar_codec_spec spec = {.head_dim = D,
                                 .channels = D,
                                 .form = OSCAR_ROW_GAIN,
                                 .groups = 1,
                                 .rope = rope,
                                 .rotating_pairs = 2,
                                 .rotating_pair = pairs,
                                 .rotating_mean = mean};
  assert_ok(c, oscar_codec_create(c, &spec, &codec));
  oscar_rope_release(rope);
  return codec;
}

static void decode_row(const oscar_codec *codec, int position, const float *x, float *decoded) {
  uint8_t row[4 * D + 64];
  assert_true(oscar_codec_row_bytes(codec) <= sizeof row);
  assert_int_equal(oscar_codec_encode(codec, position, 1, x, D, row), OSCAR_OK);
  oscar_codec_decode(codec, position, 1, row, decoded, D);
}

/* The definition, one query at a time. */
static void slow_query(const struct head_view *view, const oscar_codec *key_codec, const oscar_codec *value_codec, int sample,
                       int head, struct head_sums *sums) {
  static double s[TOKENS], changed[TOKENS], value[TOKENS][D];
  static bool coded[TOKENS];
  const int t = positions[sample], page = t / 64;
  const float *q = queries + (sample * GROUP + head) * D;
  const int first = view->window > 0 && t - view->window + 1 > 0 ? t - view->window + 1 : 0;
  double mean = 0, z = 0, z_changed = 0;
  int n = 0;
  for (int j = first; j <= t; j++) {
    const int p = j / 64;
    coded[j] = !(p < view->sink_pages || p + view->recent_pages >= page);
    float k[D], v[D];
    memcpy(k, keys + j * D, sizeof k);
    memcpy(v, values + j * D, sizeof v);
    if (coded[j]) {
      decode_row(key_codec, j, keys + j * D, k);
      decode_row(value_codec, j, values + j * D, v);
    }
    s[j] = changed[j] = 0;
    for (int i = 0; i < D; i++) {
      s[j] += (double)q[i] * (double)keys[j * D + i] / sqrt(D);
      changed[j] += (double)q[i] * (double)k[i] / sqrt(D);
      value[j][i] = (double)v[i];
    }
    n += coded[j];
    mean += coded[j] ? s[j] : 0;
    z += exp(s[j]);
    z_changed += exp(changed[j]);
  }
  if (n == 0) return;
  double o[4][D] = {{0}};
  sums->queries++;
  sums->pairs += n;
  for (int j = first; j <= t; j++) {
    const double p = exp(s[j]) / z, p_changed = exp(changed[j]) / z_changed;
    if (coded[j]) {
      sums->logit_signal += (s[j] - mean / n) * (s[j] - mean / n);
      sums->logit_error += (changed[j] - s[j]) * (changed[j] - s[j]);
      sums->coded_mass += p;
    }
    for (int i = 0; i < D; i++) {
      const double exact = (double)values[j * D + i];
      o[0][i] += p * exact;
      o[1][i] += p_changed * exact;
      o[2][i] += p * value[j][i];
      o[3][i] += p_changed * value[j][i];
    }
  }
  for (int i = 0; i < D; i++) {
    sums->output_signal += o[0][i] * o[0][i];
    sums->output_error_keys += (o[1][i] - o[0][i]) * (o[1][i] - o[0][i]);
    sums->output_error_values += (o[2][i] - o[0][i]) * (o[2][i] - o[0][i]);
    sums->output_error_both += (o[3][i] - o[0][i]) * (o[3][i] - o[0][i]);
  }
}

static void assert_near(double got, double expected) {
  if (!(fabs(got - expected) <= 2e-4 * fabs(expected))) fail_msg("%.9g, expected %.9g", got, expected);
}

static void sums_are_their_definition_in_double(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 2);
  static const struct {
    int crumbs, sink, recent, window;
    bool rotating;
  } cases[] = {{1, 1, 1, 0, false},   {1, 0, 0, 0, false},  {2, 2, 1, 0, false}, {1, 1, 4, 0, false},
               {1, 1, 1, 150, false}, {1, 0, 1, 70, false}, {4, 1, 2, 0, false}, {1, 2, 1, 0, true}};
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    make_data(i + 1);
    oscar_codec_set *set = codecs_of(c, cases[i].crumbs);
    oscar_codec *rotating = rotating_codec(c);
    const oscar_codec *k = cases[i].rotating ? rotating : oscar_codec_set_get(set, 0, 0, OSCAR_KEYS);
    const oscar_codec *v = oscar_codec_set_get(set, 0, 0, OSCAR_VALUES);
    const struct head_view view = view_of(cases[i].sink, cases[i].recent, cases[i].window);
    struct head_sums got[GROUP] = {{0}}, expected[GROUP] = {{0}};
    assert_ok(c, diagnose_head(c, &view, k, v, got));
    for (int s = 0; s < SAMPLES; s++)
      for (int h = 0; h < GROUP; h++) slow_query(&view, k, v, s, h, &expected[h]);
    for (int h = 0; h < GROUP; h++) {
      assert_true(expected[h].queries > 0);
      assert_int_equal(got[h].queries, expected[h].queries);
      assert_int_equal(got[h].pairs, expected[h].pairs);
      assert_near(got[h].logit_signal, expected[h].logit_signal);
      assert_near(got[h].logit_error, expected[h].logit_error);
      assert_near(got[h].output_signal, expected[h].output_signal);
      assert_near(got[h].output_error_keys, expected[h].output_error_keys);
      assert_near(got[h].output_error_values, expected[h].output_error_values);
      assert_near(got[h].output_error_both, expected[h].output_error_both);
      assert_near(got[h].coded_mass, expected[h].coded_mass);
    }
    oscar_codec_release(rotating);
    oscar_codec_set_free(set);
  }
  oscar_context_free(c);
}

static void eight_bits_are_nearly_exact_and_errors_of_both_sides_add(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 2);
  make_data(7);
  double previous = 0;
  static const int crumbs[] = {1, 2, 4};
  for (int i = 0; i < 3; i++) {
    oscar_codec_set *set = codecs_of(c, crumbs[i]);
    const struct head_view view = view_of(1, 1, 0);
    struct head_sums sums[GROUP] = {{0}};
    assert_ok(c, diagnose_head(c, &view, oscar_codec_set_get(set, 0, 0, OSCAR_KEYS), oscar_codec_set_get(set, 0, 0, OSCAR_VALUES),
                               sums));
    head_sums_add(&sums[0], &sums[1]);
    const struct head_errors e = head_errors_of(&sums[0]);
    printf("  %d bits: logits %.1f dB, output %.1f (keys) %.1f (values) %.1f (both), %.2f of the attention on codes\n",
           2 * crumbs[i], e.logit_snr, e.output_snr_keys, e.output_snr_values, e.output_snr_both, e.coded_mass);
    assert_true(e.logit_snr > previous + 6);
    assert_true(e.coded_mass > 0 && e.coded_mass < 1);
    assert_true(e.output_snr_both < e.output_snr_keys + 0.5 && e.output_snr_both < e.output_snr_values + 0.5);
    if (crumbs[i] == 4) {
      assert_true(e.logit_snr > 40 && e.output_snr_both > 40);
      /* errors of keys and values are independent: their energies add */
      const double added = sums[0].output_error_keys + sums[0].output_error_values;
      assert_true(fabs(sums[0].output_error_both / added - 1) < 0.1);
    }
    previous = e.logit_snr;
    oscar_codec_set_free(set);
  }
  oscar_context_free(c);
}

static void without_coded_keys_there_is_nothing_to_measure(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  make_data(3);
  oscar_codec_set *set = codecs_of(c, 1);
  const oscar_codec *k = oscar_codec_set_get(set, 0, 0, OSCAR_KEYS), *v = oscar_codec_set_get(set, 0, 0, OSCAR_VALUES);
  const struct head_view all_exact[] = {view_of(1, 6, 0), view_of(7, 0, 0), view_of(1, 5, 0), view_of(0, 2, 64)};
  for (size_t i = 0; i < ARRAY_LENGTH(all_exact); i++) {
    struct head_sums sums[GROUP] = {{0}};
    assert_ok(c, diagnose_head(c, &all_exact[i], k, v, sums));
    const struct head_errors e = head_errors_of(&sums[0]);
    assert_int_equal(sums[0].queries, 0);
    assert_true(isnan(e.logit_snr) && isnan(e.output_snr_both) && isnan(e.coded_mass));
  }
  struct head_view none = view_of(1, 1, 0);
  none.samples = 0;
  struct head_sums sums[GROUP] = {{0}};
  assert_ok(c, diagnose_head(c, &none, k, v, sums));
  assert_int_equal(sums[0].queries, 0);
  assert_true(isinf(head_errors_of(&(struct head_sums){.queries = 1, .output_signal = 1}).output_snr_keys));
  oscar_codec_set_free(set);
  oscar_context_free(c);
}

static void running_out_of_memory_leaves_nothing(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  make_data(4);
  oscar_codec_set *set = codecs_of(c, 1);
  const struct head_view view = view_of(1, 1, 0);
  struct head_sums sums[GROUP] = {{0}};
  sweep_allocations(
      c, &f,
      diagnose_head(c, &view, oscar_codec_set_get(set, 0, 0, OSCAR_KEYS), oscar_codec_set_get(set, 0, 0, OSCAR_VALUES), sums));
  assert_true(sums[0].queries > 0);
  oscar_codec_set_free(set);
  struct spectra *spectra = NULL;
  sweep_allocations(c, &f, spectra_create(c, 3, D, &spectra));
  spectra_free(spectra);
  failing_context_free(c, &f);
}

/* Rows +-a_i e_i make diagonal moments: C = diag(a_i^2 / d), M likewise, and the products follow. */
static void spectra_are_what_is_worked_out_by_hand(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  enum { ROWS = 2 * D };
  static float q[ROWS * D], k[ROWS * D], v[ROWS * D];
  for (int i = 0; i < D; i++)
    for (int sign = 0; sign < 2; sign++) {
      float *at = q + (2 * i + sign) * D;
      for (int j = 0; j < D; j++) k[(2 * i + sign) * D + j] = 5; /* a mean, which is taken out */
      at[i] = sign ? -1 : 1;
      k[(2 * i + sign) * D + i] += (float)(i + 1) * (sign ? -1.0f : 1.0f);
      v[(2 * i + sign) * D + i] = 2 * (sign ? -1.0f : 1.0f);
    }
  struct spectra *s;
  assert_ok(c, spectra_create(c, 2, D, &s));
  spectra_add(s, 1, ROWS / 2, q, ROWS, k, v); /* axes 0 .. 7 of the queries, in two parts */
  spectra_add(s, 1, ROWS / 2, q + ROWS / 2 * D, 0, k, v);
  double m[D], keys_of[D], logits[D], values_of[D];
  assert_ok(c, spectra_eigenvalues(s, 1, m, keys_of, logits, values_of));
  for (int i = 0; i < D; i++) {
    const double a = D - i;
    assert_near(m[i], 1.0 / D);
    assert_near(keys_of[i], a * a / D);
    assert_near(logits[i], a * a / D * 1.05 / D);
    assert_near(values_of[i], 4.0 / D);
  }
  assert_ok(c, spectra_eigenvalues(s, 0, m, keys_of, logits, values_of)); /* nothing was added here */
  for (int i = 0; i < D; i++) assert_true(m[i] == 0 && keys_of[i] == 0 && logits[i] == 0 && values_of[i] == 0);
  spectra_free(s);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(sums_are_their_definition_in_double),
                                     cmocka_unit_test(eight_bits_are_nearly_exact_and_errors_of_both_sides_add),
                                     cmocka_unit_test(without_coded_keys_there_is_nothing_to_measure),
                                     cmocka_unit_test(running_out_of_memory_leaves_nothing),
                                     cmocka_unit_test(spectra_are_what_is_worked_out_by_hand)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
