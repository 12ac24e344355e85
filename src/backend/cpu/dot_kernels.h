/*
 * dot_kernels.h - what the vector kernels of dot.h have in common: going through rows, chunks and tokens.
 *
 * The including file defines
 *   LANES, vec           a vector of so many floats, with vec_zero, vec_store, vec_add, vec_fma(a, b, c) = a b + c, and vec_sum,
 *                        the sum of its lanes
 *   struct format        with block_elements and block_bytes beside what the file's own functions need, and a constant of it for
 *                        each quantized type: q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k
 *   accumulate           adds a chunk's products with n tokens to two sums a token; `groups` of its groups of 32 elements
 *                        are there. n is a constant wherever this is used
 *   expand_chunk         a chunk's groups as floats
 *   READS_ON             true: accumulate and expand_chunk take no notice of what follows the last group, so that the last chunk
 *                        of a row can be read in its place if as many bytes follow. Otherwise they are given zeros there
 *   load_f32, load_f16, load_bf16
 *                        LANES floats from memory of that type
 *   FLOAT_TOKENS         2 or 4: tokens that share the weights of a float type
 */
#ifndef OSCAR_CPU_DOT_KERNELS_H
#define OSCAR_CPU_DOT_KERNELS_H

#include "backend/blocks.h"
#include "backend/cpu/dot.h"

#define PART_BYTES (ALL_GROUPS * sizeof(struct block_q8_0)) /* of a chunk of any small block */

/* ---- quantized weights ---- */

/* A chunk of fewer blocks than a whole one has, where a whole one can be read. */
INLINE const uint8_t *part_of_chunk(struct format f, const uint8_t *p, int blocks, const uint8_t *end, uint8_t copy[PART_BYTES]) {
  const size_t bytes = ALL_GROUPS * f.block_bytes;
  if (READS_ON && (size_t)(end - p) >= bytes) return p;
  memset(copy, 0, bytes);
  memcpy(copy, p, (size_t)blocks * f.block_bytes);
  return copy;
}

/* One row and n tokens; n is a constant where this is used. `end` is that of the tensor. */
INLINE void dot_row(struct format f, const uint8_t *row, const uint8_t *end, const struct dot_input *in,
                    const struct act_chunk *x, const int n, float *y, int64_t y_stride) {
  vec sums[4][2];
  for (int t = 0; t < n; t++) sums[t][0] = sums[t][1] = vec_zero();
  const int64_t full = in->cols / CHUNK;
  const size_t chunk_bytes = (size_t)(CHUNK / f.block_elements) * f.block_bytes;
  for (int64_t k = 0; k < full; k++, row += chunk_bytes) {
    prefetch_ahead(row, chunk_bytes);
    accumulate(f, row, ALL_GROUPS, x + k, in->chunks_per_token, n, sums);
  }
  const int blocks = (int)(in->cols % CHUNK) / f.block_elements;
  if (f.block_elements < CHUNK && blocks > 0) {
    uint8_t copy[PART_BYTES];
    accumulate(f, part_of_chunk(f, row, blocks, end, copy), blocks, x + full, in->chunks_per_token, n, sums);
  }
  for (int t = 0; t < n; t++) y[t * y_stride] = vec_sum(vec_add(sums[t][0], sums[t][1]));
}

INLINE void dot_rows_of(struct format f, const struct weight *w, int64_t first, int64_t last, const struct dot_input *in,
                        float *y) {
  const size_t row_bytes = (size_t)(w->cols / f.block_elements) * f.block_bytes;
  const uint8_t *data = w->data, *end = data + (size_t)w->rows * row_bytes;
  for (int64_t r = first; r < last; r++) {
    const uint8_t *row = data + (size_t)r * row_bytes;
    const struct act_chunk *x = in->chunks;
    float *to = y + r;
    int left = in->n;
    for (; left >= 4; left -= 4, x += 4 * in->chunks_per_token, to += 4 * w->rows) dot_row(f, row, end, in, x, 4, to, w->rows);
    if (left >= 2) {
      dot_row(f, row, end, in, x, 2, to, w->rows);
      left -= 2, x += 2 * in->chunks_per_token, to += 2 * w->rows;
    }
    if (left) dot_row(f, row, end, in, x, 1, to, w->rows);
  }
}

INLINE void expand_rows(struct format f, const struct weight *w, int64_t first, int64_t last, float *out) {
  const size_t row_bytes = (size_t)(w->cols / f.block_elements) * f.block_bytes;
  const size_t chunk_bytes = (size_t)(CHUNK / f.block_elements) * f.block_bytes;
  const uint8_t *data = w->data, *end = data + (size_t)w->rows * row_bytes;
  for (int64_t r = first; r < last; r++) {
    const uint8_t *row = data + (size_t)r * row_bytes;
    for (int64_t k = 0; k < w->cols / CHUNK; k++, row += chunk_bytes, out += CHUNK) expand_chunk(f, row, ALL_GROUPS, out);
    const int blocks = (int)(w->cols % CHUNK) / f.block_elements;
    if (f.block_elements == CHUNK || blocks == 0) continue;
    uint8_t copy[PART_BYTES];
    expand_chunk(f, part_of_chunk(f, row, blocks, end, copy), blocks, out);
    out += blocks * SMALL_BLOCK;
  }
}

#define QUANTIZED_KERNELS(name)                                                                                                  \
  static void rows_##name(const struct weight *w, int64_t first, int64_t last, const struct dot_input *in, float *y) {           \
    dot_rows_of(name, w, first, last, in, y);                                                                                    \
  }                                                                                                                              \
  static void f32_##name(const struct weight *w, int64_t first, int64_t last, float *out) {                                      \
    expand_rows(name, w, first, last, out);                                                                                      \
  }

