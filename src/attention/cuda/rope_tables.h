/*
 * attention/cuda/rope_tables.h - the turning of means as operands of matrix products (struct decode_rope). Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_ROPE_TABLES_H
#define OSCAR_ATTENTION_CUDA_ROPE_TABLES_H

#include "attention/cuda/decode.h"
#include "attention/waves.h"

/* Sizes, in bytes, of the arrays of a rope; those of angles are per page. */
struct rope_table_sizes {
  int pairs, fast, steps;
  size_t angles, fast_angles, series, curve_words;
};
struct rope_table_sizes rope_table_sizes_of(oscar_context *context, const oscar_rope *rope, oscar_status *status);

/* On the host, for upload. Errors: NO_MEMORY. */
oscar_status rope_tables_fill(oscar_context *context, const oscar_rope *rope, const struct rope_table_sizes *sizes, float *series,
                              uint32_t *curve_words);
/* Of pages first .. first + count - 1. */
void rope_angles_fill(const oscar_rope *rope, const struct rope_table_sizes *sizes, int64_t first, int64_t count,
                      uint32_t *angles, float *fast_angles);

#endif
