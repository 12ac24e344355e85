/* rope_tables.c - angles of pages, series and curves in the order of operands (rope_tables.h, decode.h). */
#include "attention/cuda/rope_tables.h"

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
  sizes.fast_angles = (size_t)sizes.fast * 2 * sizeof(float);
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

/* Word `reg` of lane 4 g + q of operand A of step k: rows g + 8 (reg % 2), which are tokens from the centre on, inputs 2q + 8
 * (reg / 2) and the next. */
static void fill_curve_word(const struct wave_basis *basis, int step, bool odd, int tile, int lane, int reg, uint32_t *value,
                            uint32_t *rest) {
  const int token = PAGE_TOKENS / 2 + tile * 16 + lane / 4 + reg % 2 * 8, input = step * 16 + lane % 4 * 2 + reg / 2 * 8;
  float x[2], r[2], none[2];
  for (int i = 0; i < 2; i++) {
    const float *curve = find_curve(basis, input + i, odd);
    x[i] = curve ? curve[token] : 0;
  }
  *value = half_pair(x[0], x[1], &r[0], &r[1]);
  *rest = half_pair(r[0], r[1], &none[0], &none[1]);
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
    for (int odd = 0; odd < 2; odd++)
      for (int tile = 0; tile < 2; tile++, curve_words += 2 * 32 * 4)
        for (int lane = 0; lane < 32; lane++)
          for (int reg = 0; reg < 4; reg++) {
            uint32_t *at = curve_words + lane * 4 + reg;
            fill_curve_word(&basis, step, odd != 0, tile, lane, reg, at, at + 32 * 4);
          }
  mem_free(context, memory);
  return OSCAR_OK;
}

void rope_angles_fill(const oscar_rope *rope, const struct rope_table_sizes *sizes, int64_t first, int64_t count,
                      uint32_t *angles, float *fast_angles) {
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
    for (int pair = 0; pair < sizes->fast; pair++) {
      float *at = fast_angles + ((size_t)page * (size_t)sizes->fast + (size_t)pair) * 2;
      at[0] = cosines[pair];
      at[1] = sines[pair];
    }
  }
}
