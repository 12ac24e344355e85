/* The baseline quantizers against hand-worked blocks, against their definitions in double precision, and as filters of a cache.
 */
#include "failing_alloc.h"

#include "engine/engine.h"
#include "eval/baselines.h"

#include <oscar/rotation.h>

/* ---- definitions ---- */

/* To the nearest number of fp16, ties to even; finite or infinite by IEEE's rule. */
static double half(double x) {
  if (x == 0) return 0;
  int exponent = ilogb(x);
  if (exponent < -14) exponent = -14;
  const double unit = ldexp(1, exponent - 10), rounded = nearbyint(x / unit) * unit;
  return fabs(rounded) > 65504 ? (double)INFINITY : rounded;
}

static void random_block(uint64_t *seed, double scale, double offset, float x[32]) {
  for (int i = 0; i < 32; i++) x[i] = (float)(offset + scale * (double)test_normal(seed));
}

static void page_of(uint64_t *seed, int d, float scale, float *rows) {
  for (int i = 0; i < 64 * d; i++) rows[i] = scale * test_normal(seed);
}

static double squared_error(int d, const float *x, const float *y, int only_row, int only_channel) {
  double sum = 0;
  for (int row = 0; row < 64; row++)
    for (int i = 0; i < d; i++)
      if ((only_row < 0 || row == only_row) && (only_channel < 0 || i == only_channel))
        sum += pow((double)x[row * d + i] - (double)y[row * d + i], 2);
  return sum;
}

static struct baseline *make(oscar_context *c, const char *kv, int d) {
  struct baseline *b;
  assert_ok(c, baseline_create(c, kv, d, &b));
  assert_non_null(b);
  return b;
}

static int apply(const struct baseline *b, oscar_side side, int d, const float *rows, float *out) {
  const oscar_page_filter *f = baseline_filter(b);
  return f->apply(f->user, 0, 0, side, d, rows, out);
}

/* ---- KIVI ---- */

static void a_ramp_in_kivi_is_as_worked_out_by_hand(void **state) {
  (void)state;
  float x[32], y[32];
  for (int i = 0; i < 32; i++) x[i] = (float)i;
  struct kivi_group g;
  assert_true(kivi_quantize(x, 1, &g));
  assert_int_equal(g.minimum, 0);
  assert_int_equal(g.scale, 0x492B); /* 31/3 = 10.333.. becomes 1323 * 2^-7 = 10.3359375 */
  for (int i = 0; i < 32; i++) assert_int_equal(g.codes[i], i <= 5 ? 0 : i <= 15 ? 1 : i <= 25 ? 2 : 3);
  kivi_dequantize(&g, y, 1);
  assert_true(y[0] == 0 && y[6] == 10.3359375f && y[20] == 20.671875f && y[31] == 31.0078125f);
}

static void kivi_is_its_definition(void **state) {
  (void)state;
  uint64_t seed = 1;
  static const double scales[] = {1e-3, .1, 1, 30, 5000}, offsets[] = {0, 1, -7, 300, -20000};
  for (int round = 0; round < 5000; round++) {
    float x[32], y[32];
    random_block(&seed, scales[round % 5], offsets[round / 5 % 5], x);
    struct kivi_group g;
    assert_true(kivi_quantize(x, 1, &g));
    kivi_dequantize(&g, y, 1);
    double min = (double)INFINITY, max = (double)-INFINITY;
    for (int i = 0; i < 32; i++) {
      min = fmin(min, (double)x[i]);
      max = fmax(max, (double)x[i]);
    }
    const double s = half((double)((float)max - (float)min) / 3), m = half(min);
    assert_true((double)f16_to_f32(g.minimum) == m);
    assert_true(fabs((double)f16_to_f32(g.scale) - s) <= 1e-3 * s + 6e-8); /* (max - min) / 3 is one float rounding off */
    const double scale = (double)f16_to_f32(g.scale);
    for (int i = 0; i < 32; i++) {
      double q = scale > 0 ? ((double)x[i] - m) / scale : 0;
      q = q < 0 ? 0 : q > 3 ? 3 : q;
      assert_in_range(g.codes[i], 0, 3);
      assert_true(fabs(q - (double)g.codes[i]) <= .5 + 1e-5);
      const double decoded = scale * g.codes[i] + m;
      assert_true(fabs((double)y[i] - decoded) <= 1e-6 * (fabs(m) + 3 * scale));
    }
  }
}

