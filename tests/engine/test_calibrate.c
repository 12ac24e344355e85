/* Calibration against a fake model that watches how it is fed: windows, chunks, passes, provenance, stopping, running out. */
#include "failing_alloc.h"
#include "fake_model.h"

#include <jansson.h>

static const char sample[] = "Nobody had told the weather vane that the barn was gone, and so it went on pointing, with great "
                             "conviction, from the roof of a parked lorry. Two hundred bytes are enough to fill several windows.";
enum { SAMPLE_BYTES = sizeof sample - 1 };

static const char *const all_types[] = {"int2-centred", "int2-oscar", "int4"};

static struct calibrate_options short_options(int window) {
  struct calibrate_options options;
  calibrate_options_default(&options);
  options.text = sample;
  options.text_bytes = SAMPLE_BYTES;
  options.window = window;
  return options;
}

static void free_sets(int count, oscar_codec_set **sets) {
  for (int i = 0; i < count; i++) oscar_codec_set_free(sets[i]);
}

static const oscar_codec_spec *spec_of(const oscar_codec_set *set, int layer, int head, oscar_side side) {
  return oscar_codec_describe(oscar_codec_set_get(set, layer, head, side));
}

static void one_pass_in_fresh_windows_serves_all_types(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct model m;
  fake_model_init(&m, c);
  struct calibrate_options options = short_options(30);
  oscar_codec_set *sets[3];
  assert_ok(c, calibrate_model(&m, &options, NULL, 3, all_types, sets));
  assert_int_equal(m.fed, SAMPLE_BYTES);
  assert_int_equal(m.sequences, (SAMPLE_BYTES + 29) / 30);
  assert_int_equal(m.longest, 30);
  assert_int_equal(m.open, 0);

  for (int i = 0; i < 3; i++) {
    assert_string_equal(oscar_codec_set_describe(sets[i])->recipe, all_types[i]);
    assert_string_equal(oscar_codec_set_describe(sets[i])->fingerprint, m.fingerprint);
    assert_ok(c, oscar_codec_set_check(sets[i]));
    assert_int_equal(oscar_codec_crumbs(oscar_codec_set_get(sets[i], 0, 0, OSCAR_KEYS)), i == 2 ? 2 * FAKE_DIM : FAKE_DIM);
  }
  assert_true(spec_of(sets[0], 0, 0, OSCAR_KEYS)->clip_ratio == 0.96f);
  assert_true(spec_of(sets[0], 0, 0, OSCAR_VALUES)->clip_ratio == 0.92f);
  assert_true(spec_of(sets[2], 0, 0, OSCAR_KEYS)->clip_ratio == 1);
  assert_memory_not_equal(spec_of(sets[0], 1, 0, OSCAR_KEYS)->encode, spec_of(sets[0], 1, 1, OSCAR_KEYS)->encode,
                          sizeof(float) * FAKE_DIM * FAKE_DIM);                                                     /* per head */
  assert_ptr_equal(oscar_codec_set_get(sets[1], 1, 0, OSCAR_KEYS), oscar_codec_set_get(sets[1], 1, 1, OSCAR_KEYS)); /* shared */
  float mean_oscar = 0, mean_int2 = 0;
  for (int i = 0; i < FAKE_DIM; i++) {
    mean_oscar += fabsf(spec_of(sets[1], 0, 0, OSCAR_KEYS)->mean[i]);
    mean_int2 += fabsf(spec_of(sets[0], 0, 0, OSCAR_KEYS)->mean[i]);
  }
  assert_true(mean_oscar == 0);
  assert_true(mean_int2 > 0);
  free_sets(3, sets);
  oscar_context_free(c);
}

static void every_window_begins_with_bos_where_the_model_wants_it(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct model m;
  fake_model_init(&m, c);
  m.bos = 1;
  struct calibrate_options options = short_options(30);
  oscar_codec_set *set;
  assert_ok(c, calibrate_model(&m, &options, NULL, 1, all_types, &set));
  int windows = (SAMPLE_BYTES + 28) / 29;
  assert_int_equal(m.sequences, windows);
  assert_int_equal(m.fed, SAMPLE_BYTES + windows);
  assert_int_equal(m.longest, 30);
  assert_int_equal(m.without_bos, 0);
  free_sets(1, &set);
  oscar_context_free(c);
}

