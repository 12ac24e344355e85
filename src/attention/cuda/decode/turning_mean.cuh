/*
 * attention/cuda/decode/turning_mean.cuh - what a mean that turns has in the scores of a page. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_TURNING_MEAN_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_TURNING_MEAN_CUH

#include "attention/cuda/decode/arguments.cuh"

namespace decode {

constexpr int WAVE_PAGES = 8; /* whose curves' weights are computed together */

/*
 * Curves are even or odd about the centre of the page, so one product with the tokens from there on serves those before it too,
 * from which odd ones are taken off. Their weights are operand B: columns are rows of queries, each twice, with the number and
 * with what fp16 lost of it.
 */

/* Of a step: sums [even, odd][tile of 16 tokens]. curves: of the step; weights: of a lane, even ones, then odd ones. */
template <int NT>
__device__ __forceinline__ void multiply_curves(const uint8_t *curves, const uint4 (&weights)[NT], int lane,
                                                float (&sums)[2][2][NT][4]) {
#pragma unroll
  for (int odd = 0; odd < 2; odd++)
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      const uint4 *of_tile = (const uint4 *)(curves + (odd * 2 + tile) * 1024) + lane;
      const uint4 value = of_tile[0], rest = of_tile[32];
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint32_t b0 = odd ? weights[n].z : weights[n].x, b1 = odd ? weights[n].w : weights[n].y;
        mma_fp16(sums[odd][tile][n], value.x, value.y, value.z, value.w, b0, b1);
        mma_fp16(sums[odd][tile][n], rest.x, rest.y, rest.z, rest.w, b0, b1);
      }
    }
}
template <int NT> __device__ __forceinline__ void add_curves(const float (&sums)[2][2][NT][4], float (&s)[4][NT][2]) {
#pragma unroll
  for (int tile = 0; tile < 2; tile++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float even = sums[0][tile][n][2 * i] + sums[0][tile][n][2 * i + 1],
                    odd = sums[1][tile][n][2 * i] + sums[1][tile][n][2 * i + 1];
        s[2 + tile][n][i] += even + odd;
        s[1 - tile][n][1 - i] += __shfl_xor_sync(~0u, even - odd, 28); /* rows g and 15 - g are as far from the centre */
      }
}

/* ---- the turning mean: by pairs ---- */

/*
 * Amplitudes (a, b) of a pair, turned by the angle of a page's centre, are (a cos + b sin, b cos - a sin), and what the pair adds
 * to the score of a token at x from the centre is the first times cos(x w) plus the second times sin(x w).
 */

/* A lane's amplitudes (a, b): of its rows, and of each step pairs 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. They stay in registers, or
 * where they lie if there are too many, or any number. */
template <int STEPS, int NT> struct lane_amplitudes {
  static constexpr bool STAY = STEPS > 0 && NT <= 2;
  const float2 *at;
  float4 kept[STAY ? STEPS : 1][2];
  int steps;
  __device__ __forceinline__ void load(const float2 *amplitudes, int some_steps, int lane) {
    steps = STEPS ? STEPS : some_steps;
    at = amplitudes + row_of_column<NT>(lane / 4) * steps * CURVE_STEP + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < STEPS && STAY; k++) kept[k][0] = get_from(0, k, 0), kept[k][1] = get_from(0, k, 1);
  }
  __device__ __forceinline__ float4 get_from(int columns, int k, int i) const {
    return *(const float4 *)(at + (columns * 8 * steps + k) * CURVE_STEP + 8 * i);
  }
  /* Of a tile of columns and a step: the first two pairs, or the last. */
  __device__ __forceinline__ float4 get(int columns, int k, int i) const { return STAY ? kept[k][i] : get_from(columns, k, i); }
};

/*
 * A product has eight columns, and all are numbers: of 8 rows, or where there are but 4, of these for two pages at once. What
 * fp16 lost of them has a product of its own, as what it lost of the curves has, where they are kept.
 *
 * turned [page or tile of 4 rows][tile of 16 tokens][token g, g + 8]: what the mean has in scores. curves, amplitudes: of the
 * head; angles: of its pairs, for the lane's page (of column lane / 4, page or rows are lane / 4 % 2). Of each step a lane has
 * pairs 2 q, 2 q + 1, 2 q + 8 and 2 q + 9, as operand B wants them. STEPS 0: as many as there are. base: where scores of rows
 * begin; those of two pages begin at 0. KEEP_LOST: what fp16 lost of the numbers, and of curves.
 */