static void constant_groups_are_kept_by_kivi(void **state) {
  (void)state;
  static const float kept[] = {0, 1, -1, .0999755859375f, 1024, -65504, 0x1p-24f};
  struct kivi_group g;
  float x[32], y[32];
  for (size_t k = 0; k < ARRAY_LENGTH(kept); k++) {
    for (int i = 0; i < 32; i++) x[i] = kept[k];
    assert_true(kivi_quantize(x, 1, &g));
    kivi_dequantize(&g, y, 1);
    for (int i = 0; i < 32; i++) assert_true(y[i] == kept[k]);
  }
  for (int i = 0; i < 32; i++) x[i] = i % 2 ? 1e-9f : -1e-9f; /* scale and minimum are below fp16 */
  assert_true(kivi_quantize(x, 1, &g));
  kivi_dequantize(&g, y, 1);
  for (int i = 0; i < 32; i++) assert_true(y[i] == 0);
}

static void numbers_beyond_the_metadata_of_kivi_are_refused(void **state) {
  (void)state;
  struct kivi_group g;
  static const float refused[] = {NAN, INFINITY, -INFINITY, -65520, -3e38f, 3e38f, 2e5f};
  static const float taken[] = {-65519, 65519, 1.9e5f};
  for (int at = 0; at < 32; at++) {
    float x[32] = {0};
    for (size_t k = 0; k < ARRAY_LENGTH(refused); k++) {
      x[at] = refused[k];
      assert_false(kivi_quantize(x, 1, &g));
    }
    for (size_t k = 0; k < ARRAY_LENGTH(taken); k++) {
      x[at] = taken[k];
      assert_true(kivi_quantize(x, 1, &g));
    }
    x[at] = 3e38f;
    x[(at + 1) % 32] = -3e38f;
    assert_false(kivi_quantize(x, 1, &g)); /* their difference is not finite */
  }
}

/* ---- q4_0 ---- */

static void a_ramp_in_q4_0_is_as_worked_out_by_hand(void **state) {
  (void)state;
  float x[32], y[32];
  for (int i = 0; i < 32; i++) x[i] = (float)(i - 16);
  struct block_q4_0 block;
  assert_true(q4_0_quantize(x, &block));
  /* -16 is largest: d = 2, and code (i - 16)/2 + 8, halves upwards, at most 15 */
  static const uint8_t bytes[18] = {0x00, 0x40, 0x80, 0x91, 0x91, 0xA2, 0xA2, 0xB3, 0xB3,
                                    0xC4, 0xC4, 0xD5, 0xD5, 0xE6, 0xE6, 0xF7, 0xF7, 0xF8};
  assert_int_equal(sizeof block, sizeof bytes);
  assert_memory_equal(&block, bytes, sizeof bytes);
  weight_dequantize(WEIGHT_Q4_0, 32, &block, y);
  assert_true(y[0] == -16 && y[1] == -14 && y[2] == -14 && y[16] == 0 && y[29] == 14 && y[31] == 14);

  memset(x, 0, sizeof x);
  x[3] = 4;
  x[5] = -4; /* the first of equal magnitudes decides the sign of d */
  assert_true(q4_0_quantize(x, &block));
  weight_dequantize(WEIGHT_Q4_0, 32, &block, y);
  assert_true(y[3] == 4 && y[5] == -3.5f && y[0] == 0);
}