static void the_shipped_text_is_used_when_none_is_given(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct model m;
  fake_model_init(&m, c);
  size_t bytes;
  const char *text = calibration_text(&bytes);
  assert_true(bytes > 50000);
  assert_int_equal(strlen(text), bytes);
  struct calibrate_options options;
  calibrate_options_default(&options);
  oscar_codec_set *set;
  assert_ok(c, calibrate_model(&m, &options, NULL, 1, all_types, &set));
  assert_int_equal(m.fed, bytes);
  assert_int_equal(m.longest, FAKE_CONTEXT); /* the default window does not exceed what the model was trained for */
  assert_true(m.largest_chunk <= FAKE_CONTEXT);
  free_sets(1, &set);
  fake_model_init(&m, c);
  options.max_tokens = 130;
  assert_ok(c, calibrate_model(&m, &options, NULL, 1, all_types, &set));
  assert_int_equal(m.fed, 130);
  free_sets(1, &set);
  oscar_context_free(c);
}

static void the_shipped_text_is_the_file_byte_for_byte(void **state) {
  (void)state;
  size_t bytes;
  const char *text = calibration_text(&bytes);
  FILE *file = fopen(OSCAR_SOURCE_DIR "/data/calibration.txt", "rb");
  assert_non_null(file);
  char *read = malloc(bytes + 1);
  assert_int_equal(fread(read, 1, bytes + 1, file), bytes);
  assert_memory_equal(read, text, bytes);
  free(read);
  fclose(file);
}

