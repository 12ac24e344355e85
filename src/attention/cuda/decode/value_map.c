/* value_map.c - see value_map.h. */
#include "attention/cuda/decode/value_map.h"

#include "base/base.h"

/* The row of a codec's map that an input is multiplied with, or -1. */
static int row_of_input(int input, int crumbs, int groups) {
  const int more = input - crumbs;
  if (more < groups) return input;
  return more == VALUE_MAP_GROUPS ? crumbs + groups : -1;
}

void value_map_fill(const float *map, int head_dim, int crumbs, int groups, uint32_t *words) {
  const int steps = value_map_steps(crumbs);
  for (int tile = 0; tile < head_dim / 16; tile++)
    for (int step = 0; step < steps; step++, words += VALUE_MAP_STEP_WORDS)
      for (int i = 0; i < 32 * VALUE_MAP_LANE_WORDS; i++) {
        const int lane = i / VALUE_MAP_LANE_WORDS, word = i % VALUE_MAP_LANE_WORDS;
        const int channel = tile * 16 + lane / 4 + word % 2 * 8, input = step * 16 + lane % 4 * 4 + word / 2 * 2;
        uint32_t number = 0, lost = 0;
        for (int k = 0; k < 2; k++) {
          const int row = row_of_input(input + k, crumbs, groups);
          const float x = row < 0 ? 0 : map[(size_t)row * (size_t)head_dim + (size_t)channel];
          const uint16_t rounded = f32_to_bf16(x);
          number |= (uint32_t)rounded << 16 * k;
          lost |= (uint32_t)f32_to_bf16(x - bf16_to_f32(rounded)) << 16 * k;
        }
        words[i] = number;
        words[32 * VALUE_MAP_LANE_WORDS + i] = lost;
      }
}
