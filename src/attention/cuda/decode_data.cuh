/*
 * attention/cuda/decode_data.cuh - what decode_prepare leaves for decode_run. Private.
 *
 * A mapped query q' (quant/codec.h) meets the crumbs of a class in products of bytes. So it becomes whole numbers q = 128 high +
 * low, |q| <= 16256, of a power of two, `unit`, for each row and class: 15 bits, and everything after it is exact until sums
 * become floats. An operand has a column of high and one of low bytes for each row, so columns 2 r and 2 r + 1 of the scores
 * belong to row r of a tile of 4 rows.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_DATA_H
#define OSCAR_ATTENTION_CUDA_DECODE_DATA_H

#include "attention/cuda/decode.h"
#include "quant/device_form.h"

/* An integer added to the bits of this float is added to the float, as long as it stays below 2^22. */
#define WHOLE_BITS  0x4B400000
#define WHOLE_FLOAT 12582912.0f

#define LARGEST_WHOLE 16256.0f /* 127 * 128 */

struct row_constants {
  /* Sums of bytes start at WHOLE_BITS, so that their bits are floats; times `unit` plus these they are scores, counted from the
   * middle of the codes. All exact: units are powers of two. Crumbs of a class were multiplied by 4^class. */
  float unit[GAIN_CLASSES], high_offset[GAIN_CLASSES], low_offset[GAIN_CLASSES];
  float mean; /* added to every score */
  float zero; /* SCALE_ZERO: scores lose s z times this */
  float unused[2];
};

/* The place of a class's i-th block among the operands: the order in which words of keys need them. */
__host__ __device__ inline int operand_of_block(int blocks, int class_, int i) {
  const int full = blocks / GAIN_CLASSES, over = blocks % GAIN_CLASSES;
  if (i < full / 2 * 2) return i / 2 * 2 * GAIN_CLASSES + class_ * 2 + i % 2;
  if (i < full) return full / 2 * 2 * GAIN_CLASSES + class_;
  return full * GAIN_CLASSES + (over == 1 ? 0 : class_ == 1 ? 0 : class_ == 3 ? 1 : 2);
}

/* A block of prepared memory: words [2][blocks][32 lanes], row_constants [DECODE_ROWS], amplitudes (a, b) [DECODE_ROWS][pairs] */
struct prepared_layout {
  int constants, amplitudes, bytes;
};
__host__ __device__ inline struct prepared_layout prepared_layout_of(int blocks, int pairs) {
  struct prepared_layout p;
  p.constants = 2 * blocks * 32 * 4;
  p.amplitudes = p.constants + DECODE_ROWS * (int)sizeof(struct row_constants);
  p.bytes = p.amplitudes + DECODE_ROWS * pairs * 8;
  return p;
}

/* The rows of a tile: where they are in q and out. */
__device__ inline size_t row_offset(const struct decode_tile &tile, int row, int kv_heads, int group, int kv_head, int head_dim) {
  const int r = tile.first_row + row;
  return ((size_t)(tile.token + r / group) * (size_t)(kv_heads * group) + (size_t)(kv_head * group + r % group)) *
         (size_t)head_dim;
}

#endif
