/*
 * attention/cuda/decode/wide_scores.cuh - scores of a coded page for 16 rows of queries. Private.
 *
 * Of so many rows it is products and sums that count, not what is idle, so a row has one column, and queries are fp16 numbers: 11
 * bits. A word of a page has crumbs of a class in bytes 0 and 2, then 1 and 3, in the places of subnormal fp16 numbers:
 *
 *   scores   A = 16 tokens x 16 crumbs, by ANDs, subnormal fp16;  B = queries, fp16, of eight rows, then of eight more
 *
 * Log gains are multiplied into operand A, so that one sum does for all classes. Lanes end up with scores of the same tokens and
 * rows as those of fewer rows do (byte_scores.cuh).
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_WIDE_SCORES_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_WIDE_SCORES_CUH

#include "attention/cuda/decode/page_gains.cuh"

namespace decode {

/* In ONE_GAIN, classes of a row came in units of their own: the largest becomes that of the row, and powers of two take fp16
 * numbers there without loss. Crumbs of class p are 4^p times as large. */
struct wide_units {
  float largest, factor[GAIN_CLASSES];
  __device__ __forceinline__ explicit wide_units(const struct row_constants &row) {
    largest = fmaxf(fmaxf(row.unit[0], row.unit[1]), fmaxf(row.unit[2], row.unit[3]));
#pragma unroll
    for (int p = 0; p < GAIN_CLASSES; p++) factor[p] = row.unit[p] / largest;
  }
};

template <int FORM, int BLOCKS> struct wide_queries {
  static_assert(FORM != ANY_FORM && BLOCKS % 2 == 0, "there are kernels of 16 rows for usual forms only");
  static constexpr bool LOG_GAINS = FORM == FOUR_LOG_GAINS;
  const uint2 *operands; /* [rows from 8 on][operand_of_block], of this lane */
  /* with one gain: the operands in the row's unit; where sums begin, as in a product; units of rows 4 n + q */
  uint2 words[LOG_GAINS ? 1 : 2][LOG_GAINS ? 1 : BLOCKS];
  float begin[2][4], unit[4];

  __device__ __forceinline__ void load(const uint32_t *of_rows, const struct row_constants *rows, int lane) {
    const int g = lane / 4, q = lane % 4;
    operands = (const uint2 *)of_rows + lane;
    if constexpr (!LOG_GAINS) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const wide_units column(rows[8 * c + row_of_column<4>(g)]);
#pragma unroll
        for (int p = 0; p < GAIN_CLASSES; p++) {
          const float factor = ldexpf(column.factor[p], -2 * p);
          const uint32_t factors = pack_half2(factor, factor);
#pragma unroll
          for (int i = 0; i < class_begin(BLOCKS, p + 1) - class_begin(BLOCKS, p); i++) {
            const int operand = operand_of_block(BLOCKS, p, i);
            const uint2 of = operands[(c * BLOCKS + operand) * 32];
            words[c][operand] = make_uint2(multiply_half2(of.x, factors), multiply_half2(of.y, factors));
          }
        }
#pragma unroll
        for (int u = 0; u < 2; u++) {
          const struct row_constants &row = rows[8 * c + 4 * u + q];
          const wide_units units(row);
          unit[2 * c + u] = units.largest * 0x1p24f;
          begin[c][u] = 0;
#pragma unroll
          for (int p = 0; p < GAIN_CLASSES; p++) begin[c][u] += row.offset[p] * units.factor[p];
          begin[c][2 + u] = begin[c][u];
        }
      }
    }
  }
  __device__ __forceinline__ uint2 get(int columns, int operand) const {
    if constexpr (LOG_GAINS)
      return operands[(columns * BLOCKS + operand) * 32];
    else
      return words[columns][operand];
  }
};

/* Two crumbs times their gain: a half_gain. */
__device__ __forceinline__ uint32_t scale_crumbs(uint32_t crumbs, uint32_t gain) {
  const __half2 of = as_half2(gain);
  return half2_of(__hfma2(as_half2(crumbs), __low2half2(of), __high2half2(of)));
}

