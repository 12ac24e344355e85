/* Graded codecs against what must hold of them, whatever the numbers: the basis, the crumbs, the budget, and what is lost. */
#include "calib_data.h"

#include "calib/attended.h"
#include "failing_alloc.h"
#include "quant/codec.h"

enum { LAYERS = 2, QUERY_HEADS = 4, KV_HEADS = 2, TOKENS = 700 };

static oscar_rope *make_rope(oscar_context *c, int d) {
  float frequencies[OSCAR_MAX_HEAD_DIM / 2];
  oscar_rope *rope = NULL;
  for (int i = 0; i < d / 2; i++) frequencies[i] = (float)pow(10000, -2.0 * i / d);
  assert_ok(c, oscar_rope_create(c, &(oscar_rope_spec){OSCAR_ROPE_HALVES, d, frequencies}, &rope));
  return rope;
}

/* The rotating mean that is planted in the keys of every head, and the fixed one. */
static float bias(int d, int i) { return 6 * sinf((float)(i + 1) * 1.7f) * (i % 3 == 0 ? 1 : 0.3f) / sqrtf((float)d) * 8; }

/* Keys: an uneven spectrum, a bias that turns; queries: uneven in other directions; outputs and values plain. */
static struct layer_data make_data(int d, uint64_t seed, bool turning) {
  struct layer_data x = layer_data_make(TOKENS, QUERY_HEADS, KV_HEADS, d, seed);
  for (int t = 0; t < TOKENS; t++) {
    for (int h = 0; h < QUERY_HEADS; h++)
      for (int i = 0; i < d; i++) x.q[(t * QUERY_HEADS + h) * d + i] *= 2 * expf(-(float)((i * 7) % d) / (float)d * 3);
    for (int h = 0; h < KV_HEADS; h++) {
      float *k = x.k + (t * KV_HEADS + h) * d;
      for (int i = 0; i < d; i++) k[i] = (k[i] + 0.5f) * expf(-(float)i / (float)d * 3) + 0.2f;
      for (int i = 0; turning && i < d / 2; i++) {
        double angle = (double)(float)pow(10000, -2.0 * i / d) * t;
        double b1 = (double)bias(d, i), b2 = (double)bias(d, i + d / 2);
        k[i] += (float)(b1 * cos(angle) - b2 * sin(angle));
        k[i + d / 2] += (float)(b1 * sin(angle) + b2 * cos(angle));
      }
    }
  }
  return x;
}

static oscar_calib *make_calib(oscar_context *c, int layers, int d, bool turning) {
  oscar_calib *calib = NULL;
  oscar_calib_geometry g = {layers, QUERY_HEADS, KV_HEADS, d};
  oscar_attended_options attended;
  oscar_attended_options_default(&attended);
  oscar_rope *rope = make_rope(c, d);
  assert_ok(c, oscar_calib_create(c, &g, &calib));
  assert_ok(c, oscar_calib_attend(calib, &attended));
  for (int l = 0; l < layers; l++) {
    struct layer_data x = make_data(d, 40 + (uint64_t)l, turning);
    assert_ok(c, oscar_calib_describe_layer(calib, l, rope, 0, NULL));
    assert_ok(c, feed(calib, l, &x, 300));
    layer_data_free(&x);
  }
  oscar_rope_release(rope);
  return calib;
}

static oscar_codec_set *fit(oscar_context *c, const oscar_calib *calib, const oscar_graded_options *options) {
  const oscar_calib_geometry *g = &calib->geometry;
  const oscar_codec_set_info info = {g->layers, g->kv_heads, g->head_dim, "graded", "print", "{}"};
  oscar_codec_set *set = NULL;
  assert_ok(c, oscar_calib_fit_graded(calib, &info, options, &set));
  return set;
}

static double key_error(oscar_context *c, const double *metric, const oscar_codec *codec, int d, bool turning);

