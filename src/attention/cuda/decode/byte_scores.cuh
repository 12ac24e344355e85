/*
 * attention/cuda/decode/byte_scores.cuh - scores of a coded page for up to 8 rows of queries. Private.
 *
 *   scores   A = 16 tokens x 32 crumbs, straight from the page's words by ANDs, bytes;  B = query bytes, high and low columns
 *
 * A lane, 4 g + q, ends up with scores of tokens g and g + 8 of a tile for row q of four.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_BYTE_SCORES_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_BYTE_SCORES_CUH

#include "attention/cuda/decode/page_gains.cuh"

namespace decode {

/* A tile's queries in bytes: operands, in registers where the number of blocks is known, else in shared memory; and what a lane's
 * rows need to make scores of sums (struct row_constants). */
template <int FORM, int KEY_BLOCKS, int NT> struct byte_queries {
  static constexpr float GAIN_UNIT = FORM == FOUR_LOG_GAINS ? KEY_GAIN_UNIT : 1; /* gains of keys come times this */
  uint32_t words[NT][KEY_BLOCKS ? KEY_BLOCKS : 1];
  const uint32_t *shared; /* of this lane */
  int begin[NT][GAIN_CLASSES][4];
  float unit[NT][GAIN_CLASSES], offset[NT][GAIN_CLASSES];
  __device__ __forceinline__ void load(const uint32_t *operands, const struct row_constants *constants, int lane) {
    shared = operands + lane;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const struct row_constants &row = constants[n * 4 + lane % 4];
#pragma unroll
      for (int i = 0; i < KEY_BLOCKS; i++) words[n][i] = shared[(n * KEY_BLOCKS + i) * 32];
#pragma unroll
      for (int p = 0; p < GAIN_CLASSES; p++) {
        const int4 of = *(const int4 *)row.begin[p];
        begin[n][p][0] = of.x, begin[n][p][1] = of.y, begin[n][p][2] = of.z, begin[n][p][3] = of.w;
        unit[n][p] = row.unit[p] / GAIN_UNIT, offset[n][p] = row.offset[p] / GAIN_UNIT;
      }
    }
  }
  __device__ __forceinline__ uint32_t get(int blocks, int n, int i) const {
    return KEY_BLOCKS ? words[n][KEY_BLOCKS ? i : 0] : shared[(n * blocks + i) * 32];
  }
};

/* Sums of bytes of 16 tokens, by class: token g in [0] and [1], high and low, token g + 8 in [2] and [3]. */
template <int FORM, int KEY_BLOCKS, int NT>
__device__ __forceinline__ void sum_keys(int some_blocks, const uint32_t *words, int tile,
                                         const byte_queries<FORM, KEY_BLOCKS, NT> &queries, int lane,
                                         int (&sums)[NT][GAIN_CLASSES][4]) {
  const int blocks = KEY_BLOCKS ? KEY_BLOCKS : some_blocks, full = blocks / GAIN_CLASSES, over = blocks % GAIN_CLASSES;
  if (KEY_BLOCKS < 8) { /* else the first product brings it */
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int p = 0; p < GAIN_CLASSES; p++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[n][p][i] = queries.begin[n][p][i];
  }
#pragma unroll
  for (int pair = 0; pair < full / 2; pair++) {
    const uint4 w = *(const uint4 *)(words + pair * 512 + tile * 128 + lane * 4);
#pragma unroll
    for (int p = 0; p < GAIN_CLASSES; p++) {
      const uint32_t mask = 0x03030303u << 2 * p;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint32_t b0 = queries.get(blocks, n, pair * 8 + p * 2), b1 = queries.get(blocks, n, pair * 8 + p * 2 + 1);
        if (KEY_BLOCKS >= 8 && pair == 0)
          mma_bytes_from(sums[n][p], w.x & mask, w.y & mask, w.z & mask, w.w & mask, b0, b1, queries.begin[n][p]);
        else
          mma_bytes(sums[n][p], w.x & mask, w.y & mask, w.z & mask, w.w & mask, b0, b1);
      }
    }
  }
  if (full % 2) {
    const uint2 w = *(const uint2 *)(words + full / 2 * 512 + tile / 2 * 128 + lane * 4 + tile % 2 * 2);
#pragma unroll
    for (int p = 0; p < GAIN_CLASSES; p++) {
      const uint32_t mask = 0x03030303u << 2 * p;
#pragma unroll
      for (int n = 0; n < NT; n++) mma_bytes_half(sums[n][p], w.x & mask, w.y & mask, queries.get(blocks, n, full / 2 * 8 + p));
    }
  }
  if (over >= 2) { /* one more block in classes 1 and 3, token g + 8 two bits below its place */
    const uint32_t w = words[full * 256 + lane * 4 + tile];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int p = 2 * i + 1;
      const uint32_t mask = 0x03030303u << 2 * p;
#pragma unroll
      for (int n = 0; n < NT; n++) mma_bytes_half(sums[n][p], w & mask, w << 2 & mask, queries.get(blocks, n, full * 4 + i));
    }
  }
  if (over % 2) { /* one more block in class 3 or 2, tokens of two tiles in a word */
    const uint32_t w = words[full * 256 + (over == 3 ? 128 : 0) + lane * 2 + tile / 2] >> tile % 2 * 4;
    if (over == 1) {
#pragma unroll
      for (int n = 0; n < NT; n++)
        mma_bytes_half(sums[n][3], w << 6 & 0xC0C0C0C0u, w << 4 & 0xC0C0C0C0u, queries.get(blocks, n, full * 4));
    } else {
#pragma unroll
      for (int n = 0; n < NT; n++)
        mma_bytes_half(sums[n][2], w << 4 & 0x30303030u, w << 2 & 0x30303030u, queries.get(blocks, n, full * 4 + 2));
    }
  }
}

/* Scores of 16 tokens from these sums: token g in s[.][0], token g + 8 in s[.][1]. `gains`: [64] fp16 of ONE_GAIN, else
 * [64][class] floats. */
template <int FORM, int KEY_BLOCKS, int NT>
__device__ __forceinline__ void scale_sums(const int (&sums)[NT][GAIN_CLASSES][4], int tile,
                                           const byte_queries<FORM, KEY_BLOCKS, NT> &queries, const void *page_gains, int lane,
                                           float (&s)[NT][2]) {
  float gains[2][GAIN_CLASSES];
  if (FORM == ONE_GAIN) {
    const __half *of = (const __half *)page_gains + tile * 16 + lane / 4;
    gains[0][0] = __half2float(of[0]), gains[1][0] = __half2float(of[8]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 of = *(const float4 *)((const float *)page_gains + (tile * 16 + 8 * i + lane / 4) * 4);
      gains[i][0] = of.x, gains[i][1] = of.y, gains[i][2] = of.z, gains[i][3] = of.w;
    }
  }
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float all = 0;
#pragma unroll
      for (int p = 0; p < GAIN_CLASSES; p++) {
        const float unit = queries.unit[n][p], high = fmaf(__int_as_float(sums[n][p][2 * i]), unit, queries.offset[n][p]);
        const float of_class = fmaf(__int_as_float(sums[n][p][2 * i + 1]), unit, high);
        if (FORM == ONE_GAIN)
          all = p == 0 ? of_class : all + of_class;
        else
          s[n][i] = fmaf(of_class, gains[i][p], s[n][i]);
      }
      if (FORM == ONE_GAIN) s[n][i] = fmaf(all, gains[i][0], s[n][i]);
    }
}

} // namespace decode

#endif
