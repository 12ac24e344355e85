/* The element-wise operations against libm and textbook definitions in double precision. */
#include "support.h"

#include "backend/backend.h"

#include <complex.h>

static struct backend *backend_of(oscar_context *context) {
  struct backend *be;
  assert_ok(context, backend_create_cpu(context, &be));
  return be;
}

static void close_backend(struct backend *be) {
  oscar_context *context = be->context;
  be->ops->free(be);
  oscar_context_free(context);
}

static void assert_close(float value, double expected, double relative, double absolute) {
  if (!(fabs((double)value - expected) <= relative * fabs(expected) + absolute))
    fail_msg("%.9g instead of %.9g", (double)value, expected);
}

/*
 * Pair i is the complex number a + bi, multiplied with e^(i angle): for ROPE_NORMAL (x[2i], x[2i + 1]), for ROPE_NEOX
 * (x[i], x[i + d/2]).
 */
static void check_rope(struct backend *be, const struct rope_spec *spec, int n, int heads, int head_dim, int32_t first) {
  size_t count = (size_t)(n * heads * head_dim);
  float *x = malloc(count * sizeof *x), *before = malloc(count * sizeof *before);
  int32_t *positions = malloc((size_t)n * sizeof *positions);
  assert_true(x && before && positions);
  uint64_t random = 4;
  for (size_t i = 0; i < count; i++) before[i] = x[i] = test_normal(&random);
  for (int t = 0; t < n; t++) positions[t] = first + 3 * t;
  const struct heads tensor = {heads, NULL, x};
  assert_ok(be->context, be->ops->rope(be, spec, n, head_dim, positions, 0, 1, &tensor));
  int pairs = spec->rotary_dim / 2;
  for (int t = 0; t < n; t++)
    for (int h = 0; h < heads; h++) {
      const float *old = before + (t * heads + h) * head_dim, *new = x + (t * heads + h) * head_dim;
      for (int i = 0; i < pairs; i++) {
        double angle = (double)spec->linear_scale * positions[t] * pow((double)spec->base, -2.0 * i / spec->rotary_dim) /
                       (spec->factors ? (double)spec->factors[i] : 1);
        int re = spec->kind == ROPE_NORMAL ? 2 * i : i, im = spec->kind == ROPE_NORMAL ? 2 * i + 1 : i + pairs;
        double complex z = ((double)old[re] + I * (double)old[im]) * cexp(I * angle);
        assert_close(new[re], creal(z), 0, 4e-7 * (1 + cabs(z)));
        assert_close(new[im], cimag(z), 0, 4e-7 * (1 + cabs(z)));
      }
      for (int i = spec->rotary_dim; i < head_dim; i++) assert_true(new[i] == old[i]);
    }
  free(positions);
  free(before);
  free(x);
}

static void rope_turns_pairs_as_complex_numbers(void **state) {
  (void)state;
  struct backend *be = backend_of(test_context(OSCAR_ISA_AUTO, 2));
  float factors[64];
  for (int i = 0; i < 64; i++) factors[i] = 1 + (float)i / 8;
  for (int kind = ROPE_NORMAL; kind <= ROPE_NEOX; kind++) {
    check_rope(be, &(struct rope_spec){(enum rope_kind)kind, 64, 10000, 1, NULL}, 5, 3, 64, 0);
    check_rope(be, &(struct rope_spec){(enum rope_kind)kind, 128, 1e6f, 1, NULL}, 1, 2, 128, 131071);
    check_rope(be, &(struct rope_spec){(enum rope_kind)kind, 128, 1e6f, 0.125f, factors}, 300, 4, 128, 7);
    check_rope(be, &(struct rope_spec){(enum rope_kind)kind, 32, 10000, 1, NULL}, 2, 2, 80, 100);
    check_rope(be, &(struct rope_spec){(enum rope_kind)kind, 2, 10000, 1, NULL}, 2, 1, 2, 1);
  }
  close_backend(be);
}

/* Angles are kept between calls: whatever they depend on must be noticed when it changes. */
static void rope_notices_changed_positions_and_settings(void **state) {
  (void)state;
  struct backend *be = backend_of(test_context(OSCAR_ISA_AUTO, 1));
  float factors[32];
  for (int i = 0; i < 32; i++) factors[i] = 2;
  struct rope_spec spec = {ROPE_NEOX, 64, 10000, 1, NULL};
  check_rope(be, &spec, 4, 1, 64, 10);
  check_rope(be, &spec, 4, 1, 64, 10);
  check_rope(be, &spec, 4, 1, 64, 11);
  check_rope(be, &spec, 3, 1, 64, 11);
  spec.base = 500000;
  check_rope(be, &spec, 3, 1, 64, 11);
  spec.linear_scale = 0.5f;
  check_rope(be, &spec, 3, 1, 64, 11);
  spec.factors = factors;
  check_rope(be, &spec, 3, 1, 64, 11);
  factors[5] = 3;
  check_rope(be, &spec, 3, 1, 64, 11);
  spec.kind = ROPE_NORMAL;
  check_rope(be, &spec, 3, 1, 64, 11);
  spec.rotary_dim = 32;
  check_rope(be, &spec, 3, 1, 64, 11);
  spec.factors = NULL;
  check_rope(be, &spec, 3, 1, 64, 11);
  close_backend(be);
}