/* A head keeps the pairs that it would miss most, as many as are asked for. */
static void the_dearest_pairs_are_kept(void **state) {
  (void)state;
  enum { D = 64 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make_calib(c, 1, D, true);
  static double metric[D * D];
  assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_KEY_METRIC, 0, 0, metric));
  oscar_graded_options options;
  oscar_graded_options_default(&options);
  assert_true(options.rotating_share == 0.5f);
  static const float shares[] = {1, .75f, .5f, .25f, .1f, 0};
  static const int expected[] = {32, 24, 16, 8, 3, 0};
  double error[ARRAY_LENGTH(shares)];
  bool was[D / 2];
  for (int k = 0; k < D / 2; k++) was[k] = true;
  for (size_t i = 0; i < ARRAY_LENGTH(shares); i++) {
    options.rotating_share = shares[i];
    oscar_codec_set *set = fit(c, calib, &options);
    const oscar_codec *codec = oscar_codec_set_get(set, 0, 0, OSCAR_KEYS);
    const oscar_codec_spec *s = oscar_codec_describe(codec);
    error[i] = key_error(c, metric, codec, D, true);
    printf("  %d pairs, error %.4g:", s->rotating_pairs, error[i] / error[0]);
    for (int k = 0; k < s->rotating_pairs; k++) printf(" %d", s->rotating_pair[k]);
    printf("\n");
    assert_int_equal(s->rotating_pairs, expected[i]);
    assert_int_equal(oscar_codec_describe(oscar_codec_set_get(set, 0, 1, OSCAR_KEYS))->rotating_pairs, expected[i]);
    assert_true((s->rope == NULL) == (expected[i] == 0));
    bool is[D / 2] = {false};
    for (int k = 0; k < s->rotating_pairs; k++) { /* of fewer pairs, all are among those of more */
      assert_true(was[s->rotating_pair[k]]);
      is[s->rotating_pair[k]] = true;
    }
    memcpy(was, is, sizeof was);
    oscar_codec_set_free(set);
  }
  /* all pairs have a mean here, larger than keys: even so half of the pairs hold most of it */
  assert_true(error[1] < 1.05 * error[0] && error[2] - error[0] < 0.1 * (error[5] - error[0]));
  for (size_t i = 1; i < ARRAY_LENGTH(shares); i++) assert_true(error[i] > 0.98 * error[i - 1]);
  /* further on, pairs have turned that do not within the text */
  int slowest[2];
  options.rotating_share = .5f;
  for (int far = 0; far < 2; far++) {
    options.positions = far ? 1000000 : 0;
    oscar_codec_set *set = fit(c, calib, &options);
    slowest[far] = oscar_codec_describe(oscar_codec_set_get(set, 0, 0, OSCAR_KEYS))->rotating_pair[D / 4 - 1];
    oscar_codec_set_free(set);
  }
  assert_true(slowest[1] > slowest[0]);
  for (int wrong = 0; wrong < 3; wrong++) {
    options.rotating_share = wrong == 0 ? -.1f : wrong == 1 ? 1.1f : NAN;
    oscar_codec_set *none = NULL;
    const oscar_codec_set_info info = {1, KV_HEADS, D, "graded", "print", "{}"};
    assert_int_equal(oscar_calib_fit_graded(calib, &info, &options, &none), OSCAR_INVALID_ARGUMENT);
    assert_non_null(strstr(oscar_last_error(c), "rotating_share"));
  }
  oscar_calib_free(calib);
  oscar_context_free(c);
}

/* moment [d][d] as of the same text `distance` further on: R X R' with R written out. */
static void shifted(int d, const double *x, double distance, double *out) {
  double *r = calloc((size_t)(d * d), sizeof *r), *half = calloc((size_t)(d * d), sizeof *half);
  assert_true(r && half);
  for (int i = 0; i < d / 2; i++) {
    const double angle = (double)(float)pow(10000, -2.0 * i / d) * distance;
    r[i * d + i] = r[(i + d / 2) * d + i + d / 2] = cos(angle);
    r[i * d + i + d / 2] = -sin(angle);
    r[(i + d / 2) * d + i] = sin(angle);
  }
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++)
      for (int k = 0; k < d; k++) half[i * d + j] += r[i * d + k] * x[k * d + j];
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) {
      out[i * d + j] = 0;
      for (int k = 0; k < d; k++) out[i * d + j] += half[i * d + k] * r[j * d + k];
    }
  free(r);
  free(half);
}

