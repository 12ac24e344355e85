/* Fits against planted spectra: what was put into the statistics must come out of the rotation, whatever the statistics are like.
 */
#include "calib_data.h"
#include "failing_alloc.h"

#include <oscar/rotation.h>

static oscar_codec_set_info info_of(int layers, int kv_heads, int d) {
  return (oscar_codec_set_info){layers, kv_heads, d, "int2", "print", "{}"};
}

static oscar_calib *make(oscar_context *c, int layers, int query_heads, int kv_heads, int d) {
  oscar_calib *calib = NULL;
  oscar_calib_geometry g = {layers, query_heads, kv_heads, d};
  assert_ok(c, oscar_calib_create(c, &g, &calib));
  return calib;
}

/* A calibration of random data, every layer different. */
static oscar_calib *make_random(oscar_context *c, int layers, int query_heads, int kv_heads, int d) {
  oscar_calib *calib = make(c, layers, query_heads, kv_heads, d);
  for (int l = 0; l < layers; l++) {
    struct layer_data x = layer_data_make(3 * d, query_heads, kv_heads, d, 77 + (uint64_t)l);
    assert_ok(c, feed(calib, l, &x, 3 * d));
    layer_data_free(&x);
  }
  return calib;
}

static oscar_codec_set *fit(oscar_context *c, const oscar_calib *calib, const oscar_fit_options *options, int layers,
                            int kv_heads, int d) {
  oscar_codec_set *set = NULL;
  oscar_codec_set_info info = info_of(layers, kv_heads, d);
  assert_ok(c, oscar_calib_fit(calib, &info, options, &set));
  return set;
}

static const oscar_codec_spec *spec_of(const oscar_codec_set *set, int layer, int head, oscar_side side) {
  const oscar_codec *codec = oscar_codec_set_get(set, layer, head, side);
  assert_non_null(codec);
  return oscar_codec_describe(codec);
}

/* w [d][d]: random orthonormal rows (Gram-Schmidt, twice for accuracy). */
static void random_basis(int d, uint64_t seed, double *w) {
  for (int i = 0; i < d; i++) {
    for (int k = 0; k < d; k++) w[i * d + k] = (double)test_normal(&seed);
    for (int pass = 0; pass < 2; pass++)
      for (int j = 0; j < i; j++) {
        double dot = 0;
        for (int k = 0; k < d; k++) dot += w[i * d + k] * w[j * d + k];
        for (int k = 0; k < d; k++) w[i * d + k] -= dot * w[j * d + k];
      }
    double norm = 0;
    for (int k = 0; k < d; k++) norm += w[i * d + k] * w[i * d + k];
    for (int k = 0; k < d; k++) w[i * d + k] /= sqrt(norm);
  }
}

/* rows[t] = sqrt(lambda_t) w_t for t < d: their moment is exactly sum lambda_t w_t'w_t / d. lambda = (t + 1)^2. */
static void plant(int d, const double *w, float *rows) {
  for (int t = 0; t < d; t++)
    for (int i = 0; i < d; i++) rows[t * d + i] = (float)((t + 1) * w[t * d + i]);
}

/* U back from R = U H P: un-permute the columns, multiply with H' (orthogonal). */
static void undo(oscar_context *c, int d, const float *r, double *u) {
  float *h = malloc((size_t)d * (size_t)d * sizeof *h);
  double *uh = malloc((size_t)d * (size_t)d * sizeof *uh);
  int *perm = malloc((size_t)d * sizeof *perm);
  assert_ok(c, oscar_hadamard(c, d, h));
  oscar_bit_reversal(d, perm);
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) uh[i * d + perm[j]] = (double)r[i * d + j];
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) {
      u[i * d + j] = 0;
      for (int k = 0; k < d; k++) u[i * d + j] += uh[i * d + k] * (double)h[j * d + k];
    }
  free(h);
  free(uh);
  free(perm);
}

