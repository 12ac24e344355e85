/* Hadamard orders and composed rotations against what they are for, and the codec sets that need no data. */
#include "support.h"

#include "failing_alloc.h"
#include "quant/codec.h"
#include <oscar/rotation.h>

static void every_promised_order_is_orthogonal_with_equal_entries(void **state) {
  (void)state;
  static const int orders[] = {1,   2,  4,  8,  16,  64, 128, 256, 12,  24,      48, 96,
                               192, 20, 40, 80, 160, 28, 56,  112, 224, 576 / 3, 384};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  for (size_t n = 0; n < ARRAY_LENGTH(orders); n++) {
    int d = orders[n];
    float *h = malloc((size_t)(d * d) * sizeof *h);
    assert_true(oscar_hadamard_exists(d));
    assert_ok(c, oscar_hadamard(c, d, h));
    for (int i = 0; i < d * d; i++) assert_true(fabs(fabs((double)h[i]) * sqrt(d) - 1) < 1e-6);
    for (int i = 0; i < d; i++) /* exactly, in integers */
      for (int j = 0; j < d; j++) {
        int sum = 0;
        for (int k = 0; k < d; k++) sum += (h[i * d + k] > 0) == (h[j * d + k] > 0) ? 1 : -1;
        assert_int_equal(sum, i == j ? d : 0);
      }
    assert_true(oscar_rotation_orthogonality(d, h) < 1e-5);
    free(h);
  }
  oscar_context_free(c);
}

static void powers_of_two_are_symmetric(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  static const float four[16] = {.5f, .5f, .5f, .5f, .5f, -.5f, .5f, -.5f, .5f, .5f, -.5f, -.5f, .5f, -.5f, -.5f, .5f};
  float h[64 * 64];
  assert_ok(c, oscar_hadamard(c, 4, h));
  assert_memory_equal(h, four, sizeof four);
  assert_ok(c, oscar_hadamard(c, 64, h));
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < 64; j++) assert_true(h[i * 64 + j] == h[j * 64 + i]);
  oscar_context_free(c);
}

static void other_orders_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  static const int orders[] = {0, -4, 3, 6, 10, 14, 36, 44, 52, 60, 72, 100, 144, 576, INT32_MAX, INT32_MIN};
  for (size_t n = 0; n < ARRAY_LENGTH(orders); n++) assert_false(oscar_hadamard_exists(orders[n]));
  float h[72 * 72];
  assert_int_equal(oscar_hadamard(c, 72, h), OSCAR_UNSUPPORTED);
  assert_non_null(strstr(oscar_last_error(c), "72"));
  assert_int_equal(oscar_hadamard(c, 0, h), OSCAR_UNSUPPORTED);
  oscar_context_free(c);
}

static void bit_reversal_is_the_published_one(void **state) {
  (void)state;
  static const int eight[] = {7, 3, 5, 1, 6, 2, 4, 0}, three[] = {2, 1, 0};
  int perm[1024];
  oscar_bit_reversal(8, perm);
  assert_memory_equal(perm, eight, sizeof eight);
  oscar_bit_reversal(3, perm);
  assert_memory_equal(perm, three, sizeof three);
  for (int d = 1; d <= 1024; d *= 2) {
    bool seen[1024] = {false};
    oscar_bit_reversal(d, perm);
    for (int j = 0; j < d; j++) {
      assert_in_range(perm[j], 0, d - 1);
      assert_false(seen[perm[j]]);
      seen[perm[j]] = true;
    }
  }
}

/* A random orthogonal matrix: Gram-Schmidt on Gaussian columns, twice. */
static void random_orthogonal(int d, double *u, uint64_t *seed) {
  for (int i = 0; i < d * d; i++) u[i] = (double)test_normal(seed);
  for (int j = 0; j < d; j++)
    for (int pass = 0; pass < 2; pass++) {
      for (int k = 0; k < j; k++) {
        double dot = 0;
        for (int i = 0; i < d; i++) dot += u[i * d + j] * u[i * d + k];
        for (int i = 0; i < d; i++) u[i * d + j] -= dot * u[i * d + k];
      }
      double norm = 0;
      for (int i = 0; i < d; i++) norm += u[i * d + j] * u[i * d + j];
      for (int i = 0; i < d; i++) u[i * d + j] /= sqrt(norm);
    }
}

