/* Sets share codecs by reference, name their gaps, and survive running out of memory. */
#include "support.h"

#include "failing_alloc.h"
#include "quant/codec.h"

static oscar_codec_spec plain_spec(int d) {
  return (oscar_codec_spec){.head_dim = d, .channels = d, .form = OSCAR_ROW_SCALE_ZERO, .groups = 1, .clip_ratio = 1};
}

static void a_codec_lives_as_long_as_its_last_place(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  oscar_codec_set_info info = {.layers = 2, .kv_heads = 3, .head_dim = 32, .recipe = "int2", .fingerprint = "abc"};
  oscar_codec_set *set = NULL;
  assert_ok(c, oscar_codec_set_create(c, &info, &set));
  assert_string_equal(oscar_codec_set_describe(set)->recipe, "int2");
  assert_string_equal(oscar_codec_set_describe(set)->fingerprint, "abc");
  assert_string_equal(oscar_codec_set_describe(set)->provenance, "");
  oscar_codec_spec spec = plain_spec(32);
  oscar_codec *a = NULL, *b = NULL;
  assert_ok(c, oscar_codec_create(c, &spec, &a));
  assert_ok(c, oscar_codec_create(c, &spec, &b));
  assert_int_equal(oscar_codec_set_check(set), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "layer 0, KV head 0, keys"));
  for (int layer = 0; layer < 2; layer++)
    for (int head = 0; head < 3; head++)
      for (int side = 0; side < 2; side++) {
        assert_null(oscar_codec_set_get(set, layer, head, (oscar_side)side));
        assert_ok(c, oscar_codec_set_assign(set, layer, head, (oscar_side)side, a));
      }
  assert_ok(c, oscar_codec_set_assign(set, 1, 2, OSCAR_VALUES, a)); /* over itself */
  assert_ok(c, oscar_codec_set_assign(set, 1, 2, OSCAR_VALUES, b));
  oscar_codec_release(a);
  oscar_codec_release(b);
  assert_ptr_equal(oscar_codec_set_get(set, 1, 2, OSCAR_VALUES), b);
  assert_ptr_equal(oscar_codec_set_get(set, 0, 0, OSCAR_KEYS), a);
  assert_int_equal(a->references, 11);
  assert_ok(c, oscar_codec_set_check(set));
  oscar_codec_set_free(set);
  oscar_codec_set_free(NULL);
  oscar_codec_release(NULL);
  failing_context_free(c, &f);
}

static void wrong_places_and_codecs_are_refused(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 1);
  oscar_codec_set_info info = {.layers = 2, .kv_heads = 2, .head_dim = 32, .recipe = "int2"};
  oscar_codec_set *set = NULL;
  oscar_codec_set_info wrong = info;
  wrong.layers = 0;
  assert_int_equal(oscar_codec_set_create(c, &wrong, &set), OSCAR_INVALID_ARGUMENT);
  wrong = info, wrong.kv_heads = INT32_MAX;
  assert_int_equal(oscar_codec_set_create(c, &wrong, &set), OSCAR_INVALID_ARGUMENT);
  wrong = info, wrong.head_dim = 24;
  assert_int_equal(oscar_codec_set_create(c, &wrong, &set), OSCAR_INVALID_ARGUMENT);
  wrong = info, wrong.recipe = NULL;
  assert_int_equal(oscar_codec_set_create(c, &wrong, &set), OSCAR_INVALID_ARGUMENT);
  wrong.recipe = "a recipe's name that goes on for longer than the sixty-three bytes it may have";
  assert_int_equal(oscar_codec_set_create(c, &wrong, &set), OSCAR_INVALID_ARGUMENT);
  assert_null(set);

  assert_ok(c, oscar_codec_set_create(c, &info, &set));
  oscar_codec_spec spec = plain_spec(32), other = plain_spec(64), grouped = plain_spec(32);
  grouped.groups = 2;
  oscar_codec *good = NULL, *large = NULL, *two = NULL;
  assert_ok(c, oscar_codec_create(c, &spec, &good));
  assert_ok(c, oscar_codec_create(c, &other, &large));
  assert_ok(c, oscar_codec_create(c, &grouped, &two));
  assert_int_equal(oscar_codec_set_assign(set, 2, 0, OSCAR_KEYS, good), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_codec_set_assign(set, -1, 0, OSCAR_KEYS, good), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_codec_set_assign(set, 0, 2, OSCAR_KEYS, good), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_codec_set_assign(set, 0, 0, (oscar_side)2, good), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_codec_set_assign(set, 0, 0, OSCAR_KEYS, NULL), OSCAR_INVALID_ARGUMENT);
  assert_int_equal(oscar_codec_set_assign(set, 0, 0, OSCAR_KEYS, large), OSCAR_INVALID_ARGUMENT);
  assert_null(oscar_codec_set_get(set, 0, 5, OSCAR_KEYS));
  for (int i = 0; i < 8; i++) assert_ok(c, oscar_codec_set_assign(set, i / 4, i / 2 % 2, (oscar_side)(i % 2), good));
  assert_ok(c, oscar_codec_set_check(set));
  assert_ok(c, oscar_codec_set_assign(set, 1, 1, OSCAR_VALUES, two)); /* heads of a layer must look alike to a kernel */
  assert_int_equal(oscar_codec_set_check(set), OSCAR_INVALID_ARGUMENT);
  assert_non_null(strstr(oscar_last_error(c), "layer 1, values: KV head 1"));
  assert_ok(c, oscar_codec_set_assign(set, 1, 0, OSCAR_VALUES, two));
  assert_ok(c, oscar_codec_set_check(set));
  oscar_codec_release(good);
  oscar_codec_release(large);
  oscar_codec_release(two);
  oscar_codec_set_free(set);
  oscar_context_free(c);
}

static void running_out_of_memory_loses_nothing(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  oscar_codec_set_info info = {.layers = 2, .kv_heads = 2, .head_dim = 32, .recipe = "int2"};
  oscar_codec_set *set = NULL;
  oscar_codec *codec = NULL;
  oscar_codec_spec spec = plain_spec(32);
  sweep_allocations(c, &f, oscar_codec_set_create(c, &info, &set));
  sweep_allocations(c, &f, oscar_codec_create(c, &spec, &codec));
  float x[32] = {1, -1};
  uint8_t row[12];
  sweep_allocations(c, &f, oscar_codec_encode(codec, 0, 1, x, 32, row));
  sweep_allocations(c, &f, oscar_codec_set_assign(set, 0, 0, OSCAR_KEYS, codec));
  oscar_codec_release(codec);
  oscar_codec_set_free(set);
  failing_context_free(c, &f);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_codec_lives_as_long_as_its_last_place),
      cmocka_unit_test(wrong_places_and_codecs_are_refused),
      cmocka_unit_test(running_out_of_memory_loses_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