/* ---- float weights ---- */

typedef vec load_floats(const void *p);

/* The first `count` of LANES numbers, zeros behind them. */
INLINE vec load_some(load_floats *load, size_t element_bytes, const uint8_t *p, int64_t count) {
  if (count >= LANES) return load(p);
  uint8_t copy[LANES * sizeof(float)] = {0};
  if (count > 0) memcpy(copy, p, (size_t)count * element_bytes);
  return load(copy);
}

/* One row and n tokens; n is a constant where this is used. */
INLINE void float_row(load_floats *load, size_t element_bytes, const uint8_t *row, int64_t cols, const float *x, const int n,
                      float *y, int64_t y_stride) {
  vec sums[FLOAT_TOKENS][4];
  for (int t = 0; t < n; t++)
    for (int i = 0; i < 4; i++) sums[t][i] = vec_zero();
  int64_t k = 0;
  for (; k + 4 * LANES <= cols; k += 4 * LANES) {
    const uint8_t *p = row + (size_t)k * element_bytes;
    prefetch_ahead(p, 4 * LANES * element_bytes);
    for (int i = 0; i < 4; i++) {
      vec w = load(p + (size_t)i * LANES * element_bytes);
      for (int t = 0; t < n; t++) sums[t][i] = vec_fma(w, load_f32(x + t * cols + k + i * LANES), sums[t][i]);
    }
  }
  for (; k + LANES <= cols; k += LANES) {
    vec w = load(row + (size_t)k * element_bytes);
    for (int t = 0; t < n; t++) sums[t][0] = vec_fma(w, load_f32(x + t * cols + k), sums[t][0]);
  }
  if (k < cols) {
    vec w = load_some(load, element_bytes, row + (size_t)k * element_bytes, cols - k);
    for (int t = 0; t < n; t++) {
      const uint8_t *token = (const uint8_t *)(x + t * cols + k);
      sums[t][0] = vec_fma(w, load_some(load_f32, sizeof(float), token, cols - k), sums[t][0]);
    }
  }
  for (int t = 0; t < n; t++)
    y[t * y_stride] = vec_sum(vec_add(vec_add(sums[t][0], sums[t][2]), vec_add(sums[t][1], sums[t][3])));
}

INLINE void float_rows(load_floats *load, size_t element_bytes, const struct weight *w, int64_t first, int64_t last,
                       const struct dot_input *in, float *y) {
  for (int64_t r = first; r < last; r++) {
    const uint8_t *row = (const uint8_t *)w->data + (size_t)(r * w->cols) * element_bytes;
    const float *x = in->x;
    float *to = y + r;
    int left = in->n;
    for (; left >= FLOAT_TOKENS; left -= FLOAT_TOKENS, x += FLOAT_TOKENS * w->cols, to += FLOAT_TOKENS * w->rows)
      float_row(load, element_bytes, row, w->cols, x, FLOAT_TOKENS, to, w->rows);
    if (FLOAT_TOKENS > 2 && left >= 2) {
      float_row(load, element_bytes, row, w->cols, x, 2, to, w->rows);
      left -= 2, x += 2 * w->cols, to += 2 * w->rows;
    }
    if (left) float_row(load, element_bytes, row, w->cols, x, 1, to, w->rows);
  }
}

/* Rows follow each other without gaps, so that a range of them is one run of numbers. */
INLINE void expand_floats(load_floats *load, size_t element_bytes, const struct weight *w, int64_t first, int64_t last,
                          float *out) {
  const uint8_t *data = (const uint8_t *)w->data + (size_t)(first * w->cols) * element_bytes;
  int64_t count = (last - first) * w->cols, k = 0;
  for (; k + LANES <= count; k += LANES) vec_store(out + k, load(data + (size_t)k * element_bytes));
  weight_dequantize(w->type, count - k, data + (size_t)k * element_bytes, out + k);
}

#define FLOAT_KERNELS(name, element_bytes)                                                                                       \
  static void rows_##name(const struct weight *w, int64_t first, int64_t last, const struct dot_input *in, float *y) {           \
    float_rows(load_##name, element_bytes, w, first, last, in, y);                                                               \
  }                                                                                                                              \
  static void f32_##name(const struct weight *w, int64_t first, int64_t last, float *out) {                                      \
    expand_floats(load_##name, element_bytes, w, first, last, out);                                                              \
  }

/* ---- all types ---- */

#define EACH_QUANTIZED(of) of(q4_0) of(q4_1) of(q5_0) of(q5_1) of(q8_0) of(q4_k) of(q5_k) of(q6_k)
#define EACH_FLOAT(of)     of(f32, 4) of(f16, 2) of(bf16, 2)

EACH_QUANTIZED(QUANTIZED_KERNELS)
EACH_FLOAT(FLOAT_KERNELS)

/* A table of functions kind_TYPE. */
#define ALL_TYPES(kind)                                                                                                          \
  {                                                                                                                              \
    [WEIGHT_F32] = kind##_f32, [WEIGHT_F16] = kind##_f16, [WEIGHT_BF16] = kind##_bf16, [WEIGHT_Q4_0] = kind##_q4_0,              \
    [WEIGHT_Q4_1] = kind##_q4_1, [WEIGHT_Q5_0] = kind##_q5_0, [WEIGHT_Q5_1] = kind##_q5_1, [WEIGHT_Q8_0] = kind##_q8_0,          \
    [WEIGHT_Q4_K] = kind##_q4_k, [WEIGHT_Q5_K] = kind##_q5_k, [WEIGHT_Q6_K] = kind##_q6_k                                        \
  }

#endif
