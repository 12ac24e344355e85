/*
 * attention/cuda/decode/value_sums.cuh - probabilities times values of a coded page. Private.
 *
 *   sums   A = 16 crumbs x 16 tokens, straight from the page's words by ANDs, subnormal fp16;  B = probabilities times gains,
 * fp16
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_VALUE_SUMS_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_VALUE_SUMS_CUH

#include "attention/cuda/decode/page_gains.cuh"

namespace decode {

/*
 * The probabilities of 16 tokens as operand B: of 8 rows, tokens 2 q, 2 q + 1 and those 8 on of column lane / 4 in two words, and
 * of 16 rows twice that. Of 4 rows one word has both: column 2 r has tokens 0 to 7 of row r and column 2 r + 1 the others, so
 * what multiplies the wrong half of a column is zero, and sums of both columns belong together.
 */
template <int NT> struct tile_probabilities {
  uint32_t words[NT];
  __device__ __forceinline__ uint32_t get(int columns, int half) const { return words[NT == 1 ? 0 : 2 * columns + half]; }
};

/* acc [tile of columns][block]: rows g and g + 8 of a block of crumbs, in units of 2^-24 and 2^-22. middle: sums of probabilities
 * times gains. FOUR_LOG_GAINS has in row g those of class g, g < 4, and the probabilities themselves for g = 4, of tokens 0 to 7;
 * in row g + 8 a sixteenth of the same of the others. Of 4 rows, whose columns have tokens of one half, the other half's row of a
 * column is junk. Other forms have all in row g of class g. `gains`: of ONE_GAIN the page's own, which are multiplied by
 * `factors`; of_columns and of_row: of other forms, and of FOUR_LOG_GAINS what a lane's row of these sums multiplies. */
template <int FORM, int BLOCKS, bool ANY, int NT>
__device__ inline void sum_values(const page_forms &a, const uint32_t *words, const uint16_t *gains, const uint32_t (&factors)[2],
                                  const column_gains &of_columns, const uint32_t *of_row, const tile_probabilities<NT> (&p)[4],
                                  int lane, float (&acc)[column_tiles_of(NT)][BLOCKS][4],
                                  float (&middle)[column_tiles_of(NT)][4]) {
  constexpr int COLUMN_TILES = column_tiles_of(NT);
  const int g = lane / 4, q = lane % 4, blocks = ANY ? a.value_crumbs / 16 : BLOCKS;
  constexpr uint32_t ONES = 0x3C003C00, SIXTEENS = 0x4C004C00;
  uint2 w[ANY ? 1 : BLOCKS];
  if (!ANY)
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) w[b] = *(const uint2 *)(words + (b * 32 + lane) * 2);
#pragma unroll
  for (int tile = 0; tile < 4; tile++) {
    uint32_t weighted[COLUMN_TILES][GAIN_CLASSES][2];
    if (FORM == ONE_GAIN) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t of_tokens = multiply_half2(((const uint32_t *)gains)[tile * 8 + 4 * i + q], factors[i]);
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
          for (int k = 0; k < GAIN_CLASSES; k++)
            weighted[c][k][i] = k == 0 ? multiply_half2(p[tile].get(c, i), of_tokens) : weighted[c][0][i];
      }
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++) mma_fp16(middle[c], ONES, 0, SIXTEENS, 0, weighted[c][0][0], weighted[c][0][1]);
    } else {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4 x = *(const uint4 *)(of_columns.half[i] + tile * GAIN_TILE_BYTES);
        const uint32_t of_class[GAIN_CLASSES] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
          for (int k = 0; k < GAIN_CLASSES; k++) weighted[c][k][i] = multiply_half2(p[tile].get(c, i), of_class[k]);
      }
      if (FORM == FOUR_LOG_GAINS) { /* gains are the operand A */
        const uint32_t low = of_row[tile * GAIN_TILE_BYTES / 4], high = of_row[(GAIN_HALF_BYTES + tile * GAIN_TILE_BYTES) / 4];
        if (NT == 1)
          mma_fp16_half(middle[0], low, high, p[tile].words[0]);
        else
#pragma unroll
          for (int c = 0; c < COLUMN_TILES; c++) mma_fp16(middle[c], low, 0, 0, high, p[tile].get(c, 0), p[tile].get(c, 1));
      } else {
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
          for (int k = 0; k < GAIN_CLASSES; k++)
            mma_fp16(middle[c], g == k ? ONES : 0, 0, g == k ? SIXTEENS : 0, 0, weighted[c][k][0], weighted[c][k][1]);
      }
    }
#pragma unroll
    for (int k = 0; k < GAIN_CLASSES; k++) {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        if (!ANY && (b < class_begin(BLOCKS, k) || b >= class_begin(BLOCKS, k + 1))) continue;
        if (ANY && (b < class_begin(blocks, k) || b >= class_begin(blocks, k + 1))) continue;
        uint32_t x;
        if (ANY)
          x = words[(b * 32 + lane) * 2 + tile / 2];
        else
          x = tile / 2 ? w[b].y : w[b].x;
        if (tile % 2) x >>= 8;
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
          mma_fp16(acc[c][b], x & 0x00030003u, x & 0x000C000Cu, x & 0x00300030u, x & 0x00C000C0u, weighted[c][k][0],
                   weighted[c][k][1]);
      }
    }
  }
}

} // namespace decode

#endif
