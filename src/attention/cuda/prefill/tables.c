/* tables.c - maps and turning pairs in the order of operands (prefill.h). */
#include "attention/cuda/prefill.h"

#include "quant/codec.h"

#include <math.h>
#include <string.h>

/* Of `rows` rows, numbers and what fp16 lost of them. */
static size_t map_bytes(int rows, int columns) {
  return 2 * (size_t)((rows + PREFILL_SIDE - 1) / PREFILL_SIDE) * (size_t)PREFILL_OPERAND_BYTES(columns);
}

struct prefill_table_sizes prefill_table_sizes_of(int kv_heads, const oscar_codec *const *keys,
                                                  const oscar_codec *const *values) {
  struct prefill_table_sizes s = {0};
  const size_t heads = (size_t)kv_heads, d = (size_t)keys[0]->spec.head_dim;
  for (int h = 0; h < kv_heads; h++)
    if (keys[h]->spec.rotating_pairs > s.turning_pairs) s.turning_pairs = keys[h]->spec.rotating_pairs;
  s.turning_pairs = (int)round_up((size_t)s.turning_pairs, PREFILL_STEP_PAIRS(d));
  s.key_columns = keys[0]->crumbs + 2 * s.turning_pairs;
  s.keys = heads * map_bytes(s.key_columns, (int)d);
  s.values = heads * map_bytes(values[0]->crumbs, (int)d);
  s.scales = round_up(heads * 2 * sizeof(float), 16);
  s.means = round_up(heads * d * sizeof(float), 16);
  s.runs = round_up(heads * (size_t)s.turning_pairs * sizeof(struct wave_run), 16);
  return s;
}

/* Where tables are that lie one after the other. */
struct table_places {
  uint8_t *keys, *values, *scales, *key_means, *value_means, *runs;
};
static struct table_places table_places_of(const struct prefill_table_sizes *s, void *memory) {
  struct table_places at = {.keys = memory};
  at.values = at.keys + s->keys;
  at.scales = at.values + s->values;
  at.key_means = at.scales + s->scales;
  at.value_means = at.key_means + s->means;
  at.runs = at.value_means + s->means;
  return at;
}

/* A number of a map, and what fp16 lost of it. */
static void put(uint8_t *map, int columns, int row, int column, float x) {
  uint8_t *operand = map + 2 * (size_t)(row / PREFILL_SIDE) * (size_t)PREFILL_OPERAND_BYTES(columns) +
                     prefill_operand_place(row % PREFILL_SIDE, column);
  const uint16_t value = f32_to_f16(x), rest = f32_to_f16(x - f16_to_f32(value));
  memcpy(operand, &value, sizeof value);
  memcpy(operand + PREFILL_OPERAND_BYTES(columns), &rest, sizeof rest);
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

static void copy_mean(const oscar_codec *codec, size_t head, uint8_t *means) {
  const size_t d = (size_t)codec->spec.head_dim;
  memcpy(means + head * d * sizeof(float), codec->map + (size_t)(codec->crumbs + codec->spec.groups) * d, d * sizeof(float));
}

static float fill_keys(const oscar_codec *codec, const struct prefill_table_sizes *s, const int16_t *index, uint8_t *map) {
  const int d = codec->spec.head_dim, crumbs = codec->crumbs, pairs = codec->spec.rotating_pairs;
  const int mean = crumbs + codec->spec.groups;
  const float scale = scale_of(codec, crumbs, mean), inverse = 1 / scale;
  for (int row = 0; row < crumbs; row++)
    for (int i = 0; i < d; i++)
      put(map, d, prefill_key_column(crumbs / 16, row), i, inverse * codec->map[(size_t)row * (size_t)d + (size_t)i]);
  for (int k = 0; k < 2 * s->turning_pairs; k++)
    for (int i = 0; i < d && index[k / 2] >= 0; i++)
      put(map, d, crumbs + k, i, inverse * codec->map[(size_t)(mean + 1 + index[k / 2] + k % 2 * pairs) * (size_t)d + (size_t)i]);
  return scale;
}

static float fill_values(const oscar_codec *codec, uint8_t *map) {
  const int d = codec->spec.head_dim, crumbs = codec->crumbs;
  const float scale = scale_of(codec, crumbs, codec->map_rows), inverse = 1 / scale;
  for (int row = 0; row < crumbs; row++)
    for (int i = 0; i < d; i++) put(map, d, row, i, inverse * codec->map[(size_t)row * (size_t)d + (size_t)i]);
  return scale;
}

void prefill_tables_fill(int kv_heads, const oscar_codec *const *keys, const oscar_codec *const *values, int wave_pairs,
                         void *memory) {
  const struct prefill_table_sizes s = prefill_table_sizes_of(kv_heads, keys, values);
  const size_t heads = (size_t)kv_heads;
  const struct table_places to = table_places_of(&s, memory);
  memset(memory, 0, prefill_table_bytes(&s));
  for (size_t h = 0; h < heads; h++) {
    const oscar_codec *of = keys[h];
    float *scale = (float *)(void *)(to.scales) + 2 * h;
    uint16_t pair[OSCAR_MAX_HEAD_DIM / 2 + 16];
    int16_t index[OSCAR_MAX_HEAD_DIM / 2 + 16];
    list_places(&of->spec, s.turning_pairs, pair, index);
    fill_runs(pair, s.turning_pairs, wave_pairs, (struct wave_run *)(void *)to.runs + h * (size_t)s.turning_pairs);
    copy_mean(of, h, to.key_means);
    copy_mean(values[h], h, to.value_means);
    scale[0] = fill_keys(of, &s, index, to.keys + h * (s.keys / heads));
    scale[1] = fill_values(values[h], to.values + h * (s.values / heads));
  }
}

struct prefill_tables prefill_tables_at(const struct prefill_table_sizes *s, void *memory) {
  const struct table_places at = table_places_of(s, memory);
  return (struct prefill_tables){.key_columns = s->key_columns,
                                 .turning_pairs = s->turning_pairs,
                                 .keys = at.keys,
                                 .values = at.values,
                                 .scales = (const float *)(const void *)at.scales,
                                 .key_means = (const float *)(const void *)at.key_means,
                                 .value_means = (const float *)(const void *)at.value_means,
                                 .runs = (const struct wave_run *)(const void *)at.runs};
}