static void composing_is_the_product_u_h_p(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  static const int orders[] = {8, 64, 96, 80, 112};
  uint64_t seed = 1;
  for (size_t n = 0; n < ARRAY_LENGTH(orders); n++) {
    int d = orders[n], perm[128];
    double u[128 * 128];
    float h[128 * 128], r[128 * 128];
    random_orthogonal(d, u, &seed);
    assert_ok(c, oscar_rotation_compose(c, d, u, r));
    assert_ok(c, oscar_hadamard(c, d, h));
    oscar_bit_reversal(d, perm);
    for (int i = 0; i < d; i++)
      for (int j = 0; j < d; j++) {
        double sum = 0;
        for (int k = 0; k < d; k++) sum += u[i * d + k] * (double)h[k * d + perm[j]];
        assert_true(fabs(sum - (double)r[i * d + j]) < 1e-6);
      }
    assert_true(oscar_rotation_orthogonality(d, r) < 1e-6);
    r[5] = NAN;
    assert_true(isnan(oscar_rotation_orthogonality(d, r)));
  }
  double u[72 * 72] = {0};
  float r[72 * 72];
  assert_int_equal(oscar_rotation_compose(c, 72, u, r), OSCAR_UNSUPPORTED);
  oscar_context_free(c);
}

/* Rotating queries and keys alike leaves softmax(q k') as it was. */
static void scores_do_not_change_when_both_sides_rotate(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  enum { D = 64, KEYS = 40 };
  uint64_t seed = 2;
  double u[D * D], plain[KEYS], rotated[KEYS], plain_sum = 0, rotated_sum = 0;
  float r[D * D], q[D], k[KEYS][D], qr[D] = {0}, kr[KEYS][D] = {{0}};
  random_orthogonal(D, u, &seed);
  assert_ok(c, oscar_rotation_compose(c, D, u, r));
  for (int i = 0; i < D; i++) q[i] = test_normal(&seed);
  for (int t = 0; t < KEYS; t++)
    for (int i = 0; i < D; i++) k[t][i] = test_normal(&seed);
  for (int i = 0; i < D; i++)
    for (int j = 0; j < D; j++) {
      qr[j] += q[i] * r[i * D + j];
      for (int t = 0; t < KEYS; t++) kr[t][j] += k[t][i] * r[i * D + j];
    }
  for (int t = 0; t < KEYS; t++) {
    double a = 0, b = 0;
    for (int i = 0; i < D; i++) {
      a += (double)q[i] * (double)k[t][i];
      b += (double)qr[i] * (double)kr[t][i];
    }
    plain_sum += plain[t] = exp(a / 8);
    rotated_sum += rotated[t] = exp(b / 8);
  }
  for (int t = 0; t < KEYS; t++) assert_true(fabs(plain[t] / plain_sum - rotated[t] / rotated_sum) < 1e-5);
  oscar_context_free(c);
}

/* ---- sets that need no data ---- */

static const oscar_codec_set_info info64 = {.layers = 2, .kv_heads = 3, .head_dim = 64, .recipe = "int2"};

static void a_plain_set_has_one_codec_per_side(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  for (int crumbs = 1; crumbs <= 4; crumbs *= 2)
    for (int group = 0; group <= 64; group = group ? 2 * group : 16) {
      oscar_plain_options o = {
          .rotate = true, .crumbs_per_channel = crumbs, .group = group, .clip_keys = .96f, .clip_values = .92f};
      oscar_codec_set *set = NULL;
      assert_ok(c, oscar_codec_set_create_plain(c, &info64, &o, &set));
      assert_ok(c, oscar_codec_set_check(set));
      const oscar_codec *keys = oscar_codec_set_get(set, 0, 0, OSCAR_KEYS),
                        *values = oscar_codec_set_get(set, 1, 2, OSCAR_VALUES);
      assert_ptr_equal(keys, oscar_codec_set_get(set, 1, 2, OSCAR_KEYS));
      assert_ptr_not_equal(keys, values);
      assert_int_equal(oscar_codec_crumbs(keys), 64 * crumbs);
      assert_int_equal(oscar_codec_describe(keys)->groups, group ? 64 / group : 1);
      assert_true(oscar_codec_describe(keys)->clip_ratio == .96f && oscar_codec_describe(values)->clip_ratio == .92f);
      assert_true(oscar_codec_describe(keys)->encode[65] == -.125f && oscar_codec_describe(keys)->decode[65] == -.125f);
      oscar_codec_set_free(set);
    }
  failing_context_free(c, &f);
}

