/*
 * attention/cuda/decode/data.cuh - what decode_prepare leaves for decode_run. Private.
 *
 * A mapped query q' (quant/codec.h) meets the crumbs of a class in products of bytes. So it becomes whole numbers q = 128 high +
 * low, |q| <= 16256, of a power of two, `unit`, for each row and class: 15 bits, and everything after it is exact until sums
 * become floats. An operand has a column of high and one of low bytes for each row, so columns 2 r and 2 r + 1 of the scores
 * belong to row r of a tile of 4 rows.
 *
 * A tile of 16 rows has fp16 numbers instead, and a column for each row, eight at a time: column c is row c / 2 + c % 2 * 4 of
 * them. Where pages have log gains they are what they are; else their unit is such that the largest of a row and class is in
 * [2^13, 2^14).
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_DATA_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_DATA_CUH

#include "attention/cuda/decode.h"
#include "attention/cuda/decode/line.h"
#include "attention/cuda/instructions.cuh"
#include "cuda/launch.cuh"
#include "quant/device_form.h"

#include <cuda_runtime.h>

/* An integer below 2^22 that is added to the bits of the first float is added to the float, and 128 times as much with the
 * second: where sums of low and of high bytes begin. */
#define LOW_BITS   0x4B400000
#define LOW_FLOAT  12582912.0f
#define HIGH_BITS  0x4EC00000
#define HIGH_FLOAT 1610612736.0f

#define LARGEST_WHOLE 16256.0f /* 127 * 128 */

/* Log gains of keys come times this, where queries are bytes. */
constexpr float KEY_GAIN_UNIT = 0x1p18f;

