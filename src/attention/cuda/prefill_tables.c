/* prefill_tables.c - maps and turning pairs in the order of operands (prefill.h). */
#include "attention/cuda/prefill.h"

#include "quant/codec.h"

#include <math.h>
#include <string.h>

struct prefill_table_sizes prefill_table_sizes_of(int kv_heads, const oscar_codec *const *keys,
                                                  const oscar_codec *const *values) {
  struct prefill_table_sizes s = {0};
  const size_t heads = (size_t)kv_heads, d = (size_t)keys[0]->spec.head_dim;
  for (int h = 0; h < kv_heads; h++)
    if (keys[h]->spec.rotating_pairs > s.turning_pairs) s.turning_pairs = keys[h]->spec.rotating_pairs;
  s.turning_pairs = (int)round_up((size_t)s.turning_pairs, PREFILL_STEP_PAIRS(d));
  s.key_columns = keys[0]->crumbs + 2 * s.turning_pairs;
  s.keys = heads * (size_t)(s.key_columns / 8 + 1) * (d / 16) * 512;
  s.values = heads * (d / 8) * (size_t)(values[0]->crumbs / 16) * 512;
  s.scales = round_up(heads * 2 * sizeof(float), 16);
  s.runs = round_up(heads * (size_t)s.turning_pairs * sizeof(struct wave_run), 16);
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

/* The pairs of a head's columns, ascending: those that turn, and of the others the first. Of which pair of the mean each is the
 * place: index[place], -1 for the others. */
static void list_places(const oscar_codec_spec *spec, int places, uint16_t *pair, int16_t *index) {
  int kept = 0, others = places - spec->rotating_pairs, place = 0;
  for (int p = 0; place < places; p++) {
    const bool turns = kept < spec->rotating_pairs && spec->rotating_pair[kept] == p;
    if (!turns && others == 0) continue;
    pair[place] = (uint16_t)p;
    index[place++] = (int16_t)(turns ? kept : -1);
    if (turns)
      kept++;
    else
      others--;
  }
}

static void fill_runs(const uint16_t *pair, int places, int wave_pairs, struct wave_run *run) {
  for (int begin = 0, end; begin < places; begin = end) {
    for (end = begin + 1; end < places && pair[end] == pair[begin] + end - begin;) end++;
    const int shift = (begin - pair[begin]) & (PREFILL_SHIFTS - 1);
    *run++ = (struct wave_run){(uint8_t)begin, (uint8_t)(end - begin), (uint16_t)(shift * wave_pairs + pair[begin])};
  }
}

static float fill_keys(const oscar_codec *codec, const struct prefill_table_sizes *s, const int16_t *index, uint8_t *operand) {
  const int d = codec->spec.head_dim, crumbs = codec->crumbs, pairs = codec->spec.rotating_pairs;
  const int mean = crumbs + codec->spec.groups;
  const float scale = scale_of(codec, crumbs, mean), inverse = 1 / scale;
  for (int row = 0; row < crumbs; row++)
    for (int i = 0; i < d; i++)
      put(operand, d, i, prefill_key_column(crumbs / 16, row), inverse * codec->map[(size_t)row * (size_t)d + (size_t)i]);
  for (int k = 0; k < 2 * s->turning_pairs; k++)
    for (int i = 0; i < d && index[k / 2] >= 0; i++)
      put(operand, d, i, crumbs + k,
          inverse * codec->map[(size_t)(mean + 1 + index[k / 2] + k % 2 * pairs) * (size_t)d + (size_t)i]);
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

void prefill_tables_fill(int kv_heads, const oscar_codec *const *keys, const oscar_codec *const *values, int wave_pairs,
                         void *memory) {
  const struct prefill_table_sizes s = prefill_table_sizes_of(kv_heads, keys, values);
  const size_t heads = (size_t)kv_heads;
  uint8_t *at = memory, *of_values = at + s.keys, *scales = of_values + s.values, *runs = scales + s.scales;
  memset(at, 0, s.keys + s.values + s.scales + s.runs);
  for (size_t h = 0; h < heads; h++) {
    float *scale = (float *)(void *)scales + 2 * h;
    uint16_t pair[OSCAR_MAX_HEAD_DIM / 2 + 16];
    int16_t index[OSCAR_MAX_HEAD_DIM / 2 + 16];
    list_places(&keys[h]->spec, s.turning_pairs, pair, index);
    fill_runs(pair, s.turning_pairs, wave_pairs, (struct wave_run *)(void *)runs + h * (size_t)s.turning_pairs);
    scale[0] = fill_keys(keys[h], &s, index, at + h * (s.keys / heads));
    scale[1] = fill_values(values[h], of_values + h * (s.values / heads));
  }
}