/* 2, 4 and 8 bits: the error of Gaussian rows falls by the square of the levels' ratio. */
static void more_bits_in_a_plain_set_mean_less_error(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  double errors[3];
  for (int n = 0; n < 3; n++) {
    oscar_plain_options o = {.rotate = true, .crumbs_per_channel = 1 << n, .clip_keys = 1, .clip_values = 1};
    oscar_codec_set *set = NULL;
    assert_ok(c, oscar_codec_set_create_plain(c, &info64, &o, &set));
    const oscar_codec *codec = oscar_codec_set_get(set, 0, 0, OSCAR_KEYS);
    uint64_t seed = 3;
    double error = 0, energy = 0;
    for (int t = 0; t < 500; t++) {
      float x[64], back[64];
      uint8_t row[128];
      for (int i = 0; i < 64; i++) x[i] = test_normal(&seed);
      assert_ok(c, oscar_codec_encode(codec, 0, 1, x, 64, row));
      oscar_codec_decode(codec, 0, 1, row, back, 64);
      for (int i = 0; i < 64; i++) {
        error += (double)((x[i] - back[i]) * (x[i] - back[i]));
        energy += (double)(x[i] * x[i]);
      }
    }
    errors[n] = error / energy;
    oscar_codec_set_free(set);
  }
  assert_true(fabs(errors[0] / errors[1] / 25 - 1) < 0.15);  /* (15 / 3)^2 */
  assert_true(fabs(errors[1] / errors[2] / 289 - 1) < 0.15); /* (255 / 15)^2 */
  oscar_context_free(c);
}

static void wrong_plain_options_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  const oscar_plain_options good = {.crumbs_per_channel = 1, .clip_keys = 1, .clip_values = 1};
  oscar_codec_set *set = NULL;
  oscar_plain_options o = good;
  o.crumbs_per_channel = 3;
  assert_int_equal(oscar_codec_set_create_plain(c, &info64, &o, &set), OSCAR_INVALID_ARGUMENT);
  o = good, o.group = 8;
  assert_int_equal(oscar_codec_set_create_plain(c, &info64, &o, &set), OSCAR_INVALID_ARGUMENT);
  o = good, o.group = 48;
  assert_int_equal(oscar_codec_set_create_plain(c, &info64, &o, &set), OSCAR_INVALID_ARGUMENT);
  o = good, o.group = -16;
  assert_int_equal(oscar_codec_set_create_plain(c, &info64, &o, &set), OSCAR_INVALID_ARGUMENT);
  o = good, o.group = 128;
  assert_int_equal(oscar_codec_set_create_plain(c, &info64, &o, &set), OSCAR_INVALID_ARGUMENT);
  o = good, o.clip_values = 0;
  assert_int_equal(oscar_codec_set_create_plain(c, &info64, &o, &set), OSCAR_INVALID_ARGUMENT);
  oscar_codec_set_info odd = info64;
  odd.head_dim = 144;
  o = good, o.rotate = true;
  assert_int_equal(oscar_codec_set_create_plain(c, &odd, &o, &set), OSCAR_UNSUPPORTED);
  assert_null(set);
  o.rotate = false;
  assert_ok(c, oscar_codec_set_create_plain(c, &odd, &o, &set));
  oscar_codec_set_free(set);
  oscar_context_free(c);
}

static void running_out_of_memory_loses_nothing(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  oscar_plain_options o = {.rotate = true, .crumbs_per_channel = 1, .clip_keys = 1, .clip_values = 1};
  oscar_codec_set *set = NULL;
  double u[64] = {0};
  float r[64];
  sweep_allocations(c, &f, oscar_codec_set_create_plain(c, &info64, &o, &set));
  sweep_allocations(c, &f, oscar_rotation_compose(c, 8, u, r));
  sweep_allocations(c, &f, oscar_hadamard(c, 8, r));
  oscar_codec_set_free(set);
  failing_context_free(c, &f);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_promised_order_is_orthogonal_with_equal_entries),
      cmocka_unit_test(powers_of_two_are_symmetric),
      cmocka_unit_test(other_orders_are_refused),
      cmocka_unit_test(bit_reversal_is_the_published_one),
      cmocka_unit_test(composing_is_the_product_u_h_p),
      cmocka_unit_test(scores_do_not_change_when_both_sides_rotate),
      cmocka_unit_test(a_plain_set_has_one_codec_per_side),
      cmocka_unit_test(more_bits_in_a_plain_set_mean_less_error),
      cmocka_unit_test(wrong_plain_options_are_refused),
      cmocka_unit_test(running_out_of_memory_loses_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