static void impossible_rope_dimensions_are_refused(void **state) {
  (void)state;
  struct backend *be = backend_of(test_context(OSCAR_ISA_AUTO, 1));
  static const int dims[] = {-2, 0, 3, 66};
  float x[64] = {0};
  const struct heads tensor = {1, NULL, x};
  int32_t position = 0;
  for (size_t i = 0; i < ARRAY_LENGTH(dims); i++) {
    struct rope_spec spec = {ROPE_NEOX, dims[i], 10000, 1, NULL};
    assert_int_equal(be->ops->rope(be, &spec, 1, 64, &position, 0, 1, &tensor), OSCAR_INVALID_ARGUMENT);
  }
  close_backend(be);
}

static void rms_norm_divides_by_the_root_mean_square(void **state) {
  (void)state;
  static const int dims[] = {1, 3, 64, 576, 1536};
  static const int64_t rows[] = {1, 9, 130};
  uint64_t random = 2;
  struct backend *be = backend_of(test_context(OSCAR_ISA_AUTO, 2));
  for (size_t d = 0; d < ARRAY_LENGTH(dims); d++)
    for (size_t k = 0; k < ARRAY_LENGTH(rows); k++) {
      int dim = dims[d];
      size_t count = (size_t)(rows[k] * dim);
      float *x = malloc(count * sizeof *x), *y = malloc(count * sizeof *y), *weight = malloc((size_t)dim * sizeof *weight);
      assert_true(x && y && weight);
      for (size_t i = 0; i < count; i++) x[i] = test_normal(&random) * 30;
      for (int i = 0; i < dim; i++) weight[i] = test_normal(&random);
      be->ops->rms_norm(be, rows[k], dim, x, weight, 1e-5f, y);
      for (int64_t r = 0; r < rows[k]; r++) {
        double squares = 0;
        for (int i = 0; i < dim; i++) squares += pow((double)x[r * dim + i], 2);
        for (int i = 0; i < dim; i++)
          assert_close(y[r * dim + i], (double)x[r * dim + i] / sqrt(squares / dim + (double)1e-5f) * (double)weight[i], 3e-7, 0);
      }
      be->ops->rms_norm(be, rows[k], dim, x, weight, 1e-5f, x); /* in place */
      assert_memory_equal(x, y, count * sizeof *x);
      free(weight);
      free(y);
      free(x);
    }
  float zero[4] = {0}, one[4] = {1, 1, 1, 1};
  be->ops->rms_norm(be, 1, 4, zero, one, 1e-6f, zero);
  for (int i = 0; i < 4; i++) assert_true(zero[i] == 0);
  close_backend(be);
}

static void add_rms_norm_has_the_bits_of_both(void **state) {
  (void)state;
  enum { ROWS = 130, DIM = 577 };
  static const int64_t rows[] = {0, 1, ROWS};
  struct backend *be = backend_of(test_context(OSCAR_ISA_AUTO, 2));
  const size_t bytes = (size_t)ROWS * DIM * sizeof(float);
  float *x = malloc(bytes), *sum = malloc(bytes), *add = malloc(bytes), *y = malloc(bytes), weight[DIM];
  assert_true(x && sum && add && y);
  for (size_t k = 0; k < ARRAY_LENGTH(rows); k++) {
    const size_t count = (size_t)rows[k] * DIM;
    uint64_t random = 7;
    for (size_t i = 0; i < count; i++) x[i] = sum[i] = test_normal(&random), add[i] = test_normal(&random);
    for (int i = 0; i < DIM; i++) weight[i] = test_normal(&random);
    be->ops->add(be, count, sum, add);
    be->ops->rms_norm(be, rows[k], DIM, sum, weight, 1e-6f, y);
    be->ops->add_rms_norm(be, rows[k], DIM, x, add, weight, 1e-6f, add); /* in place */
    assert_memory_equal(x, sum, count * sizeof *x);
    assert_memory_equal(add, y, count * sizeof *y);
  }
  free(y);
  free(add);
  free(sum);
  free(x);
  close_backend(be);
}

