/*
 * attention/cuda/decode/value_map.h - the map that brings sums of coded values back into the channels of a head, as operand A of
 * a matrix product. Private; for C and CUDA.
 *
 * Its inputs are sums of a codec's crumbs, then 16 more: minus sums of gains of up to four groups, the sum of probabilities, and
 * zeros. A number is two of BF16, itself and what that lost of it, which leaves an error of 2^-18.
 *
 *   words [tile of 16 channels][step of 16 inputs][number, what it lost][32 lanes] of 4; lane 4 g + q has of inputs 4 q and
 *   4 q + 1 channel g, and channel g + 8, then of inputs 4 q + 2 and 4 q + 3 the same
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_VALUE_MAP_H
#define OSCAR_ATTENTION_CUDA_DECODE_VALUE_MAP_H

#include "quant/device_form.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VALUE_MAP_GROUPS     4 /* of gains, at most */
#define VALUE_MAP_LANE_WORDS 4
#define VALUE_MAP_STEP_WORDS (2 * 32 * VALUE_MAP_LANE_WORDS) /* of a tile and a step */

ON_BOTH static inline int value_map_steps(int crumbs) { return crumbs / 16 + 1; }
ON_BOTH static inline int value_map_words(int head_dim, int crumbs) {
  return head_dim / 16 * value_map_steps(crumbs) * VALUE_MAP_STEP_WORDS;
}

/* Of one KV head. map: [crumbs + groups + 1][head_dim], as a codec has it (quant/codec.h); crumbs and head_dim are multiples of
 * 16. */
void value_map_fill(const float *map, int head_dim, int crumbs, int groups, uint32_t *words);

#ifdef __cplusplus
}
#endif
#endif