static void a_set_says_where_it_comes_from(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct model m;
  fake_model_init(&m, c);
  struct calibrate_options options = short_options(64);
  options.text = "abc";
  options.text_bytes = 3;
  oscar_codec_set *set;
  assert_ok(c, calibrate_model(&m, &options, NULL, 1, all_types, &set));
  const oscar_codec_set_info *info = oscar_codec_set_describe(set);
  json_t *root = json_loads(info->provenance, 0, NULL);
  assert_non_null(root);
  /* SHA-256 of "abc": FIPS 180-2, appendix B.1 */
  assert_string_equal(json_string_value(json_object_get(root, "text_sha256")),
                      "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  assert_int_equal(json_integer_value(json_object_get(root, "tokens")), 3);
  assert_int_equal(json_integer_value(json_object_get(root, "window")), 64);
  assert_string_equal(json_string_value(json_object_get(root, "version")), oscar_version());
  assert_non_null(strstr(info->provenance, "\"clip_keys\":0.96,")); /* not 0.95999997 */
  json_decref(root);

  assert_true(calibrate_is_current("int2-centred", info));
  assert_false(calibrate_is_current("int4", info));
  oscar_codec_set_info old = *info;
  old.provenance = "{\"fit\":{\"per_head\":false}}";
  assert_false(calibrate_is_current("int2-centred", &old));
  old.provenance = "";
  assert_false(calibrate_is_current("int2-centred", &old));
  old.provenance = "[1]";
  assert_false(calibrate_is_current("int2-centred", &old));
  free_sets(1, &set);
  oscar_context_free(c);
}

static void the_proxy_costs_a_second_pass_for_the_published_recipe_only(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct model m;
  fake_model_init(&m, c);
  struct calibrate_options options = short_options(30);
  oscar_codec_set *plain[3], *proxy[3];
  assert_ok(c, calibrate_model(&m, &options, NULL, 3, all_types, plain));
  options.proxy_values = true;
  m.fed = 0;
  assert_ok(c, calibrate_model(&m, &options, NULL, 3, all_types, proxy));
  assert_int_equal(m.fed, 2 * SAMPLE_BYTES);
  size_t bytes = sizeof(float) * FAKE_DIM * FAKE_DIM;
  for (int i = 0; i < 3; i++) {
    assert_memory_equal(spec_of(plain[i], 0, 0, OSCAR_KEYS)->encode, spec_of(proxy[i], 0, 0, OSCAR_KEYS)->encode, bytes);
    if (i == 1)
      assert_memory_not_equal(spec_of(plain[i], 0, 0, OSCAR_VALUES)->encode, spec_of(proxy[i], 0, 0, OSCAR_VALUES)->encode,
                              bytes);
    else
      assert_memory_equal(spec_of(plain[i], 0, 0, OSCAR_VALUES)->encode, spec_of(proxy[i], 0, 0, OSCAR_VALUES)->encode, bytes);
  }
  m.fed = 0;
  oscar_codec_set *one;
  assert_ok(c, calibrate_model(&m, &options, NULL, 1, all_types, &one)); /* int2 does not need it */
  assert_int_equal(m.fed, SAMPLE_BYTES);
  free_sets(3, plain);
  free_sets(3, proxy);
  free_sets(1, &one);
  oscar_context_free(c);
}

struct watcher {
  int calls, stop_at; /* the report that says no; 0: none */
  int64_t last, total;
};
static bool watch(void *user, const char *what, int64_t done, int64_t total) {
  struct watcher *w = user;
  assert_string_equal(what, "calibration");
  assert_true(done >= w->last && done <= total);
  w->last = done;
  w->total = total;
  return ++w->calls != w->stop_at;
}

static void progress_is_reported_and_any_report_can_stop(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct model m;
  fake_model_init(&m, c);
  struct calibrate_options options = short_options(30);
  options.proxy_values = true;
  oscar_codec_set *sets[3];
  struct watcher w = {0};
  struct progress progress = {watch, &w};
  assert_ok(c, calibrate_model(&m, &options, &progress, 3, all_types, sets));
  assert_int_equal(w.total, 2 * SAMPLE_BYTES);
  assert_int_equal(w.last, w.total);
  free_sets(3, sets);
  int calls = w.calls;
  for (int stop = 1; stop <= calls; stop++) {
    w = (struct watcher){.stop_at = stop};
    assert_int_equal(calibrate_model(&m, &options, &progress, 3, all_types, sets), OSCAR_CANCELLED);
    assert_int_equal(w.calls, stop);
    for (int i = 0; i < 3; i++) assert_null(sets[i]);
    assert_int_equal(m.open, 0);
  }
  oscar_context_free(c);
}

static void wrong_calibrations_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct model m;
  fake_model_init(&m, c);
  oscar_codec_set *sets[2] = {(oscar_codec_set *)&m, (oscar_codec_set *)&m};
  struct calibrate_options options = short_options(30);
  const char *const wrong[] = {"int2-centred", "int8"};
  assert_int_equal(calibrate_model(&m, &options, NULL, 2, wrong, sets), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "int8"));
  assert_null(sets[0]);
  assert_null(sets[1]);
  options.window = FAKE_CONTEXT + 1;
  assert_int_equal(calibrate_model(&m, &options, NULL, 1, all_types, sets), OSCAR_INVALID_ARGUMENT);
  options.window = 1;
  assert_int_equal(calibrate_model(&m, &options, NULL, 1, all_types, sets), OSCAR_INVALID_ARGUMENT);
  options = short_options(30);
  options.text_bytes = 0;
  assert_int_equal(calibrate_model(&m, &options, NULL, 1, all_types, sets), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(m.fed, 0);
  options = short_options(30);
  m.broken = true;
  assert_int_equal(calibrate_model(&m, &options, NULL, 1, all_types, sets), OSCAR_NUMERIC);
  assert_non_null(strstr(oscar_last_error(c), "layer 1"));
  assert_int_equal(m.open, 0);
  oscar_context_free(c);
}

/* Crumbs of all rows of a token, per channel of a side. */
static double mean_bits(const oscar_codec_set *set) {
  double crumbs = 0;
  for (int l = 0; l < FAKE_LAYERS; l++)
    for (int h = 0; h < FAKE_KV_HEADS; h++)
      for (int side = 0; side < 2; side++) crumbs += oscar_codec_crumbs(oscar_codec_set_get(set, l, h, (oscar_side)side));
  return 2 * crumbs / (FAKE_LAYERS * FAKE_KV_HEADS * 2 * FAKE_DIM);
}

