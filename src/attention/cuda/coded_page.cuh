/*
 * attention/cuda/coded_page.cuh - what a warp does with a coded page: gains, scores, the turning mean, sums. Private.
 *
 * Operands are swapped: the long side of a matrix product, 16 rows, are tokens (scores) or crumbs (sums), and the 8 columns are
 * rows of queries, so little of it is idle.
 *
 *   scores   A = 16 tokens x 32 crumbs, straight from the page's words by ANDs, bytes;  B = query bytes, high and low columns
 *   sums     A = 16 crumbs x 16 tokens, likewise, subnormal fp16;  B = probabilities times gains, fp16
 *
 * A lane, 4 g + q, ends up with scores of tokens g and g + 8 of a tile for row q of four, and with sums of the same row, so the
 * running softmax needs no exchange but for maxima.
 */
#ifndef OSCAR_ATTENTION_CUDA_CODED_PAGE_CUH
#define OSCAR_ATTENTION_CUDA_CODED_PAGE_CUH

#include "attention/cuda/decode_data.cuh"
#include "attention/cuda/instructions.cuh"

namespace decode {

constexpr int WAVE_PAGES = 8; /* whose curves' weights are computed together */
constexpr float NONE = -INFINITY;

/* A mean does not turn; by polynomials and fast pairs; by pairs that have curves of their own (decode.h). */
enum how_it_turns { STAYS, BY_WAVES, BY_PAIRS };

/* Forms that kernels are compiled for: both sides with four log gains, or with one fp16 gain; or any. */
enum kernel_form { FOUR_LOG_GAINS, ONE_GAIN, ANY_FORM };

/* Forms of the two sides. */
struct page_forms {
  int key_crumbs, key_groups, key_form, value_crumbs, value_groups, value_form;
};

/* Of the kernel. */
struct arguments {
  const struct decode_tile *tiles;
  const struct decode_page *pages;
  const float *q;
  const uint8_t *memory;
  size_t unit_bytes;
  const uint8_t *prepared;
  const uint32_t *value_map; /* of decode_layer */
  float *parts, *out;
  struct decode_rope rope;
  const uint16_t *pairs; /* of decode_layer, as curves */
  const uint8_t *curves;
  struct page_forms forms;
  const struct decode_line *line;
  int tile_count, kv_heads, group, head_dim, window;
  int turns;               /* how_it_turns */
  int turning_pairs, fast; /* of decode_layer; curved_pairs */
  int head_bytes, value_offset;
  int page_bytes, slot_bytes; /* what is copied of a coded page for one head; of a slot of a ring */
  int angle_bytes;            /* of rope.turns for a page and the pairs of a head, where they are copied */
  bool coded;
  bool map_is_here;  /* a KV head's map of values is copied to shared memory */
  bool copies_ahead; /* queries and curves of the next item, while one is worked on */
  float scale;
};

/* Columns of a product are eight: of a row each, or of four rows each twice, where there are no more. Of 16 rows there are two
 * such tiles of columns. */
__host__ __device__ constexpr int column_tiles_of(int row_tiles) { return row_tiles > 2 ? row_tiles / 2 : 1; }
/* Column c is row c / 2 of a tile of 4 rows, of two such in turn. */
template <int NT> __device__ __forceinline__ int row_of_column(int c) { return c / 2 + (NT > 1 ? c % 2 * 4 : 0); }
/* The tile of 4 rows of a lane's column u, 0 or 1, of a tile of columns. */
template <int NT> __device__ __forceinline__ constexpr int row_tile_of(int columns, int u) {
  return NT > 1 ? 2 * columns + u : 0;
}

/* What a row has of a running softmax, in a lane: m the same in all lanes of a row, l of this lane's tokens only. */
template <int NT> struct softmax { float m[NT], l[NT]; };

/* The gains of a page, one token after the other, into the orders that scores and sums want. Returns the largest gain of a value,
 * for forms whose gains may be anything. */
struct page_gains {
  float *keys;        /* [64][class]; of 16 rows and log gains half_gains in their place */
  float *key_zeros;   /* [64] s z; SCALE_ZERO only */
  __half *values;     /* [tokens 2q, 2q + 1 | 8 + 2q, 8 + 2q + 1][tile][q][class][2]; those of the latter over 16 */
  const float *table; /* 2^((i - 8)/4) */
};

__host__ __device__ inline int gains_bytes(const page_forms &a) { return a.key_form == OSCAR_ROW_SCALE_ZERO ? 1792 : 1536; }
__device__ inline page_gains page_gains_of(uint8_t *memory, const float *table) {
  return {(float *)memory, (float *)(memory + 1536), (__half *)(memory + 1024), table};
}

__device__ inline float gain_of(const page_gains &to, int form, int groups, const uint16_t *meta, int token, int class_) {
  const int p = groups == GAIN_CLASSES ? class_ : class_ * groups / GAIN_CLASSES;
  if (form == OSCAR_ROW_LOG_GAINS) return to.table[meta[token] >> 4 * p & 15];
  return __half2float(__ushort_as_half(meta[(form == OSCAR_ROW_SCALE_ZERO ? 2 * p : p) * 64 + token]));
}

/* A lane has tokens 2 lane and 2 lane + 1. */
__device__ __forceinline__ void expand_key_gains(const page_forms &a, const page_gains &to, const uint8_t *page, int lane) {
  const uint16_t *meta = (const uint16_t *)(page + 16 * a.key_crumbs);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = 2 * lane + i;
    float4 gains;
    gains.x = gain_of(to, a.key_form, a.key_groups, meta, token, 0);
    gains.y = gain_of(to, a.key_form, a.key_groups, meta, token, 1);
    gains.z = gain_of(to, a.key_form, a.key_groups, meta, token, 2);
    gains.w = gain_of(to, a.key_form, a.key_groups, meta, token, 3);
    *(float4 *)(to.keys + 4 * token) = gains;
    if (a.key_form == OSCAR_ROW_SCALE_ZERO) to.key_zeros[token] = gains.x * __half2float(__ushort_as_half(meta[64 + token]));
  }
}

