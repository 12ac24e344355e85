/* rope_tables.c - angles of pages, series and curves in the order of operands (rope_tables.h, decode.h). */
#include "attention/cuda/decode/rope_tables.h"

#include <string.h>

/* A spec by which every pair of the rope turns: what waves.h makes of it serves all codecs, whichever pairs they keep. */
static void all_pairs(const oscar_rope *rope, uint16_t *pairs, oscar_codec_spec *spec) {
  const int count = rope->spec.rotary_dim / 2;
  for (int i = 0; i < count; i++) pairs[i] = (uint16_t)i;
  *spec = (oscar_codec_spec){.rope = (oscar_rope *)rope, .rotating_pairs = count, .rotating_pair = pairs};
}

static oscar_status make_basis(oscar_context *context, const oscar_rope *rope, struct wave_basis *basis, void **memory) {
  uint16_t pairs[OSCAR_MAX_HEAD_DIM / 2];
  oscar_codec_spec spec;
  all_pairs(rope, pairs, &spec);
  *memory = mem_alloc(context, 1, wave_basis_bytes(&spec));
  if (!*memory) return OSCAR_NO_MEMORY;
  *basis = wave_basis_make(&spec, *memory);
  return OSCAR_OK;
}

struct rope_table_sizes rope_table_sizes_of(oscar_context *context, const oscar_rope *rope, oscar_status *status) {
  struct rope_table_sizes sizes = {0};
  struct wave_basis basis;
  void *memory;
  if ((*status = make_basis(context, rope, &basis, &memory)) != OSCAR_OK) return sizes;
  sizes.pairs = (int)round_up((size_t)basis.pairs, 8);
  sizes.fast = basis.fast;
  sizes.steps = (WAVE_TERMS / 2 + basis.fast + 15) / 16;
  sizes.angles = (size_t)sizes.pairs / 8 * 4 * 16;
  sizes.turns = (size_t)sizes.pairs * 2 * sizeof(float);
  sizes.series = (size_t)sizes.pairs * WAVE_TERMS * sizeof(float);
  sizes.curve_words = (size_t)sizes.steps * CURVE_STEP_BYTES;
  mem_free(context, memory);
  return sizes;
}

static uint32_t half_pair(float low, float high, float *low_rest, float *high_rest) {
  const uint16_t a = f32_to_f16(low), b = f32_to_f16(high);
  *low_rest = low - f16_to_f32(a);
  *high_rest = high - f16_to_f32(b);
  return (uint32_t)a | (uint32_t)b << 16;
}

/* The even or odd curve that is an input; NULL beyond the last. */
static const float *find_curve(const struct wave_basis *basis, int input, bool odd) {
  const int fast = input - WAVE_TERMS / 2;
  if (fast >= basis->fast) return NULL;
  const int curve = fast < 0 ? input + (odd ? WAVE_TERMS / 2 : 0) : WAVE_TERMS + fast + (odd ? basis->fast : 0);
  return basis->curve + curve * PAGE_TOKENS;
}

/* A step of curves as operand A, a tile of 16 tokens from the centre of a page on at a time: words `reg` of lane 4 g + q are rows
 * g
 * + 8 (reg % 2), inputs 2 q + 8 (reg / 2) and the next. curves [CURVE_STEP]: the 64 tokens of each; NULL: 0. */
static void fill_curves(const float *const *curves, uint32_t *to) {
  for (int tile = 0; tile < 2; tile++, to += 2 * 32 * 4)
    for (int lane = 0; lane < 32; lane++)
      for (int reg = 0; reg < 4; reg++) {
        const int token = PAGE_TOKENS / 2 + tile * 16 + lane / 4 + reg % 2 * 8;
        const float *const *of = curves + lane % 4 * 2 + reg / 2 * 8;
        const float low = of[0] ? of[0][token] : 0, high = of[1] ? of[1][token] : 0;
        float low_rest, high_rest, none;
        uint32_t *at = to + lane * 4 + reg;
        at[0] = half_pair(low, high, &low_rest, &high_rest);
        at[32 * 4] = half_pair(low_rest, high_rest, &none, &none);
      }
}

oscar_status rope_tables_fill(oscar_context *context, const oscar_rope *rope, const struct rope_table_sizes *sizes, float *series,
                              uint32_t *curve_words) {
  struct wave_basis basis;
  void *memory;
  oscar_status status = make_basis(context, rope, &basis, &memory);
  if (status != OSCAR_OK) return status;
  memset(series, 0, sizes->series);
  for (int pair = basis.fast; pair < basis.pairs; pair++)
    for (int j = 0; j < WAVE_TERMS; j++)
      series[pair * WAVE_TERMS + j % 2 * (WAVE_TERMS / 2) + j / 2] = basis.terms[(pair - basis.fast) * WAVE_TERMS + j];
  for (int step = 0; step < sizes->steps; step++)
    for (int odd = 0; odd < 2; odd++, curve_words += CURVE_STEP_BYTES / 8) {
      const float *curves[CURVE_STEP];
      for (int i = 0; i < CURVE_STEP; i++) curves[i] = find_curve(&basis, step * CURVE_STEP + i, odd != 0);
      fill_curves(curves, curve_words);
    }
  mem_free(context, memory);
  return OSCAR_OK;
}

void rope_angles_fill(const oscar_rope *rope, const struct rope_table_sizes *sizes, int64_t first, int64_t count,
                      uint32_t *angles, float *turns) {
  uint16_t pairs[OSCAR_MAX_HEAD_DIM / 2];
  float cosines[OSCAR_MAX_HEAD_DIM / 2 + 8] = {0}, sines[OSCAR_MAX_HEAD_DIM / 2 + 8] = {0};
  oscar_codec_spec spec;
  all_pairs(rope, pairs, &spec);
  for (int64_t page = 0; page < count; page++) {
    rope_page_angles(rope, spec.rotating_pairs, pairs, first + page, cosines, sines);
    for (int pair = 0; pair < sizes->pairs; pair++) {
      float c, s, none;
      /* words of (8 i + q): value, rest of its first pair, then of pair 8 i + 4 + q */
      uint32_t *at =
          angles + ((size_t)page * (size_t)sizes->pairs / 8 * 4 + (size_t)(pair / 8 * 4 + pair % 4)) * 4 + pair % 8 / 4 * 2;
      at[0] = half_pair(cosines[pair], sines[pair], &c, &s);
      at[1] = half_pair(c, s, &none, &none);
    }
    for (int pair = 0; pair < sizes->pairs; pair++, turns += 2) {
      turns[0] = cosines[pair];
      turns[1] = sines[pair];
    }
  }
}

void own_curves_fill(const oscar_codec_spec *keys, uint16_t *pairs, uint32_t *curves) {
  const int count = own_curves_pairs(keys);
  for (int i = 0; i < count; i++) pairs[i] = i < keys->rotating_pairs ? keys->rotating_pair[i] : 0;
  for (int first = 0; first < count; first += CURVE_STEP)
    for (int sine = 0; sine < 2; sine++, curves += CURVE_STEP_BYTES / 8) {
      const float *of[CURVE_STEP];
      for (int i = 0; i < CURVE_STEP; i++)
        of[i] = first + i < keys->rotating_pairs ? rope_cosines(keys->rope, pairs[first + i]) + sine * PAGE_TOKENS : NULL;
      fill_curves(of, curves);
    }
}
