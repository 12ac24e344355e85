/* prefill_tables.c - maps and turning pairs in the order of operands (prefill.h). */
#include "attention/cuda/prefill.h"

#include "quant/codec.h"

#include <math.h>
#include <string.h>

struct prefill_table_sizes prefill_table_sizes_of(int kv_heads, const oscar_codec *const *keys,
                                                  const oscar_codec *const *values) {
  struct prefill_table_sizes s = {0};
  const size_t heads = (size_t)kv_heads, d = (size_t)keys[0]->spec.head_dim;
  for (int h = 0; h < kv_heads; h++) {
    const oscar_codec_spec *spec = &keys[h]->spec;
    const int last = spec->rotating_pairs > 0 ? spec->rotating_pair[spec->rotating_pairs - 1] : -1;
    if (last >= s.turning_pairs) s.turning_pairs = last + 1;
  }
  s.turning_pairs = (int)round_up((size_t)s.turning_pairs, PREFILL_STEP_PAIRS(d));
  s.key_columns = keys[0]->crumbs + 2 * s.turning_pairs;
  s.keys = heads * (size_t)(s.key_columns / 8 + 1) * (d / 16) * 512;
  s.values = heads * (d / 8) * (size_t)(values[0]->crumbs / 16) * 512;
  s.scales = round_up(heads * 2 * sizeof(float), 16);
  return s;
}

/* Row k and column n of an operand B that has `inputs` rows. */
static void put(uint8_t *operand, int inputs, int k, int n, float x) {
  const int lane = n % 8 * 4 + k % 8 / 2, word = k % 16 / 8;
  uint16_t *at =
      (uint16_t *)(void *)(operand + (((size_t)(n / 8) * (size_t)(inputs / 16) + (size_t)(k / 16)) * 32 + (size_t)lane) * 16);
  const uint16_t value = f32_to_f16(x);
  at[2 * word + k % 2] = value;
  at[4 + 2 * word + k % 2] = f32_to_f16(x - f16_to_f32(value));
}

/* The power of two that brings the largest of the first `rows` rows of the map, and one row more, to 1 .. 2. */
static float scale_of(const oscar_codec *codec, int rows, int mean) {
  const size_t d = (size_t)codec->spec.head_dim;
  float largest = 0;
  int exponent;
  for (size_t row = 0; row < (size_t)codec->map_rows; row++)
    for (size_t i = 0; i < d && ((int)row < rows || (int)row >= mean); i++)
      largest = fmaxf(largest, fabsf(codec->map[row * d + i]));
  (void)frexpf(largest, &exponent);
  return largest > 0 ? ldexpf(1, exponent - 1) : 1;
}

static float fill_keys(const oscar_codec *codec, const struct prefill_table_sizes *s, uint8_t *operand) {
  const int d = codec->spec.head_dim, crumbs = codec->crumbs, pairs = codec->spec.rotating_pairs;
  const int mean = crumbs + codec->spec.groups;
  const float scale = scale_of(codec, crumbs, mean), inverse = 1 / scale;
  for (int row = 0; row < crumbs; row++)
    for (int i = 0; i < d; i++)
      put(operand, d, i, prefill_key_column(crumbs / 16, row), inverse * codec->map[(size_t)row * (size_t)d + (size_t)i]);
  for (int k = 0; k < 2 * pairs; k++)
    for (int i = 0; i < d; i++)
      put(operand, d, i, crumbs + 2 * codec->spec.rotating_pair[k / 2] + k % 2,
          inverse * codec->map[(size_t)(mean + 1 + k / 2 + k % 2 * pairs) * (size_t)d + (size_t)i]);
  for (int i = 0; i < d; i++) put(operand, d, i, s->key_columns, inverse * codec->map[(size_t)mean * (size_t)d + (size_t)i]);
  return scale;
}

static float fill_values(const oscar_codec *codec, uint8_t *operand) {
  const int d = codec->spec.head_dim, crumbs = codec->crumbs;
  const float scale = scale_of(codec, crumbs, codec->map_rows), inverse = 1 / scale;
  for (int row = 0; row < crumbs; row++)
    for (int i = 0; i < d; i++) put(operand, crumbs, row, i, inverse * codec->map[(size_t)row * (size_t)d + (size_t)i]);
  return scale;
}

void prefill_tables_fill(int kv_heads, const oscar_codec *const *keys, const oscar_codec *const *values, void *memory) {
  const struct prefill_table_sizes s = prefill_table_sizes_of(kv_heads, keys, values);
  const size_t heads = (size_t)kv_heads;
  uint8_t *at = memory, *of_values = at + s.keys, *scales = of_values + s.values;
  memset(at, 0, s.keys + s.values + s.scales);
  for (size_t h = 0; h < heads; h++) {
    float *scale = (float *)(void *)scales + 2 * h;
    scale[0] = fill_keys(keys[h], &s, at + h * (s.keys / heads));
    scale[1] = fill_values(values[h], of_values + h * (s.values / heads));
  }
}