static void graded_codes_keep_their_bits_and_ask_every_layer_once(void **state) {
  (void)state;
  static const char *const graded[] = {"int2", "int2@3", "int2-centred"};
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct model m;
  fake_model_init(&m, c);
  struct calibrate_options options = short_options(90);
  oscar_codec_set *sets[3];
  assert_ok(c, calibrate_model(&m, &options, NULL, 1, graded, sets));
  assert_true(calibrate_is_current(graded[0], oscar_codec_set_describe(sets[0])));
  assert_int_equal(m.probes, 0); /* only on request */
  free_sets(1, sets);
  m.fed = 0;
  options.measure_layers = true;
  assert_ok(c, calibrate_model(&m, &options, NULL, 3, graded, sets));
  assert_int_equal(m.fed, SAMPLE_BYTES);
  assert_int_equal(m.probes, FAKE_LAYERS + 1);
  assert_true(mean_bits(sets[0]) == 2);
  assert_true(mean_bits(sets[1]) == 3);
  for (int i = 0; i < 2; i++) {
    const oscar_codec_set_info *info = oscar_codec_set_describe(sets[i]);
    assert_string_equal(info->recipe, graded[i]);
    assert_true(calibrate_is_current(graded[i], info));
    assert_false(calibrate_is_current(graded[1 - i], info));
    assert_non_null(spec_of(sets[i], 0, 0, OSCAR_KEYS)->rope);
    assert_null(spec_of(sets[i], 0, 0, OSCAR_VALUES)->rope);
  }
  free_sets(3, sets);
  m.probes = 0;
  assert_ok(c, calibrate_model(&m, &options, NULL, 1, all_types, sets));
  assert_int_equal(m.probes, 0); /* nothing is measured for those that do not ask */
  free_sets(1, sets);
  options.window = 64; /* no token after the sink */
  assert_int_equal(calibrate_model(&m, &options, NULL, 1, graded, sets), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "sink"));
  oscar_context_free(c);
}

/* Part of a text is taken from all over it: with 40 of the tokens in windows of 10, the first and the last are among them. */
static void a_part_of_the_text_is_taken_from_all_over_it(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  struct model m;
  fake_model_init(&m, c);
  struct calibrate_options options = short_options(10);
  options.max_tokens = 40;
  oscar_codec_set *set;
  assert_ok(c, calibrate_model(&m, &options, NULL, 1, all_types, &set));
  assert_int_equal(m.fed, 40);
  assert_int_equal(m.sequences, 4);
  assert_int_equal(m.longest, 10);
  assert_int_equal(m.first_ids[0], (unsigned char)options.text[0]);
  assert_int_equal(m.first_ids[1], (unsigned char)options.text[(SAMPLE_BYTES - 10) / 3]);
  assert_int_equal(m.first_ids[3], (unsigned char)options.text[SAMPLE_BYTES - 10]);
  oscar_codec_set_free(set);
  oscar_context_free(c);
}

static oscar_status calibrate_and_free(struct model *m, const struct calibrate_options *options) {
  oscar_codec_set *sets[3];
  oscar_status status = calibrate_model(m, options, NULL, 3, all_types, sets);
  if (status == OSCAR_OK) free_sets(3, sets);
  return status;
}

static oscar_status calibrate_graded_and_free(struct model *m, const struct calibrate_options *options) {
  static const char *const graded[] = {"int2"};
  oscar_codec_set *set;
  oscar_status status = calibrate_model(m, options, NULL, 1, graded, &set);
  if (status == OSCAR_OK) oscar_codec_set_free(set);
  return status;
}

static void running_out_of_memory_anywhere_leaks_nothing(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  struct model m;
  fake_model_init(&m, c);
  struct calibrate_options options = short_options(30);
  options.proxy_values = true;
  sweep_allocations(c, &f, calibrate_and_free(&m, &options));
  options = short_options(90);
  options.measure_layers = true;
  sweep_allocations(c, &f, calibrate_graded_and_free(&m, &options));
  failing_context_free(c, &f);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(one_pass_in_fresh_windows_serves_all_types),
      cmocka_unit_test(graded_codes_keep_their_bits_and_ask_every_layer_once),
      cmocka_unit_test(a_part_of_the_text_is_taken_from_all_over_it),
      cmocka_unit_test(every_window_begins_with_bos_where_the_model_wants_it),
      cmocka_unit_test(the_shipped_text_is_used_when_none_is_given),
      cmocka_unit_test(the_shipped_text_is_the_file_byte_for_byte),
      cmocka_unit_test(a_set_says_where_it_comes_from),
      cmocka_unit_test(the_proxy_costs_a_second_pass_for_the_published_recipe_only),
      cmocka_unit_test(progress_is_reported_and_any_report_can_stop),
      cmocka_unit_test(wrong_calibrations_are_refused),
      cmocka_unit_test(running_out_of_memory_anywhere_leaks_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