static void rope_norms_heads_first(void **state) {
  (void)state;
  enum { N = 3, HEADS = 5, DIM = 64 };
  struct backend *be = backend_of(test_context(OSCAR_ISA_AUTO, 1));
  const struct rope_spec spec = {ROPE_NEOX, DIM, 10000, 1, NULL};
  const int32_t positions[N] = {4, 900, 2};
  float q[N * HEADS * DIM], k[N * DIM], both[N * HEADS * DIM], norm[DIM];
  uint64_t random = 3;
  for (size_t i = 0; i < ARRAY_LENGTH(q); i++) q[i] = both[i] = test_normal(&random);
  for (int i = 0; i < N * DIM; i++) k[i] = q[i];
  for (int i = 0; i < DIM; i++) norm[i] = test_normal(&random);
  const struct heads tensors[2] = {{HEADS, norm, both}, {1, NULL, k}}, alone[2] = {{HEADS, NULL, q}, {1, NULL, q}};
  float copy[N * DIM];
  memcpy(copy, k, sizeof copy);
  assert_ok(be->context, be->ops->rope(be, &spec, N, DIM, positions, 1e-6f, 2, tensors));
  be->ops->rms_norm(be, (int64_t)N * HEADS, DIM, q, norm, 1e-6f, q);
  assert_ok(be->context, be->ops->rope(be, &spec, N, DIM, positions, 0, 1, &alone[0]));
  assert_memory_equal(q, both, sizeof q);
  memcpy(q, copy, sizeof copy);
  assert_ok(be->context, be->ops->rope(be, &spec, N, DIM, positions, 0, 1, &alone[1]));
  assert_memory_equal(q, k, sizeof k);
  close_backend(be);
}

static double silu(double x) { return x / (1 + exp(-x)); }
static double gelu(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x))); }

/* For large negative x, tanh in double rounds to -1 where gelu is still about 1e-17: hence the absolute tolerance. */
static void activations_agree_with_libm(void **state) {
  (void)state;
  enum { COUNT = 200001 };
  struct backend *be = backend_of(test_context(OSCAR_ISA_AUTO, 2));
  float *gate = malloc(COUNT * sizeof *gate), *up = malloc(COUNT * sizeof *up), *x = malloc(COUNT * sizeof *x);
  assert_true(gate && up && x);
  for (int i = 0; i < COUNT; i++) {
    x[i] = (float)(i - COUNT / 2) * 0.0011f;
    up[i] = i % 2 ? 1 : -0.5f;
  }
  memcpy(gate, x, COUNT * sizeof *x);
  be->ops->silu_mul(be, COUNT, gate, up);
  /* Near the end of float's range e^-x is subnormal or infinite. */
  for (int i = 0; i < COUNT; i++) assert_close(gate[i], silu((double)x[i]) * (double)up[i], 6e-7, 1e-36);
  memcpy(gate, x, COUNT * sizeof *x);
  be->ops->gelu_mul(be, COUNT, gate, up);
  /* The exponent 2u is rounded to float, and e^-2u takes over its absolute error. */
  for (int i = 0; i < COUNT; i++) {
    double u = sqrt(2 / 3.14159265358979323846) * ((double)x[i] + 0.044715 * pow((double)x[i], 3));
    assert_close(gate[i], gelu((double)x[i]) * (double)up[i], 6e-7 + (x[i] < 0 ? fabs(u) * 6e-7 : 0), 2e-14);
  }
  close_backend(be);
  free(x);
  free(up);
  free(gate);
}

static void feed_forward_has_the_bits_of_its_parts(void **state) {
  (void)state;
  enum { ROWS = 9, COLS = 70, MOST = 40 };
  struct backend *be = backend_of(test_context(OSCAR_ISA_AUTO, 2));
  static float data[3][ROWS * COLS], x[MOST * ROWS], between[2 * MOST * COLS], y[MOST * ROWS];
  static float gate[MOST * COLS], up[MOST * COLS], expected[MOST * ROWS];
  struct weight w[3];
  uint64_t random = 3;
  for (int i = 0; i < 3; i++) {
    for (int k = 0; k < ROWS * COLS; k++) data[i][k] = test_normal(&random);
    w[i] = (struct weight){.name = "w", .type = WEIGHT_F32, .rows = COLS, .cols = ROWS, .data = data[i]};
  }
  w[2].rows = ROWS, w[2].cols = COLS;
  const struct weight *const both[] = {&w[0], &w[1]}, *const down = &w[2];
  float *const apart[] = {gate, up}, *const to = expected;
  for (int n = 0; n <= MOST; n += n < 2 ? 1 : MOST - 2)
    for (int kind = ACTIVATION_SILU; kind <= ACTIVATION_GELU; kind++) {
      const struct feed_forward all = {&w[0], &w[1], &w[2], (enum activation)kind};
      for (int i = 0; i < n * ROWS; i++) x[i] = test_normal(&random);
      assert_ok(be->context, be->ops->matmul(be, 2, both, NULL, n, x, apart));
      if (kind == ACTIVATION_SILU)
        be->ops->silu_mul(be, (size_t)n * COLS, gate, up);
      else
        be->ops->gelu_mul(be, (size_t)n * COLS, gate, up);
      assert_ok(be->context, be->ops->matmul(be, 1, &down, NULL, n, gate, &to));
      assert_ok(be->context, be->ops->feed_forward(be, &all, n, x, between, y));
      assert_memory_equal(y, expected, (size_t)(n * ROWS) * sizeof *y);
      assert_ok(be->context, be->ops->feed_forward(be, &all, n, x, between, x));
      assert_memory_equal(x, expected, (size_t)(n * ROWS) * sizeof *x);
    }
  close_backend(be);
}