static void q4_0_is_its_definition(void **state) {
  (void)state;
  uint64_t seed = 2;
  static const double scales[] = {1e-3, .1, 1, 30, 50000}, offsets[] = {0, 1, -7, 300, -20000};
  for (int round = 0; round < 5000; round++) {
    float x[32], y[32];
    random_block(&seed, scales[round % 5], offsets[round / 5 % 5], x);
    struct block_q4_0 block;
    assert_true(q4_0_quantize(x, &block));
    weight_dequantize(WEIGHT_Q4_0, 32, &block, y);
    double largest = 0;
    for (int i = 0; i < 32; i++)
      if (fabs((double)x[i]) > fabs(largest)) largest = (double)x[i];
    const double d = largest / -8, stored = half(d);
    assert_true((double)block_half(block.d) == stored);
    for (int i = 0; i < 32; i++) {
      const int code = i < 16 ? block.qs[i] & 15 : block.qs[i - 16] >> 4;
      double q = (double)x[i] / d + 8;
      if (q > 15) q = 15;
      assert_true(fabs(q - (double)code) <= .5 + 1e-5);
      assert_true((double)y[i] == stored * (code - 8)); /* 11 and 4 bits: exact in float */
    }
  }
}

static void small_blocks_are_zeros_and_numbers_beyond_fp16_are_refused_by_q4_0(void **state) {
  (void)state;
  static const float zeros[] = {0, -0.0f, 1e-40f, -0x1p-149f, 1e-8f}, refused[] = {NAN, INFINITY, -INFINITY, 524160, -3e38f};
  struct block_q4_0 block;
  float y[32];
  for (int at = 0; at < 32; at++) {
    float x[32] = {0};
    for (size_t k = 0; k < ARRAY_LENGTH(zeros); k++) {
      x[at] = zeros[k];
      assert_true(q4_0_quantize(x, &block));
      weight_dequantize(WEIGHT_Q4_0, 32, &block, y);
      for (int i = 0; i < 32; i++) assert_true(y[i] == 0);
    }
    for (size_t k = 0; k < ARRAY_LENGTH(refused); k++) {
      x[at] = refused[k];
      assert_false(q4_0_quantize(x, &block));
    }
    x[at] = -524032; /* 8 times the largest number of fp16 */
    assert_true(q4_0_quantize(x, &block));
    weight_dequantize(WEIGHT_Q4_0, 32, &block, y);
    for (int i = 0; i < 32; i++) assert_true(y[i] == x[i]);
  }
  for (int sign = -1; sign <= 1; sign += 2) {
    float x[32];
    for (int i = 0; i < 32; i++) x[i] = (float)sign * 0.75f;
    assert_true(q4_0_quantize(x, &block));
    weight_dequantize(WEIGHT_Q4_0, 32, &block, y);
    for (int i = 0; i < 32; i++) assert_true(y[i] == x[i]);
  }
}

/* ---- filters ---- */

/* An offset costs nothing along the groups and ruins what shares a group with it across them. */
static void kivi_groups_keys_along_tokens_and_values_along_channels(void **state) {
  (void)state;
  enum { D = 64 };
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct baseline *kivi = make(c, "int2-kivi", D), *q4 = make(c, "q4_0", D);
  static float plain[64 * D], channel[64 * D], token[64 * D], out[64 * D];
  uint64_t seed = 5;
  page_of(&seed, D, 1, plain);
  memcpy(channel, plain, sizeof plain);
  memcpy(token, plain, sizeof plain);
  for (int i = 0; i < 64; i++) {
    channel[i * D + 9] += 64;
    token[40 * D + i] += 64;
  }
  double error[2][3];
  for (int side = 0; side < 2; side++) {
    const float *const pages[] = {plain, channel, token};
    for (int p = 0; p < 3; p++) {
      assert_int_equal(apply(kivi, (oscar_side)side, D, pages[p], out), 64);
      error[side][p] = squared_error(D, pages[p], out, -1, -1);
    }
  }
  /* The minimum near 64 is rounded to 1/32 at most, beside steps of more than 1. */
  assert_true(fabs(error[OSCAR_KEYS][1] / error[OSCAR_KEYS][0] - 1) < .01);
  assert_true(fabs(error[OSCAR_VALUES][2] / error[OSCAR_VALUES][0] - 1) < .01);
  assert_true(error[OSCAR_KEYS][2] > 10 * error[OSCAR_KEYS][0]);
  assert_true(error[OSCAR_VALUES][1] > 10 * error[OSCAR_VALUES][0]);

  /* Groups end at 32: what is outside that of the offset is as it was. */
  static float before[64 * D];
  assert_int_equal(apply(kivi, OSCAR_KEYS, D, plain, before), 64);
  assert_int_equal(apply(kivi, OSCAR_KEYS, D, token, out), 64);
  assert_memory_equal(before, out, sizeof(float) * 32 * D);
  assert_int_equal(apply(kivi, OSCAR_VALUES, D, plain, before), 64);
  assert_int_equal(apply(kivi, OSCAR_VALUES, D, channel, out), 64);
  for (int row = 0; row < 64; row++) assert_memory_equal(before + row * D + 32, out + row * D + 32, sizeof(float) * 32);
  for (int side = 0; side < 2; side++) {
    assert_int_equal(apply(q4, (oscar_side)side, D, plain, before), 64);
    assert_int_equal(apply(q4, (oscar_side)side, D, channel, out), 64);
    for (int row = 0; row < 64; row++) assert_memory_equal(before + row * D + 32, out + row * D + 32, sizeof(float) * 32);
    assert_true(squared_error(D, channel, out, -1, -1) > 10 * squared_error(D, plain, before, -1, -1));
  }
  baseline_free(c, kivi);
  baseline_free(c, q4);
  oscar_context_free(c);
}