/* The words of a page's keys: of a block of a class and a tile, those of tokens g and g + 8. */
template <int BLOCKS> struct key_words {
  static constexpr int FULL = BLOCKS / GAIN_CLASSES, OVER = BLOCKS % GAIN_CLASSES; /* OVER: one more block of classes 1 and 3 */
  uint32_t full[FULL][4][2], over[4];
  __device__ __forceinline__ void load(const uint32_t *words, int lane) {
#pragma unroll
    for (int pair = 0; pair < FULL / 2; pair++)
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const uint4 w = *(const uint4 *)(words + pair * 512 + t * 128 + lane * 4);
        full[2 * pair][t][0] = w.x, full[2 * pair][t][1] = w.y, full[2 * pair + 1][t][0] = w.z, full[2 * pair + 1][t][1] = w.w;
      }
    if (FULL % 2)
#pragma unroll
      for (int t = 0; t < 4; t += 2) {
        const uint4 w = *(const uint4 *)(words + FULL / 2 * 512 + t / 2 * 128 + lane * 4);
        full[FULL - 1][t][0] = w.x, full[FULL - 1][t][1] = w.y, full[FULL - 1][t + 1][0] = w.z, full[FULL - 1][t + 1][1] = w.w;
      }
    if (!OVER) return;
    const uint4 w = *(const uint4 *)(words + FULL * 256 + lane * 4);
    over[0] = w.x, over[1] = w.y, over[2] = w.z, over[3] = w.w;
  }
  /* In the last block of a class that has one more, token g + 8 is two bits below its place. */
  __device__ __forceinline__ uint2 get(int block, int tile) const {
    if (block < FULL) return make_uint2(full[block][tile][0], full[block][tile][1]);
    return make_uint2(over[tile], over[tile] << 2);
  }
};

/* Sums of a page's crumbs and the numbers of queries: of a tile of 16 tokens, as in a product. page_gains: of log gains, words
 * [64][class]. */
template <int FORM, int BLOCKS>
__device__ __forceinline__ void sum_wide(const uint32_t *words, const wide_queries<FORM, BLOCKS> &queries, const void *page_gains,
                                         int lane, float (&sums)[4][2][4]) {
  constexpr bool LOG_GAINS = FORM == FOUR_LOG_GAINS;
  key_words<BLOCKS> keys;
  keys.load(words, lane);
  uint4 gains[4][2]; /* of tokens g and g + 8 */
#pragma unroll
  for (int t = 0; t < 4; t++) {
#pragma unroll
    for (int i = 0; i < 2 && LOG_GAINS; i++) gains[t][i] = ((const uint4 *)page_gains)[t * 16 + i * 8 + lane / 4];
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[t][c][j] = LOG_GAINS ? 0 : queries.begin[c][j];
  }
#pragma unroll
  for (int p = 0; p < GAIN_CLASSES; p++) {
    const uint32_t mask = 0x00030003u << 2 * p;
#pragma unroll
    for (int i = 0; i < class_begin(BLOCKS, p + 1) - class_begin(BLOCKS, p); i++) {
      const int operand = operand_of_block(BLOCKS, p, i);
      const uint2 b[2] = {queries.get(0, operand), queries.get(1, operand)};
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const uint2 w = keys.get(i, t);
        uint32_t x[4] = {w.x & mask, w.y & mask, w.x >> 8 & mask, w.y >> 8 & mask};
#pragma unroll
        for (int j = 0; j < 4 && LOG_GAINS; j++) {
          const uint4 &of_token = gains[t][j % 2];
          x[j] = scale_crumbs(x[j], p == 0 ? of_token.x : p == 1 ? of_token.y : p == 2 ? of_token.z : of_token.w);
        }
#pragma unroll
        for (int c = 0; c < 2; c++) mma_fp16(sums[t][c], x[0], x[1], x[2], x[3], b[c].x, b[c].y);
      }
    }
  }
}
/* Adds the scores that these sums are: of token g to s[tile][.][0], of token g + 8 to s[tile][.][1]. page_gains: of ONE_GAIN,
 * [64] fp16. */
template <int FORM, int BLOCKS>
__device__ __forceinline__ void add_wide(const float (&sums)[4][2][4], const wide_queries<FORM, BLOCKS> &queries,
                                         const void *page_gains, int lane, float (&s)[4][4][2]) {
#pragma unroll
  for (int t = 0; t < 4; t++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float gain = FORM == ONE_GAIN ? __half2float(((const __half *)page_gains)[t * 16 + 8 * i + lane / 4]) : 0;
#pragma unroll
      for (int n = 0; n < 4; n++)
        s[t][n][i] = fmaf(sums[t][n / 2][2 * i + n % 2], FORM == ONE_GAIN ? gain * queries.unit[n] : 1 / LOG_UNIT, s[t][n][i]);
    }
}

} // namespace decode

#endif