/* The same of log gains in four groups, times KEY_GAIN_UNIT, of tokens lane and lane + 32: 2^(16 + n/4) of every nibble n. Its
 * place in a float of [16, 20) is bits 17 to 20. */
struct key_log_gains {
  uint32_t words[2];
  __device__ __forceinline__ void load(const uint8_t *meta, int lane) {
    words[0] = ((const uint16_t *)meta)[lane], words[1] = ((const uint16_t *)meta)[lane + 32];
  }
  __device__ __forceinline__ static float gain(uint32_t shifted, uint32_t sixteen) {
    return exp2_fast(__uint_as_float(and_or<0x001E0000u>(shifted, sixteen)));
  }
  /* sixteen: bits of 16.0f, in a register. */
  __device__ __forceinline__ void store(const page_gains &to, uint32_t sixteen, int lane) const {
#pragma unroll
    for (int i = 0; i < 2; i++)
      *(float4 *)(to.keys + 4 * (lane + 32 * i)) = make_float4(gain(words[i] << 17, sixteen), gain(words[i] << 13, sixteen),
                                                               gain(words[i] << 9, sixteen), gain(words[i] << 5, sixteen));
  }
};

/* Gains of values times 2^-exponent, where the exponent grows with the largest gain seen. */
__device__ inline void expand_value_gains(const page_forms &a, const page_gains &to, const uint16_t *meta, int &exponent,
                                          int lane) {
  float gains[2][GAIN_CLASSES];
  float factor = 1;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int p = 0; p < GAIN_CLASSES; p++) gains[i][p] = gain_of(to, a.value_form, a.value_groups, meta, 2 * lane + i, p);
  if (a.value_form != OSCAR_ROW_LOG_GAINS) {
    float largest = 0;
#pragma unroll
    for (int p = 0; p < GAIN_CLASSES; p++) largest = fmaxf(largest, fmaxf(gains[0][p], gains[1][p]));
    int needed;
    frexpf(largest_of_warp(largest), &needed);
    exponent = max(exponent, needed);
    factor = ldexpf(1, -exponent);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int token = 2 * lane + i, tile = token / 16, upper = token % 16 / 8, q = token % 8 / 2;
    const float scale = upper ? factor * 0.0625f : factor;
#pragma unroll
    for (int p = 0; p < GAIN_CLASSES; p++)
      to.values[((upper * 4 + tile) * 4 + q) * 2 * GAIN_CLASSES + p * 2 + i] = __float2half_rn(gains[i][p] * scale);
  }
}

/* Of one fp16 gain, nothing but the exponent: 2^-exponent and a sixteenth of it are left in `factors`, or zero where a column of
 * four rows has other tokens (tile_probabilities). */
template <int NT>
__device__ __forceinline__ void scale_value_gains(const uint16_t *meta, int &exponent, uint32_t (&factors)[2], int lane) {
  const uint32_t both = *(const uint32_t *)(meta + 2 * lane) & 0x7FFF7FFFu;
  const uint32_t largest = __reduce_max_sync(~0u, max(both & 0xFFFFu, both >> 16));
  exponent = max(exponent, (int)(largest >> 10) - 14);
#pragma unroll
  for (int upper = 0; upper < 2; upper++) {
    const float factor = NT == 1 && lane / 4 % 2 != upper ? 0 : ldexpf(1, -exponent - 4 * upper);
    factors[upper] = pack_half2(factor, factor);
  }
}

/* The same of log gains in four groups, which need no exponent. words: of tokens 2 lane and 2 lane + 1. */
__device__ __forceinline__ void expand_value_log_gains(const page_gains &to, uint32_t words, int lane) {
  const int upper = lane / 4 % 2;
  const uint2 a = log_gains_fp16(words, 4 * upper), b = log_gains_fp16(words >> 16, 4 * upper); /* classes 0, 1 and 2, 3 */
  *(uint4 *)((uint8_t *)to.values + ((upper * 4 + lane / 8) * 4 + lane % 4) * 16) = make_uint4(
      __byte_perm(a.x, b.x, 0x5410), __byte_perm(a.x, b.x, 0x7632), __byte_perm(a.y, b.y, 0x5410), __byte_perm(a.y, b.y, 0x7632));
}

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