static void every_group_of_a_page_is_quantized_as_the_quantizer_does_it(void **state) {
  (void)state;
  enum { D = 96 };
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct baseline *kivi = make(c, "int2-kivi", D), *q4 = make(c, "q4_0", D);
  static float x[64 * D], out[64 * D];
  uint64_t seed = 6;
  page_of(&seed, D, 3, x);
  for (int group = 0; group < 2 * D; group++) { /* 192 either way */
    float in[32], want[32];
    struct kivi_group g;
    const int channel = group % D, token = group / D * 32;
    for (int i = 0; i < 32; i++) in[i] = x[(token + i) * D + channel];
    assert_true(kivi_quantize(in, 1, &g));
    kivi_dequantize(&g, want, 1);
    assert_int_equal(apply(kivi, OSCAR_KEYS, D, x, out), 64);
    for (int i = 0; i < 32; i++) assert_true(out[(token + i) * D + channel] == want[i]);
    const float *row = x + group / 3 * D + group % 3 * 32;
    assert_true(kivi_quantize(row, 1, &g));
    kivi_dequantize(&g, want, 1);
    assert_int_equal(apply(kivi, OSCAR_VALUES, D, x, out), 64);
    assert_memory_equal(out + (row - x), want, sizeof want);
    struct block_q4_0 block;
    assert_true(q4_0_quantize(row, &block));
    weight_dequantize(WEIGHT_Q4_0, 32, &block, want);
    assert_int_equal(apply(q4, (oscar_side)(group % 2), D, x, out), 64);
    assert_memory_equal(out + (row - x), want, sizeof want);
  }
  baseline_free(c, kivi);
  baseline_free(c, q4);
  oscar_context_free(c);
}

/* With integers in and entries of 1/8 every rotated number is exact, so that codes can be compared through the decoded rows. */
static void q4_0_hadamard_is_q4_0_between_two_rotations(void **state) {
  (void)state;
  enum { D = 64 };
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  struct baseline *b = make(c, "q4_0-hadamard", D);
  static float x[64 * D], out[64 * D];
  uint64_t seed = 7;
  for (int i = 0; i < 64 * D; i++) x[i] = (float)((int)(test_random(&seed) % 17) - 8);
  assert_int_equal(apply(b, OSCAR_KEYS, D, x, out), 64);
  for (int row = 0; row < 64; row++) {
    float rotated[D], decoded[D];
    for (int j = 0; j < D; j++) { /* Sylvester: the sign is the parity of the common bits */
      double sum = 0;
      for (int i = 0; i < D; i++) sum += (double)x[row * D + i] * (__builtin_parity((unsigned)(i & j)) ? -.125 : .125);
      rotated[j] = (float)sum;
    }
    for (int j = 0; j < D; j += 32) {
      struct block_q4_0 block;
      assert_true(q4_0_quantize(rotated + j, &block));
      weight_dequantize(WEIGHT_Q4_0, 32, &block, decoded + j);
    }
    for (int i = 0; i < D; i++) {
      double sum = 0;
      for (int j = 0; j < D; j++) sum += (double)decoded[j] * (__builtin_parity((unsigned)(i & j)) ? -.125 : .125);
      assert_true(fabs(sum - (double)out[row * D + i]) < 1e-4);
    }
  }
  baseline_free(c, b);

  /* 96 = 8 * 12: a matrix that is not Sylvester's, and its transpose */
  b = make(c, "q4_0-hadamard", 96);
  static float wide[64 * 96], wide_out[64 * 96];
  page_of(&seed, 96, 1, wide);
  assert_int_equal(apply(b, OSCAR_VALUES, 96, wide, wide_out), 64);
  double energy = 0;
  for (int i = 0; i < 64 * 96; i++) energy += (double)wide[i] * (double)wide[i];
  assert_true(squared_error(96, wide, wide_out, -1, -1) < .02 * energy);
  baseline_free(c, b);
  oscar_context_free(c);
}