static void planted_directions_are_found_in_order(void **state) {
  (void)state;
  enum { D = 64 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make(c, 1, 1, 1, D);
  static double keys[D * D], values[D * D], u[D * D];
  struct layer_data x = layer_data_make(D, 1, 1, D, 4);
  random_basis(D, 1, keys);
  random_basis(D, 2, values);
  plant(D, keys, x.q);
  plant(D, values, x.o);
  assert_ok(c, feed(calib, 0, &x, D));
  oscar_fit_options options;
  oscar_fit_options_default(&options);
  oscar_codec_set *set = fit(c, calib, &options, 1, 1, D);
  for (int side = 0; side < 2; side++) {
    const double *w = side == OSCAR_KEYS ? keys : values;
    undo(c, D, spec_of(set, 0, 0, (oscar_side)side)->encode, u);
    for (int j = 0; j < D; j++) { /* column j of U is w_j up to sign: ascending importance */
      double dot = 0, largest = 0;
      for (int i = 0; i < D; i++) {
        dot += u[i * D + j] * w[j * D + i];
        if (fabs(u[i * D + j]) > fabs(largest)) largest = u[i * D + j];
      }
      if (!(fabs(fabs(dot) - 1) < 1e-5)) fail_msg("side %d, column %d: |cos| = %g", side, j, fabs(dot));
      assert_true(largest > 0); /* the sign is fixed */
    }
  }
  oscar_codec_set_free(set);
  layer_data_free(&x);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

/* diag(R' S R), S from the calibration. */
static void importance(int d, const double *s, const float *r, double *out) {
  for (int j = 0; j < d; j++) {
    out[j] = 0;
    for (int a = 0; a < d; a++)
      for (int b = 0; b < d; b++) out[j] += (double)r[a * d + j] * s[a * d + b] * (double)r[b * d + j];
  }
}

static void every_channel_becomes_equally_important(void **state) {
  (void)state;
  static const int dims[] = {16, 32, 64, 80, 96};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t n = 0; n < ARRAY_LENGTH(dims); n++) {
    int d = dims[n];
    oscar_calib *calib = make_random(c, 1, 2, 2, d);
    double *s = malloc((size_t)d * (size_t)d * sizeof *s), *diagonal = malloc((size_t)d * sizeof *diagonal);
    oscar_fit_options options;
    oscar_fit_options_default(&options);
    oscar_codec_set *set = fit(c, calib, &options, 1, 2, d);
    for (int head = 0; head < 2; head++)
      for (int side = 0; side < 2; side++) {
        const float *r = spec_of(set, 0, head, (oscar_side)side)->encode;
        assert_true(oscar_rotation_orthogonality(d, r) < 1e-6);
        assert_ok(c, oscar_calib_get(calib, side ? OSCAR_CALIB_OUTPUT_MOMENT : OSCAR_CALIB_QUERY_MOMENT, 0, head, s));
        importance(d, s, r, diagonal);
        double mean = 0;
        for (int i = 0; i < d; i++) mean += s[i * d + i] / d;
        for (int i = 0; i < d; i++)
          if (!(fabs(diagonal[i] / mean - 1) < 1e-5)) fail_msg("d %d, channel %d: %g, mean %g", d, i, diagonal[i], mean);
      }
    oscar_codec_set_free(set);
    free(s);
    free(diagonal);
    oscar_calib_free(calib);
  }
  oscar_context_free(c);
}

static void one_rotation_a_layer_is_fitted_to_the_mean_over_heads(void **state) {
  (void)state;
  enum { D = 32, N = 96 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct layer_data x = layer_data_make(N, 4, 2, D, 31), merged = layer_data_make(N, 4, 1, D, 31);
  memcpy(merged.q, x.q, N * 4 * D * sizeof *x.q); /* the four query heads as one group: the same rows, the same mean */
  memcpy(merged.o, x.o, N * 4 * D * sizeof *x.o);
  oscar_calib *two = make(c, 1, 4, 2, D), *one = make(c, 1, 4, 1, D);
  assert_ok(c, feed(two, 0, &x, N));
  assert_ok(c, feed(one, 0, &merged, N));
  oscar_fit_options options;
  oscar_fit_options_default(&options);
  options.per_head = false;
  options.remove_means = false;
  oscar_codec_set *shared = fit(c, two, &options, 1, 2, D), *want = fit(c, one, &options, 1, 1, D);
  for (int side = 0; side < 2; side++) {
    const float *r = spec_of(shared, 0, 0, (oscar_side)side)->encode, *w = spec_of(want, 0, 0, (oscar_side)side)->encode;
    for (int i = 0; i < D * D; i++) assert_true(fabsf(r[i] - w[i]) < 1e-5f);
    assert_ptr_equal(oscar_codec_set_get(shared, 0, 0, (oscar_side)side), oscar_codec_set_get(shared, 0, 1, (oscar_side)side));
  }
  options.remove_means = true; /* the rotation stays shared, the means are each head's own */
  oscar_codec_set *centred = fit(c, two, &options, 1, 2, D);
  for (int h = 0; h < 2; h++) {
    double mean[D];
    const oscar_codec_spec *spec = spec_of(centred, 0, h, OSCAR_KEYS);
    assert_memory_equal(spec->encode, spec_of(shared, 0, 0, OSCAR_KEYS)->encode, D * D * sizeof(float));
    assert_ok(c, oscar_calib_get(two, OSCAR_CALIB_KEY_MEAN, 0, h, mean));
    for (int i = 0; i < D; i++) assert_true(spec->mean[i] == (float)mean[i]);
  }
  oscar_codec_set_free(centred);
  oscar_codec_set_free(shared);
  oscar_codec_set_free(want);
  oscar_calib_free(two);
  oscar_calib_free(one);
  layer_data_free(&x);
  layer_data_free(&merged);
  oscar_context_free(c);
}

static void options_reach_the_codecs(void **state) {
  (void)state;
  enum { D = 64 };
  static const int crumbs[] = {1, 2, 4};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make_random(c, 2, 2, 2, D);
  for (size_t n = 0; n < ARRAY_LENGTH(crumbs); n++) {
    oscar_fit_options options;
    oscar_fit_options_default(&options);
    options.crumbs_per_channel = crumbs[n];
    options.group = 32;
    options.clip_keys = 1;
    options.clip_values = 0.9f;
    oscar_codec_set *set = fit(c, calib, &options, 2, 2, D);
    for (int l = 0; l < 2; l++)
      for (int h = 0; h < 2; h++)
        for (int side = 0; side < 2; side++) {
          const oscar_codec_spec *spec = spec_of(set, l, h, (oscar_side)side);
          assert_int_equal(oscar_codec_crumbs(oscar_codec_set_get(set, l, h, (oscar_side)side)), crumbs[n] * D);
          assert_int_equal(spec->form, OSCAR_ROW_SCALE_ZERO);
          assert_int_equal(spec->groups, 2);
          assert_true(spec->clip_ratio == (side == OSCAR_KEYS ? 1 : 0.9f));
          double mean[D];
          assert_ok(c, oscar_calib_get(calib, side == OSCAR_KEYS ? OSCAR_CALIB_KEY_MEAN : OSCAR_CALIB_VALUE_MEAN, l, h, mean));
          for (int i = 0; i < D; i++) assert_true(spec->mean[i] == (float)mean[i]);
        }
    const oscar_codec_set_info *info = oscar_codec_set_describe(set);
    assert_string_equal(info->recipe, "int2");
    assert_string_equal(info->fingerprint, "print");
    assert_string_equal(info->provenance, "{}");
    oscar_codec_set_free(set);
  }
  oscar_calib_free(calib);
  oscar_context_free(c);
}

static void the_proxy_objective_changes_values_only(void **state) {
  (void)state;
  enum { D = 32 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make(c, 1, 1, 1, D);
  struct layer_data x = layer_data_make(3 * D, 1, 1, D, 6);
  assert_ok(c, feed(calib, 0, &x, 3 * D));
  oscar_fit_options options;
  oscar_fit_options_default(&options);
  oscar_codec_set *exact = fit(c, calib, &options, 1, 1, D), *none = NULL;
  options.objective = OSCAR_VALUES_PROXY;
  oscar_codec_set_info info = info_of(1, 1, D);
  assert_int_equal(oscar_calib_fit(calib, &info, &options, &none), OSCAR_INVALID_ARGUMENT); /* no second pass yet */
  assert_non_null(strstr(oscar_last_error(c), "second pass"));
  assert_null(none);
  assert_ok(c, oscar_calib_begin_proxy(calib));
  assert_ok(c, feed(calib, 0, &x, 3 * D));
  oscar_codec_set *proxy = fit(c, calib, &options, 1, 1, D);
  assert_memory_equal(spec_of(exact, 0, 0, OSCAR_KEYS)->encode, spec_of(proxy, 0, 0, OSCAR_KEYS)->encode, D * D * sizeof(float));
  assert_memory_not_equal(spec_of(exact, 0, 0, OSCAR_VALUES)->encode, spec_of(proxy, 0, 0, OSCAR_VALUES)->encode,
                          D * D * sizeof(float));
  double s[D * D], diagonal[D];
  assert_ok(c, oscar_calib_get(calib, OSCAR_CALIB_PROXY_MOMENT, 0, 0, s));
  importance(D, s, spec_of(proxy, 0, 0, OSCAR_VALUES)->encode, diagonal);
  for (int i = 1; i < D; i++) assert_true(fabs(diagonal[i] / diagonal[0] - 1) < 1e-5);
  oscar_codec_set_free(exact);
  oscar_codec_set_free(proxy);
  layer_data_free(&x);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

static void a_fit_is_the_same_every_time(void **state) {
  (void)state;
  enum { D = 64, LAYERS = 3 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 2);
  oscar_fit_options options;
  oscar_fit_options_default(&options);
  oscar_codec_set *sets[2];
  for (int i = 0; i < 2; i++) {
    oscar_calib *calib = make_random(c, LAYERS, 4, 2, D);
    sets[i] = fit(c, calib, &options, LAYERS, 2, D);
    oscar_calib_free(calib);
  }
  for (int l = 0; l < LAYERS; l++)
    for (int h = 0; h < 2; h++)
      for (int side = 0; side < 2; side++) {
        const oscar_codec_spec *a = spec_of(sets[0], l, h, (oscar_side)side), *b = spec_of(sets[1], l, h, (oscar_side)side);
        assert_memory_equal(a->encode, b->encode, D * D * sizeof(float));
        assert_memory_equal(a->mean, b->mean, D * sizeof(float));
      }
  oscar_codec_set_free(sets[0]);
  oscar_codec_set_free(sets[1]);
  oscar_context_free(c);
}

/* Fills one layer's queries and outputs so that the moments say little or nothing. */
static void degenerate(struct layer_data *x, int kind) {
  int d = x->head_dim;
  for (int t = 0; t < x->n; t++)
    for (int i = 0; i < d; i++) {
      float value = kind == 0   ? 0                                          /* silence */
                    : kind == 1 ? (i == 5 ? 3.0f : 0)                        /* one channel */
                    : kind == 2 ? 1                                          /* constant rows: rank one */
                    : kind == 3 ? (i == t % d ? 1.0f : 0)                    /* a multiple of the identity */
                    : kind == 4 ? (t == 0 ? 1e-30f * (float)i : 0)           /* tiny, rank one */
                                : (i < 2 ? 1e18f : 1e-18f) * (float)(t + 1); /* 36 orders of magnitude */
      x->q[t * d + i] = x->o[t * d + i] = value;
    }
}

static void statistics_without_information_still_give_rotations(void **state) {
  (void)state;
  enum { D = 32 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_fit_options options;
  oscar_fit_options_default(&options);
  for (int kind = 0; kind < 6; kind++)
    for (int n = 1; n <= D; n += D - 1) {
      oscar_calib *calib = make(c, 1, 1, 1, D);
      struct layer_data x = layer_data_make(n, 1, 1, D, 6);
      degenerate(&x, kind);
      assert_ok(c, feed(calib, 0, &x, n));
      oscar_codec_set *set = fit(c, calib, &options, 1, 1, D);
      for (int side = 0; side < 2; side++)
        assert_true(oscar_rotation_orthogonality(D, spec_of(set, 0, 0, (oscar_side)side)->encode) < 1e-6);
      oscar_codec_set_free(set);
      layer_data_free(&x);
      oscar_calib_free(calib);
    }
  oscar_context_free(c);
}

static void wrong_fits_are_refused_by_name(void **state) {
  (void)state;
  enum { D = 32 };
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make_random(c, 2, 2, 1, D);
  oscar_codec_set *set = NULL;
  oscar_fit_options good, wrong[7];
  oscar_fit_options_default(&good);
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) wrong[i] = good;
  wrong[0].crumbs_per_channel = 3;
  wrong[1].group = 8;
  wrong[2].group = 64;
  wrong[3].clip_keys = 0;
  wrong[4].clip_values = 1.5f;
  wrong[5].clip_keys = NAN;
  wrong[6].objective = (oscar_value_objective)9;
  oscar_codec_set_info info = info_of(2, 1, D);
  for (size_t i = 0; i < ARRAY_LENGTH(wrong); i++) {
    assert_int_equal(oscar_calib_fit(calib, &info, &wrong[i], &set), OSCAR_INVALID_ARGUMENT);
    assert_null(set);
  }
  oscar_codec_set_info other[] = {info_of(3, 1, D), info_of(2, 2, D), info_of(2, 1, 64)};
  for (size_t i = 0; i < ARRAY_LENGTH(other); i++)
    assert_int_equal(oscar_calib_fit(calib, &other[i], &good, &set), OSCAR_INVALID_ARGUMENT);
  oscar_calib_free(calib);

  calib = make(c, 2, 2, 1, D);
  assert_int_equal(oscar_calib_fit(calib, &info, &good, &set), OSCAR_INVALID_ARGUMENT); /* no tokens */
  oscar_calib_free(calib);

  calib = make_random(c, 1, 1, 1, 144); /* 144 = 16 x 9: no Hadamard matrix of this order is built */
  info = info_of(1, 1, 144);
  assert_int_equal(oscar_calib_fit(calib, &info, &good, &set), OSCAR_UNSUPPORTED);
  assert_non_null(strstr(oscar_last_error(c), "144"));
  assert_null(set);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

static oscar_status calibrate_once(oscar_context *c, const struct layer_data *x, const oscar_fit_options *options) {
  oscar_calib *calib = NULL;
  oscar_codec_set *set = NULL;
  oscar_calib_geometry g = {1, x->query_heads, x->kv_heads, x->head_dim};
  oscar_codec_set_info info = info_of(1, x->kv_heads, x->head_dim);
  oscar_status status = oscar_calib_create(c, &g, &calib);
  if (status == OSCAR_OK) status = feed(calib, 0, x, x->n);
  if (status == OSCAR_OK) status = oscar_calib_begin_proxy(calib);
  if (status == OSCAR_OK) status = feed(calib, 0, x, x->n);
  if (status == OSCAR_OK) status = oscar_calib_fit(calib, &info, options, &set);
  oscar_codec_set_free(set);
  oscar_calib_free(calib);
  return status;
}

static void running_out_of_memory_anywhere_leaks_nothing(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  struct layer_data x = layer_data_make(40, 4, 2, 16, 9);
  oscar_fit_options options;
  oscar_fit_options_default(&options);
  options.objective = OSCAR_VALUES_PROXY;
  sweep_allocations(c, &f, calibrate_once(c, &x, &options));
  options.per_head = options.remove_means = false;
  sweep_allocations(c, &f, calibrate_once(c, &x, &options));
  layer_data_free(&x);
  failing_context_free(c, &f);
}

/* Keys with a common offset and two loud channels, queries that care for a few directions: mean of (q.(k - k^))^2. */
enum { KEYS = 512, DIM = 64 };

static void anisotropic(struct layer_data *x, uint64_t seed) {
  static double w[DIM * DIM];
  random_basis(DIM, 99, w);
  for (int t = 0; t < KEYS; t++) {
    memset(x->q + t * DIM, 0, DIM * sizeof *x->q);
    for (int a = 0; a < DIM; a++) {
      double scale = 4 / (1.0 + a) * (double)test_normal(&seed);
      for (int i = 0; i < DIM; i++) x->q[t * DIM + i] += (float)(scale * w[a * DIM + i]);
    }
    for (int i = 0; i < DIM; i++)
      x->k[t * DIM + i] = test_normal(&seed) * (i == 7 || i == 40 ? 6.0f : 0.7f) + (i % 9 == 0 ? 5.0f : 0.5f);
  }
}

static double weighted_error(const oscar_codec_set *set, const struct layer_data *x) {
  const oscar_codec *codec = oscar_codec_set_get(set, 0, 0, OSCAR_KEYS);
  uint8_t *rows = malloc(KEYS * oscar_codec_row_bytes(codec));
  float *back = malloc(KEYS * DIM * sizeof *back);
  assert_int_equal(oscar_codec_encode(codec, 0, KEYS, x->k, DIM, rows), OSCAR_OK);
  oscar_codec_decode(codec, 0, KEYS, rows, back, DIM);
  double sum = 0;
  for (int t = 0; t < KEYS; t++) {
    double error = 0;
    for (int i = 0; i < DIM; i++)
      error += (double)x->q[(t * 7 % KEYS) * DIM + i] * ((double)x->k[t * DIM + i] - (double)back[t * DIM + i]);
    sum += error * error / KEYS;
  }
  free(rows);
  free(back);
  return sum;
}

static void a_fitted_rotation_beats_hadamard_beats_none(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_calib *calib = make(c, 1, 1, 1, DIM);
  struct layer_data x = layer_data_make(KEYS, 1, 1, DIM, 1), unseen = layer_data_make(KEYS, 1, 1, DIM, 1);
  anisotropic(&x, 5);
  anisotropic(&unseen, 6);
  assert_ok(c, feed(calib, 0, &x, KEYS));
  oscar_fit_options options;
  oscar_fit_options_default(&options);
  oscar_codec_set *fitted = fit(c, calib, &options, 1, 1, DIM), *hadamard = NULL, *plain = NULL;
  oscar_codec_set_info info = info_of(1, 1, DIM);
  oscar_plain_options bare = {.rotate = false, .crumbs_per_channel = 1, .group = 0, .clip_keys = 1, .clip_values = 1};
  oscar_plain_options rotated = {.rotate = true, .crumbs_per_channel = 1, .group = 0, .clip_keys = 0.96f, .clip_values = 0.92f};
  assert_ok(c, oscar_codec_set_create_plain(c, &info, &rotated, &hadamard));
  assert_ok(c, oscar_codec_set_create_plain(c, &info, &bare, &plain));
  double a = weighted_error(fitted, &unseen), b = weighted_error(hadamard, &unseen), p = weighted_error(plain, &unseen);
  printf("weighted error: fitted %.3f, hadamard %.3f, plain %.3f\n", a, b, p);
  assert_true(a < 0.8 * b);
  assert_true(b < 0.8 * p);
  oscar_codec_set_free(fitted);
  oscar_codec_set_free(hadamard);
  oscar_codec_set_free(plain);
  layer_data_free(&x);
  layer_data_free(&unseen);
  oscar_calib_free(calib);
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(planted_directions_are_found_in_order),
      cmocka_unit_test(every_channel_becomes_equally_important),
      cmocka_unit_test(one_rotation_a_layer_is_fitted_to_the_mean_over_heads),
      cmocka_unit_test(options_reach_the_codecs),
      cmocka_unit_test(the_proxy_objective_changes_values_only),
      cmocka_unit_test(a_fit_is_the_same_every_time),
      cmocka_unit_test(statistics_without_information_still_give_rotations),
      cmocka_unit_test(wrong_fits_are_refused_by_name),
      cmocka_unit_test(running_out_of_memory_anywhere_leaks_nothing),
      cmocka_unit_test(a_fitted_rotation_beats_hadamard_beats_none),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