static void activations_keep_their_limits(void **state) {
  (void)state;
  struct backend *be = backend_of(test_context(OSCAR_ISA_AUTO, 1));
  float gate[] = {0, 3e38f, -3e38f, 1e10f, -1e10f, -88, -104, -120}, copy[8], up[8];
  for (int i = 0; i < 8; i++) up[i] = 1;
  memcpy(copy, gate, sizeof gate);
  be->ops->silu_mul(be, 8, gate, up);
  be->ops->gelu_mul(be, 8, copy, up);
  assert_true(gate[0] == 0 && copy[0] == 0);
  assert_true(gate[1] == 3e38f && copy[1] == 3e38f && gate[3] == 1e10f && copy[3] == 1e10f);
  assert_true(gate[2] == 0 && copy[2] == 0 && gate[4] == 0 && copy[4] == 0);
  for (int i = 5; i < 8; i++) assert_true(gate[i] <= 0 && gate[i] > -1e-35f && copy[i] == 0);
  float bad[2] = {NAN, NAN};
  be->ops->silu_mul(be, 1, bad, up);
  be->ops->gelu_mul(be, 1, bad + 1, up);
  assert_true(isnan(bad[0]) && isnan(bad[1]));
  close_backend(be);
}

static void add_and_scale_touch_every_element_once(void **state) {
  (void)state;
  static const size_t counts[] = {0, 1, 17, 70000};
  struct backend *be = backend_of(test_context(OSCAR_ISA_AUTO, 2));
  for (size_t k = 0; k < ARRAY_LENGTH(counts); k++) {
    size_t n = counts[k];
    float *x, *y;
    assert_ok(be->context, be->ops->buffer_alloc(be, n + 1, &x));
    assert_ok(be->context, be->ops->buffer_alloc(be, n + 1, &y));
    for (size_t i = 0; i <= n; i++) x[i] = (float)i, y[i] = 2 * (float)i + 1;
    be->ops->add(be, n, x, y);
    be->ops->scale(be, n, x, 0.5f);
    for (size_t i = 0; i < n; i++) assert_true(x[i] == (3 * (float)i + 1) * 0.5f);
    assert_true(x[n] == (float)n);
    assert_ok(be->context, be->ops->upload(be, y, x, n));
    assert_ok(be->context, be->ops->download(be, x, y, n));
    assert_memory_equal(x, y, n * sizeof *x);
    be->ops->buffer_free(be, x);
    be->ops->buffer_free(be, y);
  }
  close_backend(be);
}

static void the_description_names_kernels_and_threads(void **state) {
  (void)state;
  struct backend *be = backend_of(test_context(OSCAR_ISA_PORTABLE, 3));
  char text[200], tiny[8];
  be->ops->describe(be, text, sizeof text);
  assert_non_null(strstr(text, "portable kernels, 3 threads"));
  be->ops->describe(be, tiny, sizeof tiny);
  assert_int_equal(strlen(tiny), sizeof tiny - 1);
  assert_string_equal(be->ops->name, "cpu");
  close_backend(be);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(rope_turns_pairs_as_complex_numbers),
      cmocka_unit_test(rope_notices_changed_positions_and_settings),
      cmocka_unit_test(impossible_rope_dimensions_are_refused),
      cmocka_unit_test(rms_norm_divides_by_the_root_mean_square),
      cmocka_unit_test(add_rms_norm_has_the_bits_of_both),
      cmocka_unit_test(rope_norms_heads_first),
      cmocka_unit_test(activations_agree_with_libm),
      cmocka_unit_test(feed_forward_has_the_bits_of_its_parts),
      cmocka_unit_test(activations_keep_their_limits),
      cmocka_unit_test(add_and_scale_touch_every_element_once),
      cmocka_unit_test(the_description_names_kernels_and_threads),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