struct row_constants {
  /* Sums of a token begin at `begin`, [high, low] of it and of the eighth after it, so that their bits are floats: an operand as
   * it is, since registers would have to be brought together for it again and again. High and low ones both times `unit` plus
   * `offset` are scores, counted from the middle of the codes; exactly, as units are powers of two, or within 2^-24 of the most
   * that a class may have. Crumbs of a class were multiplied by 4^class.
   * Of 16 rows and one gain, -3/2 of the sum of a class's numbers, in 2^-24, is in `offset`; with log gains nothing is. */
  alignas(16) int begin[GAIN_CLASSES][4];
  float unit[GAIN_CLASSES], offset[GAIN_CLASSES];
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

/* Tiles have 4, 8 or 16 rows: row tiles of 4, as many as the largest tile of a launch needs. */
__host__ __device__ inline int row_tiles_of(int rows) { return rows > 8 ? 4 : rows > 4 ? 2 : 1; }

/* A block of prepared memory, of a tile of `row_tiles` times 4 rows: words [row tile][blocks][32 lanes], or of 16 rows
 * [rows from 8 on][blocks][32 lanes][crumbs 0 and 2, 1 and 3 of four], row_constants [rows],
 * amplitudes (a, b) [rows][pairs that have curves], and the way from (cos, sin) of the pairs to weights of polynomials, as
 * operand B: [pairs / 8][8 row_tiles columns of 8][32 lanes] of words of values and of what fp16 lost of them, without eights
 * that have curves. */
struct prepared_layout {
  int constants, amplitudes, mixing, mixing_bytes, bytes;
};
__host__ __device__ inline struct prepared_layout prepared_layout_of(int blocks, int pairs, int fast, int row_tiles) {
  struct prepared_layout p;
  p.constants = row_tiles * blocks * 32 * 4;
  p.amplitudes = p.constants + 4 * row_tiles * (int)sizeof(struct row_constants);
  p.mixing = (p.amplitudes + 4 * row_tiles * fast * 8 + 15) / 16 * 16;
  p.mixing_bytes = (pairs / 8 - fast / 8) * row_tiles * 8 * 32 * 16;
  p.bytes = p.mixing + p.mixing_bytes;
  return p;
}

/* fp16 2^(k/4) of four 4-bit k + 8, in the order of the nibbles: bytes are looked up by nibbles, as permutation does it. With k +
 * 8 = 4 e + f, the number is 2^(e - 2) 2^(f/4): the low byte depends on f, the high byte on f and e. `less` is subtracted from
 * the exponent. */
__device__ __forceinline__ uint2 log_gains_fp16(uint32_t word, int less) {
  /* 2^(f/4) - 1 in 2^-10: 0, 194, 424, 698 */
  constexpr uint32_t LOW = 0xBAA8C200u, HIGH = 0x02010000u;
  const uint32_t eights = permute_bytes(0x80u, 0, word & 0x8888u) & 0x08080808u; /* 8 where k >= 0: an exponent larger by 2 */
  const uint32_t select = word & 0x7777u, down = (uint32_t)less * 0x04040404u;
  const uint32_t low = __byte_perm(LOW, LOW, select);
  const uint32_t high = __byte_perm(HIGH + 0x34343434u - down, HIGH + 0x38383838u - down, select) + eights;
  return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
}

/* Log gains 2^(k/4) that crumbs are multiplied with while they lie where they are: times LOG_UNIT, and then the next of 1120,
 * 1332, 1584, 1884 times a power of two. Those are within 1.1e-4 of them, and three halves of them are fp16 numbers too; no
 * others of 11 bits come closer. Crumbs at bits p and p + 1 of half words are, as they are, subnormal numbers 2^(p - 24) c;
 * `factor` is gain LOG_UNIT 2^(24 - p), `offset` -3/2 gain LOG_UNIT, and their fused product and sum is exact. */
constexpr float LOG_UNIT = 1.09386f / 1024;
struct half_gain {
  float factor, offset;
};
__device__ __forceinline__ half_gain half_gain_of(int k, int place) {
  const float gain = ldexpf(k % 2 == 0 ? (k & 2 ? 1584.0f : 1120.0f) : k & 2 ? 1884.0f : 1332.0f, (k >> 2) - 20);
  return {ldexpf(gain, 24 - place), -1.5f * gain};
}

/* Four log gains on both sides of a page, or one gain: what fits have, and kernels of their own. */
inline bool has_usual_gains(const struct decode_layer &layer) {
  const struct decode_side &keys = layer.keys, &values = layer.values;
  if (keys.form != values.form || keys.groups != values.groups) return false;
  return keys.form == OSCAR_ROW_LOG_GAINS ? keys.groups == GAIN_CLASSES : keys.form == OSCAR_ROW_GAIN && keys.groups == 1;
}

/* What a block has of an item, where it does not have all: (m, l) of DECODE_ROWS rows, then the sums of their outputs,
 * [DECODE_ROWS][head_dim]. Part number: that of the item plus that of the block; along the line one of them grows, so no two are
 * the same. */
__host__ __device__ inline size_t part_floats(int head_dim) { return (size_t)DECODE_ROWS * (size_t)(2 + head_dim); }

/* Probabilities of coded pages are kept 2^12 times as large as they are relative to the maximum, so that small ones stay normal
 * fp16 numbers even after division by 16. */
#define PROBABILITY_SHIFT 12.0f

/* Where a row of a KV head is in q and out: row of the job that has its first position in row `token` of those. */
__device__ inline size_t row_offset(int token, int row, int kv_heads, int group, int kv_head, int head_dim) {
  return ((size_t)(token + row / group) * (size_t)(kv_heads * group) + (size_t)(kv_head * group + row % group)) *
         (size_t)head_dim;
}
/* The same of a row of a tile. */
__device__ inline size_t row_offset(const struct decode_tile &tile, int row, int kv_heads, int group, int kv_head, int head_dim) {
  return row_offset(tile.token, tile.first_row + row, kv_heads, group, kv_head, head_dim);
}

/* Kernels hold scores in base 2, so that a weight is 2^score: their scale is the scale of scores times this. */
constexpr float LOG2_E = 1.44269504088896341f;

/* A kernel that overlaps with those around it (cuda/launch.cuh). */
inline oscar_status launch_early(struct oscar_cuda *cuda, const void *kernel, dim3 grid, int threads, int shared_bytes,
                                 void **arguments, const char *what) {
  return cuda_result(cuda, launch_overlapping(cuda, kernel, grid, threads, (size_t)shared_bytes, arguments), what);
}

#endif