static void the_first_row_that_cannot_be_represented_is_named(void **state) {
  (void)state;
  enum { D = 32 };
  oscar_context *c = test_context(OSCAR_ISA_PORTABLE, 1);
  static const struct {
    const char *kv;
    int keys, values;
  } cases[] = {{"int2-kivi", 32, 40}, {"q4_0", 40, 40}, {"q4_0-hadamard", 40, 40}};
  static float x[64 * D], out[64 * D];
  for (size_t i = 0; i < ARRAY_LENGTH(cases); i++) {
    struct baseline *b = make(c, cases[i].kv, D);
    static const float bad[] = {1e8f, -1e8f, NAN};
    for (size_t k = 0; k < ARRAY_LENGTH(bad); k++) {
      memset(x, 0, sizeof x);
      x[40 * D + 3] = x[50 * D] = bad[k];
      assert_int_equal(apply(b, OSCAR_KEYS, D, x, out), cases[i].keys);
      assert_int_equal(apply(b, OSCAR_VALUES, D, x, out), cases[i].values);
    }
    baseline_free(c, b);
  }
  oscar_context_free(c);
}

/* ---- by name, and in a cache ---- */

static void baselines_are_the_types_for_evaluation_only(void **state) {
  (void)state;
  struct failing_alloc f;
  oscar_context *c = failing_context(&f);
  int count, baselines = 0;
  const struct kv_type *types = kv_type_list(&count);
  for (int i = 0; i < count; i++) {
    struct baseline *b;
    sweep_allocations(c, &f, baseline_create(c, types[i].name, 64, &b));
    assert_int_equal(b != NULL, types[i].kind == KV_EVALUATION);
    assert_int_equal(kv_type_check(c, types[i].name), b ? OSCAR_INVALID_ARGUMENT : OSCAR_OK);
    if (!b) {
      assert_null(baseline_filter(b));
      continue;
    }
    baselines++;
    assert_non_null(strstr(oscar_last_error(c), "saves no memory"));
    assert_true(baseline_filter(b)->bits_per_element == (strcmp(types[i].name, "int2-kivi") == 0 ? 3 : 4.5));
    baseline_free(c, b);
    assert_int_equal(baseline_create(c, types[i].name, 80, &b), OSCAR_UNSUPPORTED);
    assert_null(b);
    assert_non_null(strstr(oscar_last_error(c), "80"));
  }
  assert_int_equal(baselines, 3);
  struct baseline *b;
  assert_false(oscar_hadamard_exists(352));
  assert_int_equal(baseline_create(c, "q4_0-hadamard", 352, &b), OSCAR_UNSUPPORTED);
  assert_ok(c, baseline_create(c, "q4_0", 352, &b));
  baseline_free(c, b);
  failing_context_free(c, &f);
}

