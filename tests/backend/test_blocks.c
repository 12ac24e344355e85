/* Weight blocks against the decoder of the PyPI package gguf (tools/make_block_vectors.py stores its results). */
#include "support.h"

#include "backend/blocks.h"
#include "base/file.h"

static const struct kind {
  const char *file;
  enum weight_type type;
  int elements;
  size_t bytes;
} kinds[] = {
    {"f32", WEIGHT_F32, 1, 4},       {"f16", WEIGHT_F16, 1, 2},       {"bf16", WEIGHT_BF16, 1, 2},
    {"q4_0", WEIGHT_Q4_0, 32, 18},   {"q4_1", WEIGHT_Q4_1, 32, 20},   {"q5_0", WEIGHT_Q5_0, 32, 22},
    {"q5_1", WEIGHT_Q5_1, 32, 24},   {"q8_0", WEIGHT_Q8_0, 32, 34},   {"q4_k", WEIGHT_Q4_K, 256, 144},
    {"q5_k", WEIGHT_Q5_K, 256, 176}, {"q6_k", WEIGHT_Q6_K, 256, 210},
};

static void every_type_has_the_published_size(void **state) {
  (void)state;
  for (size_t i = 0; i < ARRAY_LENGTH(kinds); i++) {
    int elements = 0;
    size_t bytes = 0;
    assert_true(weight_block(kinds[i].type, &elements, &bytes));
    assert_int_equal(elements, kinds[i].elements);
    assert_int_equal(bytes, kinds[i].bytes);
  }
  int elements;
  size_t bytes;
  for (int type = -2; type < 60; type++) {
    bool known = false;
    for (size_t i = 0; i < ARRAY_LENGTH(kinds); i++) known |= (int)kinds[i].type == type;
    assert_int_equal(weight_block((enum weight_type)type, &elements, &bytes), known);
  }
}

static void types_have_their_names(void **state) {
  (void)state;
  assert_string_equal(weight_type_name(WEIGHT_F32), "F32");
  assert_string_equal(weight_type_name(WEIGHT_Q4_0), "Q4_0");
  assert_string_equal(weight_type_name(WEIGHT_Q5_0), "Q5_0");
  assert_string_equal(weight_type_name(WEIGHT_Q8_0), "Q8_0");
  assert_string_equal(weight_type_name(WEIGHT_Q4_K), "Q4_K");
  assert_string_equal(weight_type_name(WEIGHT_Q6_K), "Q6_K");
  assert_string_equal(weight_type_name(WEIGHT_BF16), "BF16");
  assert_string_equal(weight_type_name(16), "IQ2_XXS");
  assert_string_equal(weight_type_name(23), "IQ4_XS");
  assert_string_equal(weight_type_name(39), "MXFP4");
  assert_string_equal(weight_type_name(4), "unknown");
  assert_string_equal(weight_type_name(-1), "unknown");
  assert_string_equal(weight_type_name(1000), "unknown");
}

/* Bits, not values: both decoders compute exact products and round once at the end, so even the sign of a zero agrees where the
 * formula has one operation; a sum of zeros may differ in sign only, which compares equal. */
static void every_type_decodes_to_the_stored_floats_exactly(void **state) {
  (void)state;
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  for (size_t i = 0; i < ARRAY_LENGTH(kinds); i++) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s.bin", OSCAR_TEST_DATA, kinds[i].file);
    struct file_map map;
    assert_ok(c, file_map_open(c, path, &map));
    uint32_t head[4];
    memcpy(head, map.data, sizeof head);
    assert_int_equal(head[0], kinds[i].type);
    size_t count = (size_t)head[1] * head[3], block_bytes = (size_t)head[1] * head[2];
    assert_int_equal(map.bytes, sizeof head + block_bytes + count * sizeof(float));
    /* one byte off, as rows in a file may lie */
    uint8_t *blocks = malloc(block_bytes + 1);
    float *want = malloc(count * sizeof(float)), *got = malloc(count * sizeof(float));
    assert_true(blocks && want && got);
    memcpy(blocks + 1, map.data + sizeof head, block_bytes);
    memcpy(want, map.data + sizeof head + block_bytes, count * sizeof(float));
    weight_dequantize(kinds[i].type, (int64_t)count, blocks + 1, got);
    for (size_t k = 0; k < count; k++)
      if (!(got[k] == want[k])) fail_msg("%s element %zu: %a, expected %a", kinds[i].file, k, (double)got[k], (double)want[k]);
    free(blocks);
    free(want);
    free(got);
    file_map_close(&map);
  }
  oscar_context_free(c);
}

static void infinite_scales_do_not_trap(void **state) {
  (void)state;
  uint8_t block[34];
  float out[32];
  memset(block, 1, sizeof block);
  block[0] = 0x00, block[1] = 0x7C;
  weight_dequantize(WEIGHT_Q8_0, 32, block, out);
  assert_true(isinf(out[0]));
  block[1] = 0x7E;
  weight_dequantize(WEIGHT_Q8_0, 32, block, out);
  assert_true(isnan(out[0]));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_type_has_the_published_size),
      cmocka_unit_test(types_have_their_names),
      cmocka_unit_test(every_type_decodes_to_the_stored_floats_exactly),
      cmocka_unit_test(infinite_scales_do_not_trap),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