/* D M D' = V'B^-1 B B B^-1 V = I, with the ridge */
static void assert_errors_count_alike(const oscar_codec_spec *s, const double *metric, double mean) {
  const int d = s->head_dim;
  for (int i = 0; i < s->channels; i++)
    for (int j = 0; j < s->channels; j++) {
      double sum = 0;
      for (int a = 0; a < d; a++)
        for (int b = 0; b < d; b++)
          sum += (double)s->decode[i * d + a] * (metric[a * d + b] / mean + (a == b ? 0.05 : 0)) * (double)s->decode[j * d + b];
      assert_true(fabs(sum - (i == j)) < 1e-4);
    }
}

/* The metric of a codec for longer contexts is the average over windows that begin at 0, 1/15, ... of them. */
static void statistics_are_averaged_over_the_places_of_a_window(void **state) {
  (void)state;
  enum { D = 64, POSITIONS = 20000 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make_calib(c, 1, D, true);
  oscar_graded_options options;
  oscar_graded_options_default(&options);
  options.bits = 6;
  options.positions = POSITIONS;
  oscar_codec_set *set = fit(c, calib, &options);
  const oscar_codec_spec *s = oscar_codec_describe(oscar_codec_set_get(set, 0, 0, OSCAR_KEYS));
  static double metric[D * D], part[D * D], average[D * D];
  assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_KEY_METRIC, 0, 0, metric));
  double mean = 0;
  for (int i = 0; i < D; i++) mean += metric[i * (D + 1)] / D;
  for (int p = 0; p < 16; p++) {
    shifted(D, metric, POSITIONS * p / 15, part);
    for (int i = 0; i < D * D; i++) average[i] += part[i] / mean / 16;
  }
  assert_errors_count_alike(s, average, 1);
  oscar_codec_set_free(set);
  options.positions = -1;
  const oscar_codec_set_info info = {1, KV_HEADS, D, "graded", "print", "{}"};
  assert_int_equal(oscar_calib_fit_graded(calib, &info, &options, &set), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "positions"));
  oscar_calib_free(calib);
  oscar_context_free(c);
}

/* diag(E'E) is not the identity, but D E is, and E'M^-1 E is: E = B V. */
static void the_basis_makes_errors_count_alike(void **state) {
  (void)state;
  enum { D = 64 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make_calib(c, 1, D, true);
  oscar_graded_options options;
  oscar_graded_options_default(&options);
  options.bits = 6; /* so that few channels are dropped */
  oscar_codec_set *set = fit(c, calib, &options);
  static double metric[D * D];
  for (int h = 0; h < KV_HEADS; h++) {
    const oscar_codec_spec *s = oscar_codec_describe(oscar_codec_set_get(set, 0, h, OSCAR_KEYS));
    assert_true(s->channels > D / 2);
    for (int i = 0; i < s->channels; i++)
      for (int j = 0; j < s->channels; j++) {
        double sum = 0;
        for (int k = 0; k < D; k++) sum += (double)s->decode[i * D + k] * (double)s->encode[k * s->channels + j];
        assert_true(fabs(sum - (i == j)) < 1e-4);
      }
    assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_KEY_METRIC, 0, h, metric));
    double mean = 0;
    for (int i = 0; i < D; i++) mean += metric[i * (D + 1)] / D;
    assert_errors_count_alike(s, metric, mean);
  }
  oscar_codec_set_free(set);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