/* 700 tokens, one page of sinks and two recent ones: pages 0 and 8 to 10 are exact, 252 tokens; 448 are coded. */
static void a_cache_holds_what_the_baseline_gives_back_and_counts_what_it_says(void **state) {
  (void)state;
  enum { TOKENS = 700, HEADS = 2, D = 32, LAYERS = 2 };
  static const char *const kv[] = {"int2-kivi", "q4_0", "q4_0-hadamard"};
  static const int chunks[] = {1, 7, 64, 500};
  static float rows[2][TOKENS * HEADS * D];
  uint64_t seed = 8;
  for (int i = 0; i < 2 * TOKENS * HEADS * D; i++) rows[i / (TOKENS * HEADS * D)][i % (TOKENS * HEADS * D)] = test_normal(&seed);
  oscar_context *c = test_context(OSCAR_ISA_AUTO, 2);
  for (size_t i = 0; i < ARRAY_LENGTH(kv) * ARRAY_LENGTH(chunks); i++) {
    struct baseline *b = make(c, kv[i / ARRAY_LENGTH(chunks)], D);
    const int chunk = chunks[i % ARRAY_LENGTH(chunks)];
    oscar_cache_options o = {.layers = LAYERS, .kv_heads = HEADS, .head_dim = D, .sink_pages = 1, .recent_pages = 2};
    o.filter = baseline_filter(b);
    o.budget_bytes = oscar_cache_bytes_for(&o, TOKENS, 1, chunk);
    oscar_cache *cache;
    oscar_sequence *s;
    assert_ok(c, oscar_cache_create(c, &o, &cache));
    assert_ok(c, oscar_sequence_create(cache, &s));
    for (int fed = 0; fed < TOKENS; fed += chunk) {
      assert_ok(c, oscar_sequence_begin(s, TOKENS - fed < chunk ? TOKENS - fed : chunk));
      for (int layer = 0; layer < LAYERS; layer++) {
        const float *k = rows[layer], *v = rows[1 - layer]; /* the second layer has them the other way round */
        assert_ok(c, oscar_sequence_write(s, layer, k + fed * HEADS * D, v + fed * HEADS * D));
      }
      assert_ok(c, oscar_sequence_commit(s));
    }
    for (int page = 0; page < 11; page++)
      for (int place = 0; place < LAYERS * HEADS * 2; place++) {
        const int layer = place % 2, head = place / 2 % 2, side = place / 4;
        static float x[64 * D], want[64 * D];
        static uint16_t got[64 * D];
        bool coded;
        assert_ok(c, oscar_sequence_read_page(s, page, layer, head, &coded, side ? NULL : got, side ? got : NULL));
        assert_int_equal(coded, page >= 1 && page < 8);
        if (!coded) continue;
        const float *from = rows[side ? 1 - layer : layer];
        for (int k = 0; k < 64 * D; k++) x[k] = bf16_to_f32(f32_to_bf16(from[((page * 64 + k / D) * HEADS + head) * D + k % D]));
        assert_int_equal(apply(b, (oscar_side)side, D, x, want), 64);
        for (int k = 0; k < 64 * D; k++) assert_int_equal(got[k], f32_to_bf16(want[k]));
      }
    double bits;
    size_t bytes;
    baseline_measure(b, s, &bits, &bytes);
    const double declared = i < ARRAY_LENGTH(chunks) ? 3 : 4.5, all = 252 * 16 + 448 * declared;
    assert_true(fabs(bits - all / TOKENS) < 1e-12);
    assert_int_equal(bytes, (size_t)(all / 8 * 2 * LAYERS * HEADS * D));
    oscar_cache_free(cache);
    baseline_free(c, b);
  }
  oscar_context_free(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_ramp_in_kivi_is_as_worked_out_by_hand),
      cmocka_unit_test(kivi_is_its_definition),
      cmocka_unit_test(constant_groups_are_kept_by_kivi),
      cmocka_unit_test(numbers_beyond_the_metadata_of_kivi_are_refused),
      cmocka_unit_test(a_ramp_in_q4_0_is_as_worked_out_by_hand),
      cmocka_unit_test(q4_0_is_its_definition),
      cmocka_unit_test(small_blocks_are_zeros_and_numbers_beyond_fp16_are_refused_by_q4_0),
      cmocka_unit_test(kivi_groups_keys_along_tokens_and_values_along_channels),
      cmocka_unit_test(every_group_of_a_page_is_quantized_as_the_quantizer_does_it),
      cmocka_unit_test(q4_0_hadamard_is_q4_0_between_two_rotations),
      cmocka_unit_test(the_first_row_that_cannot_be_represented_is_named),
      cmocka_unit_test(baselines_are_the_types_for_evaluation_only),
      cmocka_unit_test(a_cache_holds_what_the_baseline_gives_back_and_counts_what_it_says),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