template <int NT> struct turned_scores { float of[NT == 1 ? 2 : NT][4][2]; };
template <int STEPS, int NT, bool KEEP_LOST>
__device__ __forceinline__ void turn_pairs(const arguments &a, const uint8_t *curves,
                                           const lane_amplitudes<STEPS, NT> &amplitudes, const uint8_t *angles,
                                           const float (&base)[NT], int lane, turned_scores<NT> &turned) {
  constexpr int COLUMN_TILES = column_tiles_of(NT);
  const int q = lane % 4;
  float sums[COLUMN_TILES][2][2][4] = {}; /* [even, odd][tile from the centre on] */
  if (NT > 1)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int tile = 0; tile < 2; tile++) sums[n / 2][0][tile][n % 2] = sums[n / 2][0][tile][2 + n % 2] = base[n];
#pragma unroll
  for (int k = 0; k < amplitudes.steps; k++) {
    const float4 *turns = (const float4 *)angles + k * CURVE_STEP / 2 + q, u = turns[0], v = turns[4]; /* (cos, sin) twice */
    uint32_t number[COLUMN_TILES][2][2], lost[COLUMN_TILES][2][2]; /* [even, odd][pairs 2 q, 2 q + 1; 2 q + 8, 2 q + 9] */
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++) {
      const float4 x = amplitudes.get(c, k, 0), y = amplitudes.get(c, k, 1);
      const float even[4] = {x.x * u.x + x.y * u.y, x.z * u.z + x.w * u.w, y.x * v.x + y.y * v.y, y.z * v.z + y.w * v.w};
      const float odd[4] = {x.y * u.x - x.x * u.y, x.w * u.z - x.z * u.w, y.y * v.x - y.x * v.y, y.w * v.z - y.z * v.w};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        number[c][0][i] = pack_half2(even[2 * i], even[2 * i + 1]), number[c][1][i] = pack_half2(odd[2 * i], odd[2 * i + 1]);
        if (!KEEP_LOST) continue;
        lost[c][0][i] = rest_half2(even[2 * i], even[2 * i + 1], number[c][0][i]);
        lost[c][1][i] = rest_half2(odd[2 * i], odd[2 * i + 1], number[c][1][i]);
      }
    }
#pragma unroll
    for (int o = 0; o < 2; o++)
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        const uint4 *of_tile = (const uint4 *)(curves + k * CURVE_STEP_BYTES + (o * 2 + tile) * 1024) + lane;
        const uint4 value = of_tile[0];
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++) {
          mma_fp16(sums[c][o][tile], value.x, value.y, value.z, value.w, number[c][o][0], number[c][o][1]);
          if (!KEEP_LOST) continue;
          const uint4 rest = of_tile[32];
          mma_fp16(sums[c][o][tile], value.x, value.y, value.z, value.w, lost[c][o][0], lost[c][o][1]);
          mma_fp16(sums[c][o][tile], rest.x, rest.y, rest.z, rest.w, number[c][o][0], number[c][o][1]);
        }
      }
  }
#pragma unroll
  for (int tile = 0; tile < 2; tile++)
#pragma unroll
    for (int n = 0; n < 2 * COLUMN_TILES; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float even = sums[n / 2][0][tile][2 * i + n % 2], odd = sums[n / 2][1][tile][2 * i + n % 2];
        turned.of[n][2 + tile][i] = even + odd;
        turned.of[n][1 - tile][1 - i] = __shfl_xor_sync(~0u, even - odd, 28); /* rows g and 15 - g: as far from the centre */
      }
}

/* ---- the turning mean: by waves ---- */

/* Weights of a page are made for several pages together, and kept: [n][lane][steps] of a uint4. */
constexpr int WEIGHT_WORDS = 4;

