/* 8-bit floats against the definition of the OCP 8-bit Floating Point Specification: S.EEEE.MMM, bias 7, no infinities, NaN where
 * all of E and M are ones. */
#include "support.h"

#include "backend/e4m3.h"

static double defined(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = exponent ? ldexp(1 + mantissa / 8.0, exponent - 7) : ldexp(mantissa / 8.0, -6);
  return code & 0x80 ? -magnitude : magnitude;
}

static bool is_nan(int code) { return (code & 0x7F) == 0x7F; }

/* The nearest number, of two the one whose last bit is 0: by trying all. */
static int nearest(double x) {
  int best = 0;
  for (int code = 1; code < 0x7F; code++) {
    const double now = fabs(fabs(x) - defined(best)), then = fabs(fabs(x) - defined(code));
    if (then < now || (then == now && code % 2 == 0)) best = code;
  }
  return best | (signbit(x) ? 0x80 : 0);
}

static void codes_are_the_numbers_of_the_specification(void **state) {
  (void)state;
  assert_true(defined(0x7E) == 448 && defined(0x08) == 0x1p-6 && defined(0x01) == 0x1p-9); /* its table */
  for (int code = 0; code < 256; code++) {
    const float x = e4m3_to_f32((uint8_t)code);
    if (is_nan(code)) {
      assert_true(isnan(x));
      assert_int_equal(f32_to_e4m3(x) & 0x7F, 0x7F);
      continue;
    }
    assert_true((double)x == defined(code) && (signbit(x) != 0) == (code > 127));
    assert_int_equal(f32_to_e4m3(x), code);
  }
}

static void ties_go_to_the_even_code(void **state) {
  (void)state;
  for (int code = 0; code < 0x7E; code++)
    for (int sign = 0; sign < 2; sign++) {
      const float middle = (float)(defined(code) + defined(code + 1)) / 2, s = sign ? -1 : 1;
      const int bit = sign ? 0x80 : 0;
      assert_int_equal(f32_to_e4m3(s * middle), (code % 2 ? code + 1 : code) | bit);
      assert_int_equal(f32_to_e4m3(s * nextafterf(middle, 0)), code | bit);
      assert_int_equal(f32_to_e4m3(s * nextafterf(middle, INFINITY)), (code + 1) | bit);
    }
}

static void numbers_go_to_the_nearest_code(void **state) {
  (void)state;
  uint64_t random = 1;
  for (int i = 0; i < 200000; i++) {
    const float x = test_normal(&random) * (float)ldexp(1, (int)(test_random(&random) % 20) - 12);
    const int expected = nearest((double)x);
    if (f32_to_e4m3(x) != expected) fail_msg("%.9g becomes %02x instead of %02x", (double)x, f32_to_e4m3(x), expected);
  }
  static const float tiny[] = {0, 0x1p-149f, 0x1p-126f, 0x1p-11f, 0x1p-10f};
  for (size_t i = 0; i < ARRAY_LENGTH(tiny); i++) {
    assert_int_equal(f32_to_e4m3(tiny[i]), 0);
    assert_int_equal(f32_to_e4m3(-tiny[i]), 0x80);
  }
}

static void large_numbers_saturate(void **state) {
  (void)state;
  static const float large[] = {448, 449, 464, 480, 512, 1e30f, INFINITY};
  for (size_t i = 0; i < ARRAY_LENGTH(large); i++) {
    assert_int_equal(f32_to_e4m3(large[i]), 0x7E);
    assert_int_equal(f32_to_e4m3(-large[i]), 0xFE);
  }
  assert_int_equal(f32_to_e4m3(NAN) & 0x7F, 0x7F);
}

static void pairs_widen_to_the_same_numbers(void **state) {
  (void)state;
  for (int code = 0; code < 256; code++)
    for (int other = 0; other < 256; other += 51) {
      if (is_nan(code) || is_nan(other)) continue;
      const int pair[2] = {code, other};
      /* what lies between the codes does not count */
      const uint32_t codes = 0x00550055u | (uint32_t)code << 8 | (uint32_t)other << 24;
      const uint32_t half = e4m3_pair_to_fp16(codes), brain = e4m3_pair_to_bf16(codes);
      for (int i = 0; i < 2; i++) {
        const float expected = (float)defined(pair[i]);
        assert_true(f16_to_f32((uint16_t)(half >> 16 * i)) * E4M3_FP16_FACTOR == expected);
        assert_true(bf16_to_f32((uint16_t)(brain >> 16 * i)) * E4M3_BF16_FACTOR == expected);
      }
    }
}

static float scale_of(float largest) { return e4m3_scale(e4m3_float_bits(largest)); }

static void the_scale_takes_the_largest_to_448(void **state) {
  (void)state;
  uint64_t random = 1;
  for (int i = 0; i < 10000; i++) {
    const float largest = (float)(0.5 + test_uniform(&random)) * (float)ldexp(1, (int)(test_random(&random) % 230) - 110);
    assert_int_equal(f32_to_e4m3(largest / scale_of(largest)), 0x7E);
    assert_true(fabs((double)(scale_of(largest) * 448 / largest) - 1) < 0x1p-22);
  }
  assert_true(scale_of(0) > 0 && f32_to_e4m3(0 / scale_of(0)) == 0); /* a row of zeros is one */
  assert_true(scale_of(0x1p-149f) > 0);                              /* no division by 0 */
  assert_true(isfinite(scale_of(3.4e38f)) && f32_to_e4m3(3.4e38f / scale_of(3.4e38f)) == 0x7E);
  assert_true(isnan(scale_of(INFINITY)) && isnan(scale_of(NAN)));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(codes_are_the_numbers_of_the_specification),
      cmocka_unit_test(ties_go_to_the_even_code),
      cmocka_unit_test(numbers_go_to_the_nearest_code),
      cmocka_unit_test(large_numbers_saturate),
      cmocka_unit_test(pairs_widen_to_the_same_numbers),
      cmocka_unit_test(the_scale_takes_the_largest_to_448),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