static void a_planted_bias_is_found(void **state) {
  (void)state;
  enum { D = 64 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make_calib(c, 1, D, true);
  oscar_graded_options options;
  oscar_graded_options_default(&options);
  options.rotating_share = 1;
  oscar_codec_set *set = fit(c, calib, &options);
  const oscar_codec_spec *s = oscar_codec_describe(oscar_codec_set_get(set, 0, 1, OSCAR_KEYS));
  assert_int_equal(s->rotating_pairs, D / 2);
  double error = 0, energy = 0;
  for (int i = 0; i < 20; i++) /* pairs that turn several times in the text; the slow ones share with the fixed mean */
    for (int k = 0; k < 2; k++) {
      error += pow((double)s->rotating_mean[2 * i + k] - (double)bias(D, i + k * D / 2), 2);
      energy += pow((double)bias(D, i + k * D / 2), 2);
    }
  assert_true(error < 0.02 * energy);
  options.rotating_mean = false;
  oscar_codec_set *fixed = fit(c, calib, &options);
  assert_null(oscar_codec_describe(oscar_codec_set_get(fixed, 0, 1, OSCAR_KEYS))->rope);
  oscar_codec_set_free(fixed);
  oscar_codec_set_free(set);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

/* Squared error, in the metric of the text, of keys that were not in it; what all keys have in common does not count (softmax).
 */
static double key_error(oscar_context *c, const double *metric, const oscar_codec *codec, int d, bool turning) {
  struct layer_data x = make_data(d, 99, turning);
  uint8_t *rows = malloc((size_t)TOKENS * oscar_codec_row_bytes(codec));
  float *back = malloc(sizeof(float) * (size_t)(TOKENS * d));
  double mean[OSCAR_MAX_HEAD_DIM] = {0}, e[OSCAR_MAX_HEAD_DIM], sum = 0;
  assert_ok(c, oscar_codec_encode(codec, 0, TOKENS, x.k, (size_t)(KV_HEADS * d), rows));
  oscar_codec_decode(codec, 0, TOKENS, rows, back, (size_t)d);
  for (int t = 0; t < TOKENS; t++)
    for (int i = 0; i < d; i++) mean[i] += ((double)back[t * d + i] - (double)row_of(x.k, KV_HEADS, d, t, 0)[i]) / TOKENS;
  for (int t = 0; t < TOKENS; t++) {
    for (int i = 0; i < d; i++) e[i] = (double)back[t * d + i] - (double)row_of(x.k, KV_HEADS, d, t, 0)[i] - mean[i];
    for (int i = 0; i < d; i++)
      for (int j = 0; j < d; j++) sum += e[i] * metric[i * d + j] * e[j];
  }
  free(rows);
  free(back);
  layer_data_free(&x);
  return sum;
}

static void graded_keys_lose_less_than_flat_ones(void **state) {
  (void)state;
  enum { D = 64 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (int turning = 0; turning < 2; turning++) {
    oscar_calib *calib = make_calib(c, 1, D, turning);
    oscar_graded_options options;
    oscar_graded_options_default(&options);
    oscar_codec_set *set = NULL, *flat = NULL, *one = NULL;
    for (options.bits = 1.75f; !set; options.bits += 0.25f) { /* until the keys have the crumbs that flat ones have */
      set = fit(c, calib, &options);
      if (oscar_codec_crumbs(oscar_codec_set_get(set, 0, 0, OSCAR_KEYS)) >= D) break;
      oscar_codec_set_free(set);
      set = NULL;
    }
    assert_int_equal(oscar_codec_crumbs(oscar_codec_set_get(set, 0, 0, OSCAR_KEYS)), D);
    options.key_form = OSCAR_ROW_GAIN;
    one = fit(c, calib, &options);
    const oscar_codec_set_info info = {1, KV_HEADS, D, "flat", "", ""};
    oscar_fit_options uniform;
    oscar_fit_options_default(&uniform);
    assert_ok(c, oscar_calib_fit(calib, &info, &uniform, &flat));
    static double metric[D * D];
    assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_KEY_METRIC, 0, 0, metric));
    double graded = key_error(c, metric, oscar_codec_set_get(set, 0, 0, OSCAR_KEYS), D, turning);
    double gain = key_error(c, metric, oscar_codec_set_get(one, 0, 0, OSCAR_KEYS), D, turning);
    double centred = key_error(c, metric, oscar_codec_set_get(flat, 0, 0, OSCAR_KEYS), D, turning);
    printf("  %s: error of keys relative to flat codes: log gains %.3f, one gain %.3f\n", turning ? "turning" : "still",
           graded / centred, gain / centred);
    assert_true(graded < 0.5 * centred);
    assert_true(graded < 1.05 * gain);
    oscar_codec_set_free(set);
    oscar_codec_set_free(one);
    oscar_codec_set_free(flat);
    oscar_calib_free(calib);
  }
  oscar_context_free(c);
}

static void every_size_and_budget_gives_a_set_that_keeps_it(void **state) {
  (void)state;
  if (test_only_threads()) return;
  static const int dims[] = {16, 48, 80, 128};
  static const float bits[] = {1.5f, 2, 3, 6};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t n = 0; n < ARRAY_LENGTH(dims); n++) {
    int d = dims[n];
    oscar_calib *calib = make_calib(c, LAYERS, d, true);
    for (size_t b = 0; b < ARRAY_LENGTH(bits); b++)
      for (int weighed = test_at_length() ? 0 : (int)(n + b) % 2; weighed < 2; weighed += rounds(2, 1)) {
        static const double costs[LAYERS] = {0.01, 30};
        oscar_graded_options options;
        oscar_graded_options_default(&options);
        options.bits = bits[b];
        options.layer_costs = weighed ? costs : NULL;
        oscar_codec_set *set = fit(c, calib, &options);
        assert_ok(c, oscar_codec_set_check(set));
        double crumbs = 0, of_layer[LAYERS] = {0};
        for (int l = 0; l < LAYERS; l++)
          for (int side = 0; side < 2; side++) {
            const oscar_codec *codec = oscar_codec_set_get(set, l, 0, (oscar_side)side);
            const oscar_codec_spec *spec = oscar_codec_describe(codec);
            crumbs += oscar_codec_crumbs(codec);
            of_layer[l] += oscar_codec_crumbs(codec);
            for (int i = 0; side == OSCAR_VALUES && i < spec->channels; i++) assert_true(spec->crumbs[i] >= 1);
            if (side == OSCAR_VALUES) assert_int_equal(spec->channels, d); /* nothing of a value is dropped */
            assert_true(codec->row_bytes == (size_t)oscar_codec_crumbs(codec) / 4 + 2);
          }
        double wanted = fmax(round((double)bits[b] * d / 16), d / 16 + 1) * 16;
        if (fabs(crumbs / LAYERS - wanted) > 1e-9)
          fail_msg("head_dim %d, %g bits: %g crumbs", d, (double)bits[b], crumbs / LAYERS);
        if (weighed && bits[b] == 2 && d >= 64) assert_true(of_layer[1] > of_layer[0]);
        if (!weighed) assert_true(of_layer[1] == of_layer[0]);
        oscar_codec_set_free(set);
      }
    oscar_calib_free(calib);
  }
  oscar_context_free(c);
}

