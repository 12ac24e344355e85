/*
 * attention/cuda/decode/rope_tables.h - the turning of means as operands of matrix products (struct decode_rope). Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_ROPE_TABLES_H
#define OSCAR_ATTENTION_CUDA_DECODE_ROPE_TABLES_H

#include "attention/cuda/decode.h"
#include "attention/waves.h"

/* Sizes, in bytes, of the arrays of a rope; those of angles are per page. */
struct rope_table_sizes {
  int pairs, fast, steps;
  size_t angles, turns, series, curve_words;
};
struct rope_table_sizes rope_table_sizes_of(oscar_context *context, const oscar_rope *rope, oscar_status *status);

/* On the host, for upload. Errors: NO_MEMORY. */
oscar_status rope_tables_fill(oscar_context *context, const oscar_rope *rope, const struct rope_table_sizes *sizes, float *series,
                              uint32_t *curve_words);
/* Of pages first .. first + count - 1. */
void rope_angles_fill(const oscar_rope *rope, const struct rope_table_sizes *sizes, int64_t first, int64_t count,
                      uint32_t *angles, float *turns);

/* Of a layer whose pairs have curves of their own: of the keys of one KV head, its part of decode_layer.pairs and of
 * decode_layer.curves. */
static inline bool has_own_curves(const oscar_codec_spec *keys) { return keys->rotating_pairs <= OWN_CURVES_PAIRS; }
static inline int own_curves_pairs(const oscar_codec_spec *keys) {
  return (int)round_up((size_t)keys->rotating_pairs, CURVE_STEP);
}
static inline size_t own_curves_bytes(const oscar_codec_spec *keys) {
  return (size_t)own_curves_pairs(keys) / CURVE_STEP * CURVE_STEP_BYTES;
}
void own_curves_fill(const oscar_codec_spec *keys, uint16_t *pairs, uint32_t *curves);

#endif