/* ---- the turning mean ---- */

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
 * rope. amplitudes: of fast pairs, [row][fast]; mixing: decode_data.cuh. STEPS 0: as many as there are. */
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

/* The new maxima of the rows, and what all sums have to be multiplied with; false: nothing changes. The same in the whole warp.
 * Scores may exceed a maximum by up to `slack` before it is raised. */
template <int NT>
__device__ inline bool raise_maxima(const float (&largest)[NT], float slack, softmax<NT> &state, float (&factor)[NT]) {
  bool above = false;
#pragma unroll
  for (int n = 0; n < NT; n++) above = above || largest[n] > state.m[n] + slack;
  if (!__any_sync(~0u, above)) return false;
  float top[NT];
#pragma unroll
  for (int n = 0; n < NT; n++) {
    top[n] = largest[n];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) top[n] = fmaxf(top[n], __shfl_xor_sync(~0u, top[n], step));
  }
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float m = fmaxf(state.m[n], top[n]);
    factor[n] = m > NONE ? exp2_fast(state.m[n] - m) : 1; /* -inf is never subtracted from -inf */
    state.m[n] = m;
    state.l[n] *= factor[n];
  }
  return true;
}

/*
 * Scores of coded pages are kept as they go into exp2: less the maximum of the row, plus PROBABILITY_SHIFT. So they begin at
 * `base`, which has the mean in it as well. `limit`: what scores may be before the maximum is raised; -inf until there is one.
 */
template <int NT> struct coded_maxima { float m[NT], base[NT], limit[NT]; };
template <int NT>
__device__ __forceinline__ bool raise_coded_maxima(const float (&largest)[NT], float slack, coded_maxima<NT> &maxima,
                                                   float (&s)[4][NT][2], float (&factor)[NT]) {
  bool above = false;
#pragma unroll
  for (int n = 0; n < NT; n++) above = above || largest[n] > maxima.limit[n];
  if (!__any_sync(~0u, above)) return false;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const bool first = maxima.limit[n] == NONE;
    float top = largest[n];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    factor[n] = 1;
    if (top == NONE) continue; /* all is masked */
    float more = top - PROBABILITY_SHIFT;
    if (!first) more = fmaxf(more, 0), factor[n] = exp2_fast(-more); /* at first there is nothing to be multiplied */
    maxima.m[n] += more;
    maxima.base[n] -= more;
    maxima.limit[n] = PROBABILITY_SHIFT + slack;
#pragma unroll
    for (int t = 0; t < 4; t++) s[t][n][0] -= more, s[t][n][1] -= more;
  }
  return true;
}

/* What multiplies probabilities besides gains, in the form of page_gains.values: ones, where lanes of rows 4 to 7 of the sums of
 * gains of FOUR_LOG_GAINS sum up the probabilities themselves; and zeros for half of the tokens. */
constexpr int GAIN_HALF_BYTES = 256, CONSTANT_GAINS_BYTES = 3 * GAIN_HALF_BYTES;
__device__ inline void store_constant_gains(uint8_t *to) {
  for (int i = threadIdx.x; i < CONSTANT_GAINS_BYTES / 4; i += blockDim.x)
    ((uint32_t *)to)[i] = i < GAIN_HALF_BYTES / 4 ? 0x3C003C00 : i < 2 * GAIN_HALF_BYTES / 4 ? 0x2C002C00 : 0;
}

/*
 * The probabilities of 16 tokens as operand B: of 8 rows, tokens 2 q, 2 q + 1 and those 8 on of column lane / 4 in two words, and
 * of 16 rows twice that. Of 4 rows one word has both: column 2 r has tokens 0 to 7 of row r and column 2 r + 1 the others, so
 * what multiplies the wrong half of a column is zero, and sums of both columns belong together.
 */
template <int NT> struct tile_probabilities {
  uint32_t words[NT];
  __device__ __forceinline__ uint32_t get(int columns, int half) const { return words[NT == 1 ? 0 : 2 * columns + half]; }
};

/* Of a lane's columns, gains of tokens 2 q and 2 q + 1 and those 8 on: of every class, tiles GAIN_TILE_BYTES apart. */
constexpr int GAIN_TILE_BYTES = 64;
struct column_gains {
  const uint8_t *half[2];
};
template <int NT>
__device__ __forceinline__ column_gains column_gains_of(const page_gains &gains, const uint8_t *constants, int lane) {
  const uint8_t *values = (const uint8_t *)gains.values + lane % 4 * 16, *zeros = constants + 2 * GAIN_HALF_BYTES + lane % 4 * 16;
  const int column = lane / 4 % 2;
  return {{NT == 1 && column == 1 ? zeros : values, NT == 1 && column == 0 ? zeros : values + GAIN_HALF_BYTES}};
}

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