/* Constant keys, dead channels, no attention to codes, one token repeated: a codec that later rows can be coded with. */
static void degenerate_statistics_give_codecs_that_work(void **state) {
  (void)state;
  enum { D = 64 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (int kind = 0; kind < 4; kind++) {
    oscar_calib *calib = NULL;
    oscar_calib_geometry g = {1, QUERY_HEADS, KV_HEADS, D};
    oscar_attended_options attended;
    oscar_attended_options_default(&attended);
    oscar_rope *rope = make_rope(c, D);
    assert_ok(c, oscar_calib_create(c, &g, &calib));
    assert_ok(c, oscar_calib_attend(calib, &attended));
    assert_ok(c, oscar_calib_describe_layer(calib, 0, kind == 3 ? rope : NULL, 0, NULL));
    struct layer_data x = make_data(D, 7, false);
    for (int i = 0; i < TOKENS * KV_HEADS * D; i++) {
      if (kind == 0) x.k[i] = x.v[i] = (float)(i % D) - 20;
      if (kind == 1 && i % 4 == 1) x.k[i] = x.v[i] = 0;
      if (kind == 3) x.k[i] = x.k[i % (KV_HEADS * D)];
    }
    for (int i = 0; kind == 1 && i < TOKENS * QUERY_HEADS * D; i += 3) x.q[i] = 0;
    x.n = kind == 2 ? 200 : TOKENS; /* 200 tokens: no query reads codes */
    assert_ok(c, feed(calib, 0, &x, 100));
    oscar_graded_options options;
    oscar_graded_options_default(&options);
    oscar_codec_set *set = fit(c, calib, &options);
    struct layer_data later = make_data(D, 11, false);
    for (int side = 0; side < 2; side++) {
      const oscar_codec *codec = oscar_codec_set_get(set, 0, 0, (oscar_side)side);
      uint8_t row[256];
      float back[D];
      for (int t = 0; t < 200; t++) {
        assert_ok(c, oscar_codec_encode(codec, t, 1, row_of(side ? later.v : later.k, KV_HEADS, D, t, 0), D, row));
        oscar_codec_decode(codec, t, 1, row, back, D);
        for (int i = 0; i < D; i++) assert_true(isfinite(back[i]));
      }
    }
    oscar_codec_set_free(set);
    layer_data_free(&x);
    layer_data_free(&later);
    oscar_rope_release(rope);
    oscar_calib_free(calib);
  }
  oscar_context_free(c);
}

static void fits_are_the_same_every_time_and_refuse_what_cannot_be(void **state) {
  (void)state;
  enum { D = 32 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 2);
  oscar_calib *calib = make_calib(c, 1, D, true), *plain = NULL;
  oscar_graded_options options;
  oscar_graded_options_default(&options);
  oscar_codec_set *a = fit(c, calib, &options), *b = fit(c, calib, &options), *none = NULL;
  for (int side = 0; side < 2; side++) {
    const oscar_codec *x = oscar_codec_set_get(a, 0, 1, (oscar_side)side), *y = oscar_codec_set_get(b, 0, 1, (oscar_side)side);
    assert_memory_equal(x->map, y->map, sizeof(float) * (size_t)x->map_rows * D);
    assert_memory_equal(x->spec.encode, y->spec.encode, sizeof(float) * (size_t)(x->spec.channels * D));
  }
  const oscar_codec_set_info info = {1, KV_HEADS, D, "graded", "", ""};
  const oscar_calib_geometry g = {1, QUERY_HEADS, KV_HEADS, D};
  const double nan_cost = NAN;
  oscar_graded_options wrong[] = {options, options, options, options, options};
  wrong[0].bits = 1;
  wrong[1].ridge = 0;
  wrong[2].mixing = 12;
  wrong[3].key_form = OSCAR_ROW_SCALE_ZERO;
  wrong[4].layer_costs = &nan_cost;
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++)
    assert_int_equal(oscar_calib_fit_graded(calib, &info, &wrong[i], &none), OSCAR_INVALID_ARGUMENT);
  assert_ok(c, oscar_calib_create(c, &g, &plain));
  assert_int_equal(oscar_calib_fit_graded(plain, &info, &options, &none), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "attend"));
  assert_null(none);
  oscar_codec_set_free(a);
  oscar_codec_set_free(b);
  oscar_calib_free(plain);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

static void running_out_of_memory_leaks_nothing(void **state) {
  (void)state;
  enum { D = 16 };
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  oscar_calib *calib = make_calib(c, 1, D, true);
  const oscar_codec_set_info info = {1, KV_HEADS, D, "graded", "", ""};
  oscar_graded_options options;
  oscar_graded_options_default(&options);
  oscar_codec_set *set = NULL;
  sweep_allocations(c, &f, oscar_calib_fit_graded(calib, &info, &options, &set));
  oscar_codec_set_free(set);
  oscar_calib_free(calib);
  failing_context_free(c, &f);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_basis_makes_errors_count_alike),
      cmocka_unit_test(a_planted_bias_is_found),
      cmocka_unit_test(statistics_are_averaged_over_the_places_of_a_window),
      cmocka_unit_test(the_dearest_pairs_are_kept),
      cmocka_unit_test(graded_keys_lose_less_than_flat_ones),
      cmocka_unit_test(every_size_and_budget_gives_a_set_that_keeps_it),
      cmocka_unit_test(degenerate_statistics_give_codecs_that_work),
      cmocka_unit_test(fits_are_the_same_every_time_and_refuse_what_cannot_be),
      cmocka_unit_test(running_out_of_memory_leaks_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