/* Adds what the mean has to the scores of a page. `weights`: of this page and lane. STEPS 0: as many as there are. */
template <int STEPS, int NT>
__device__ __forceinline__ void score_waves(const uint8_t *curves, int some_steps, const uint32_t *weights, int lane,
                                            float (&s)[4][NT][2]) {
  const int steps = STEPS ? STEPS : some_steps;
  float sums[2][2][NT][4] = {};
#pragma unroll
  for (int k = 0; k < steps; k++) {
    uint4 w[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) w[n] = *(const uint4 *)(weights + (n * 32 * steps + k) * WEIGHT_WORDS);
    multiply_curves<NT>(curves + k * CURVE_STEP_BYTES, w, lane, sums);
  }
  add_curves<NT>(sums, s);
}

/* The weights of pages whose numbers lanes 4 g have in `number`: [page g] of what score_waves takes. pairs: the first of the
 * rope. amplitudes: of fast pairs, [row][fast]; mixing: data.cuh. STEPS 0: as many as there are. */
template <int STEPS, int NT>
__device__ inline void make_weights(const struct decode_rope &rope, int pairs, const float2 *amplitudes, const uint4 *mixing,
                                    int number, uint32_t *weights, int lane) {
  constexpr int TOGETHER = 4;
  const int g = lane / 4, q = lane % 4, steps = STEPS ? STEPS : rope.steps, fast = rope.fast;
  const int lane_words = steps * WEIGHT_WORDS;
  const uint4 *angles = (const uint4 *)rope.angles + (size_t)number * (rope.pairs / 8) * 4 + q;
  const float2 *turns = (const float2 *)rope.turns + (size_t)number * rope.pairs;
  uint32_t *mine = weights + (g * NT * 32 + q) * lane_words;
#pragma unroll
  for (int half = 1; half < 2 * steps; half++) { /* of 8 inputs; the first are polynomials */
    float2 turn[2];
    int pair[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      pair[i] = 8 * (half - 1) + 2 * q + i;
      turn[i] = pair[i] < fast ? __ldg(turns + pair[i]) : make_float2(0, 0);
      pair[i] = min(pair[i], fast - 1);
    }
#pragma unroll
    for (int row = 0; row < 4 * NT; row++) {
      float even[2] = {0, 0}, odd[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (fast == 0) continue;
        const float2 ab = amplitudes[row * fast + pair[i]];
        even[i] = ab.x * turn[i].x + ab.y * turn[i].y;
        odd[i] = ab.y * turn[i].x - ab.x * turn[i].y;
      }
      const uint32_t evens = pack_half2(even[0], even[1]), odds = pack_half2(odd[0], odd[1]);
      uint32_t *to = mine + (row / 4 * 32 + row % 4 * 8) * lane_words + half / 2 * WEIGHT_WORDS + half % 2;
      to[0] = evens, to[2] = odds;
      to[4 * lane_words] = rest_half2(even[0], even[1], evens), to[4 * lane_words + 2] = rest_half2(odd[0], odd[1], odds);
    }
  }
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float sums[8][4] = {};
    for (int first = fast / 8; first < pairs / 8; first += TOGETHER) {
      uint4 w[TOGETHER]; /* rows g + 8 of the operand are what rows g lost */
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) w[k] = __ldg(angles + min(first + k, pairs / 8 - 1) * 4);
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) {
        if (first + k >= pairs / 8) continue;
        const uint4 *b = mixing + (((first - fast / 8 + k) * NT + n) * 8) * 32 + lane;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const uint4 x = b[i * 32];
          mma_fp16(sums[i], w[k].x, w[k].y, w[k].z, w[k].w, x.x, x.y);
          mma_fp16(sums[i], w[k].x, w[k].y, w[k].z, w[k].w, x.z, x.w);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float low = sums[i][0] + sums[i][2], high = sums[i][1] + sums[i][3];
      const uint32_t value = pack_half2(low, high);
      uint32_t *to = mine + (n * 32 + i / 2 * 8) * lane_words + i % 2 * 2; /* even and odd in turn */
      to[0] = value;
      to[4 * lane_words] = rest_half2(low, high, value);
    }
  }
}

} // namespace decode

#endif
