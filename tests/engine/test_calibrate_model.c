/* Calibration of the default model on a short text: the same every time, valid, and of use on a text it has not seen. */
#include "engine/calibrate.h"
#include "support.h"

#include <oscar/rotation.h>

static const char *const types[] = {"int2", "int2-oscar", "int4"};
enum { LEARNT = 192, UNSEEN = 96, UNSEEN_FROM = 40000 /* bytes into the text */ };

struct fixture {
  oscar_context *context;
  struct backend *backend;
  struct model *model;
  oscar_codec_set *sets[3];
};

static void calibrate(struct fixture *f, oscar_codec_set **sets) {
  struct calibrate_options options;
  calibrate_options_default(&options);
  options.max_tokens = LEARNT;
  options.window = LEARNT / 2;
  assert_ok(f->context, calibrate_model(f->model, &options, NULL, 3, types, sets));
}

static void open_fixture(struct fixture *f, const char *path) {
  f->context = test_context(OSCAR_ISA_AUTO, 0);
  assert_ok(f->context, backend_create_cpu(f->context, &f->backend));
  assert_ok(f->context, model_load(f->context, f->backend, path, &f->model));
  calibrate(f, f->sets);
}

static void close_fixture(struct fixture *f) {
  for (int i = 0; i < 3; i++) oscar_codec_set_free(f->sets[i]);
  model_free(f->model);
  f->backend->ops->free(f->backend);
  oscar_context_free(f->context);
}

static const oscar_codec_spec *spec_of(const oscar_codec_set *set, int layer, int head, int side) {
  return oscar_codec_describe(oscar_codec_set_get(set, layer, head, (oscar_side)side));
}

static void fits_of_a_real_model_are_valid_and_repeatable(void **state) {
  const struct fixture f = *(const struct fixture *)*state;
  const struct model_geometry *g = model_geometry_of(f.model);
  size_t row = sizeof(float) * (size_t)g->head_dim;
  oscar_codec_set *const *a = f.sets, *b[3];
  calibrate(*state, b);
  for (int i = 0; i < 3; i++) {
    assert_ok(f.context, oscar_codec_set_check(a[i]));
    assert_string_equal(oscar_codec_set_describe(a[i])->fingerprint, model_fingerprint(f.model));
    assert_string_equal(oscar_codec_set_describe(a[i])->provenance, oscar_codec_set_describe(b[i])->provenance);
    for (int l = 0; l < g->layers; l++)
      for (int h = 0; h < g->kv_heads; h++)
        for (int side = 0; side < 2; side++) {
          const oscar_codec_spec *x = spec_of(a[i], l, h, side), *y = spec_of(b[i], l, h, side);
          assert_memory_equal(x->encode, y->encode, row * (size_t)g->head_dim);
          assert_memory_equal(x->mean, y->mean, row);
          assert_true(oscar_rotation_orthogonality(g->head_dim, x->encode) < 1e-6);
        }
  }
  for (int i = 0; i < 3; i++) oscar_codec_set_free(b[i]);
}

/* Sums over all layers and heads of what two codec sets do to the keys of a chunk. */
struct errors {
  oscar_context *context;
  const struct model_geometry *g;
  const oscar_codec_set *fitted, *hadamard;
  double fitted_error, hadamard_error, energy;
};

static double row_errors(const struct errors *e, const oscar_codec *codec, int n, const float *k, size_t stride) {
  int d = e->g->head_dim;
  uint8_t *rows = malloc((size_t)n * oscar_codec_row_bytes(codec));
  float *back = malloc((size_t)n * (size_t)d * sizeof *back);
  assert_ok(e->context, oscar_codec_encode(codec, 0, n, k, stride, rows));
  oscar_codec_decode(codec, 0, n, rows, back, (size_t)d);
  double sum = 0;
  for (int t = 0; t < n; t++)
    for (int i = 0; i < d; i++) {
      double difference = (double)k[(size_t)t * stride + (size_t)i] - (double)back[t * d + i];
      sum += difference * difference;
    }
  free(rows);
  free(back);
  return sum;
}

static oscar_status compare(void *user, int layer, int n, const float *q, const float *k, const float *v, const float *o) {
  (void)q;
  (void)v;
  (void)o;
  struct errors *e = user;
  size_t stride = (size_t)e->g->kv_heads * (size_t)e->g->head_dim;
  for (int h = 0; h < e->g->kv_heads; h++) {
    const float *rows = k + (size_t)h * (size_t)e->g->head_dim;
    e->fitted_error += row_errors(e, oscar_codec_set_get(e->fitted, layer, h, OSCAR_KEYS), n, rows, stride);
    e->hadamard_error += row_errors(e, oscar_codec_set_get(e->hadamard, layer, h, OSCAR_KEYS), n, rows, stride);
    for (int t = 0; t < n; t++)
      for (int i = 0; i < e->g->head_dim; i++) e->energy += pow((double)rows[(size_t)t * stride + (size_t)i], 2);
  }
  return OSCAR_OK;
}

static void keys_of_an_unseen_text_lose_less_than_with_a_hadamard(void **state) {
  const struct fixture f = *(const struct fixture *)*state;
  oscar_codec_set *hadamard = NULL;
  const struct model_geometry *g = model_geometry_of(f.model);
  const oscar_codec_set_info info = {g->layers, g->kv_heads, g->head_dim, "int2-hadamard", "", ""};
  const oscar_plain_options plain = {.rotate = true, .crumbs_per_channel = 1, .clip_keys = 0.96f, .clip_values = 0.92f};
  assert_ok(f.context, oscar_codec_set_create_plain(f.context, &info, &plain, &hadamard));
  struct errors e = {.context = f.context, .g = g, .fitted = f.sets[0], .hadamard = hadamard};

  size_t bytes;
  const char *text = calibration_text(&bytes) + UNSEEN_FROM;
  int32_t *ids;
  int count;
  assert_ok(f.context, tokenizer_encode(model_tokenizer(f.model), text, bytes - UNSEEN_FROM, false, &ids, &count));
  assert_true(count >= UNSEEN);
  oscar_cache_options options;
  model_cache_options(f.model, &options);
  options.budget_bytes = oscar_cache_bytes_for(&options, UNSEEN, 1, UNSEEN);
  oscar_cache *cache;
  oscar_sequence *sequence;
  struct runner *runner;
  assert_ok(f.context, oscar_cache_create(f.context, &options, &cache));
  assert_ok(f.context, oscar_sequence_create(cache, &sequence));
  assert_ok(f.context, runner_create(f.model, cache, UNSEEN, &runner));
  const struct forward_observer observer = {compare, &e};
  assert_ok(f.context, runner_forward(runner, sequence, UNSEEN, ids, 0, NULL, &observer));
  printf("relative error of keys: fitted %.4f, hadamard %.4f\n", e.fitted_error / e.energy, e.hadamard_error / e.energy);
  assert_true(e.fitted_error < 0.8 * e.hadamard_error);

  runner_free(runner);
  oscar_sequence_free(sequence);
  oscar_cache_free(cache);
  mem_free(f.context, ids);
  oscar_codec_set_free(hadamard);
}

int main(void) {
  const char *path = test_model("smollm2-135m");
  if (!path) return SKIPPED;
  struct fixture f;
  open_fixture(&f, path);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_prestate(fits_of_a_real_model_are_valid_and_repeatable, &f),
      cmocka_unit_test_prestate(keys_of_an_unseen_text_lose_less_than_with_a_hadamard, &f),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  close_fixture(&f);
  return failed;
}
