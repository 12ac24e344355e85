/*
 * attention/cuda/decode.cuh - the kernel behind decode_run; decode_*.cu compile it for each head dimension. Private.
 *
 * Scores, probabilities and sums never leave the registers of a warp. Operands are swapped: the long side of a matrix product,
 * 16 rows, are tokens (scores) or crumbs (sums), and the 8 columns are rows of queries, so little of it is idle.
 *
 *   scores   A = 16 tokens x 32 crumbs, straight from the page's words by ANDs, bytes;  B = query bytes, high and low columns
 *   sums     A = 16 crumbs x 16 tokens, likewise, subnormal fp16;  B = probabilities times gains, fp16
 *
 * A lane, 4 g + q, ends up with scores of tokens g and g + 8 of a tile for row q of four, and with sums of the same row, so the
 * running softmax needs no exchange but for maxima. Each warp has a ring of pages that the copy engine fills ahead of it, across
 * the borders of tiles; warps of a block share what belongs to the query, and add up their sums when the block leaves a tile.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_CUH

#include "attention/cuda/decode_data.cuh"
#include "attention/cuda/instructions.cuh"

namespace decode {

constexpr int STAGES = 2;
constexpr int MOST_BLOCKS = 190; /* of a launch */
constexpr int WAVE_PAGES = 8;    /* whose curves' weights are computed together */
constexpr int USUAL_STEPS = 2;   /* of 16 curves: the polynomials, and those of up to 8 fast pairs */
constexpr float NONE = -INFINITY;
/* Probabilities are kept 2^12 times as large as they are relative to the maximum, so that small ones stay normal fp16 numbers
 * even after division by 16 (see sum_values). */
constexpr float PROBABILITY_SHIFT = 12;

struct arguments {
  const struct decode_tile *tiles;
  const struct decode_page *pages;
  const float *q;
  float *out;
  const uint8_t *memory;
  size_t unit_bytes;
  const uint8_t *prepared;
  float *parts;
  uint32_t *done;
  const float *value_map;
  struct decode_rope rope;
  int tile_count, total_units, kv_heads, group, head_dim, window;
  int head_bytes, value_offset, page_bytes; /* page_bytes: what is copied of a page for one head */
  int key_crumbs, key_groups, key_form, value_crumbs, value_groups, value_form, value_rows;
  bool coded, waves;
  float scale;
};

/* The memory that finish_tile takes, in floats. */
constexpr int FINISH_SPLITS = 12;             /* among how many threads the rows of a map go, at most */
constexpr int FINISH_PARTS = MOST_BLOCKS + 2; /* of a tile: one of each block, and one more of the block that has both kinds */
__host__ __device__ inline int finish_splits(int head_dim, int threads) {
  const int quads = head_dim / 4;
  return threads / quads < FINISH_SPLITS ? threads / quads : FINISH_SPLITS;
}
__host__ __device__ inline int finish_floats(int head_dim, int value_crumbs, int rows, int threads) {
  return rows * (2 + FINISH_PARTS + head_dim + value_crumbs + GAIN_CLASSES + finish_splits(head_dim, threads) * head_dim);
}

/* Shared memory of a block, in bytes from its start. */
struct shared_layout {
  int barriers, log_gains, key_gains, value_gains, operands, constants, curves, mixing, weights, sums, bytes;
};
__host__ __device__ constexpr int warps_of(int blocks, int row_tiles) { return blocks > 8 ? 6 : row_tiles == 1 ? 12 : 8; }

__host__ __device__ inline int sums_stride(int head_dim, int value_crumbs) { return max(head_dim, value_crumbs + GAIN_CLASSES); }

__host__ __device__ inline struct shared_layout shared_layout_of(const arguments &a, int warps, int row_tiles) {
  struct shared_layout s;
  int at = warps * STAGES * a.page_bytes;
  s.barriers = at, at += 16 * ((warps * STAGES + 1) / 2);
  s.log_gains = at, at += 64;
  at = (at + 127) / 128 * 128;
  s.key_gains = at, at += a.coded ? warps * 1280 : 0;  /* [64] of 4 floats, [64] s z */
  s.value_gains = at, at += a.coded ? warps * 512 : 0; /* [16 tokens][q][class] of 2 words */
  s.operands = at, at += row_tiles * a.key_crumbs / 16 * 128;
  s.constants = at, at += DECODE_ROWS * (int)sizeof(struct row_constants);
  s.curves = at, at += a.waves ? a.rope.curves / 16 * 4096 : 0;
  s.mixing = at, at += a.waves ? a.rope.pairs / 8 * row_tiles * 8 * 512 : 0;
  s.weights = at;
  const int weights = a.waves ? warps * WAVE_PAGES * row_tiles * a.rope.curves / 16 * 256 : 0;
  s.sums = at;
  int sums = warps * row_tiles * 4 * (sums_stride(a.head_dim, a.value_crumbs) + 2) * 4;
  const int finish = 4 * finish_floats(a.head_dim, a.value_crumbs, 4 * row_tiles, warps * 32);
  if (finish > sums) sums = finish;
  at += weights > sums ? weights : sums;
  s.bytes = at;
  return s;
}

/* Which block of threads has a unit of the line, when block i has units i U / N to (i + 1) U / N - 1. */
__device__ inline int block_of_unit(int unit, int units, int blocks) {
  return (int)((((long long)unit + 1) * blocks - 1) / units);
}

/* What a row has of a running softmax, in a lane: m the same in all lanes of a row, l of this lane's tokens only. */
template <int NT> struct softmax { float m[NT], l[NT]; };

/* ---- the ring of pages of a warp ---- */

struct ring {
  uint8_t *pages; /* [STAGES][page_bytes] */
  uint64_t *barriers;
  uint32_t issued, taken;
};

/* Pages of a list that a warp is to read, looked up 32 at a time. */
struct page_list {
  const struct decode_page *from;
  int count, base;
  struct decode_page mine;
};
__device__ inline void list_start(page_list &list, const struct decode_page *from, int count, int lane) {
  list.from = from, list.count = count, list.base = 0;
  if (lane < count) list.mine = from[lane];
}
__device__ inline int list_unit(page_list &list, int i, int lane) {
  if (i >= list.base + 32) {
    list.base += 32;
    if (list.base + lane < list.count) list.mine = list.from[list.base + lane];
  }
  return __shfl_sync(~0u, list.mine.unit, i - list.base);
}

/* ---- coded pages ---- */

/* The gains of a page, one token after the other, into the orders that scores and sums want. Returns the largest gain of a value,
 * for forms whose gains may be anything. */
struct page_gains {
  float *keys;        /* [64][class] */
  float *key_zeros;   /* [64] s z; SCALE_ZERO only */
  __half *values;     /* [tile][q][tokens 2q, 2q + 1 | 8 + 2q, 8 + 2q + 1][class][2]; those of the latter over 16 */
  const float *table; /* 2^((i - 8)/4) */
};

__device__ inline float gain_of(const page_gains &to, int form, int groups, const uint16_t *meta, int token, int class_) {
  const int p = groups == GAIN_CLASSES ? class_ : class_ * groups / GAIN_CLASSES;
  if (form == OSCAR_ROW_LOG_GAINS) return to.table[meta[token] >> 4 * p & 15];
  return __half2float(__ushort_as_half(meta[(form == OSCAR_ROW_SCALE_ZERO ? 2 * p : p) * 64 + token]));
}

/* A lane has tokens 2 lane and 2 lane + 1. */
__device__ __forceinline__ void expand_key_gains(const arguments &a, const page_gains &to, const uint8_t *page, int lane) {
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

/* The same of log gains in four groups. */
__device__ __forceinline__ void expand_key_log_gains(const page_gains &to, const uint8_t *meta, int lane) {
  const uint32_t words = *(const uint32_t *)(meta + 4 * lane); /* of both tokens */
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float4 gains;
    gains.x = *(const float *)((const uint8_t *)to.table + (16 * i >= 2 ? words >> (16 * i - 2) & 60 : words << 2 & 60));
    gains.y = *(const float *)((const uint8_t *)to.table + (words >> (16 * i + 2) & 60));
    gains.z = *(const float *)((const uint8_t *)to.table + (words >> (16 * i + 6) & 60));
    gains.w = *(const float *)((const uint8_t *)to.table + (words >> (16 * i + 10) & 60));
    *(float4 *)(to.keys + 4 * (2 * lane + i)) = gains;
  }
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

__device__ inline float largest_of_warp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

/* Gains of values times 2^-exponent, where the exponent grows with the largest gain seen. */
__device__ inline void expand_value_gains(const arguments &a, const page_gains &to, const uint16_t *meta, int &exponent,
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
      to.values[((tile * 4 + q) * 2 + upper) * 2 * GAIN_CLASSES + p * 2 + i] = __float2half_rn(gains[i][p] * scale);
  }
}

/* The same of log gains in four groups, which need no exponent. */
__device__ __forceinline__ void expand_value_log_gains(const page_gains &to, const uint8_t *meta, int lane) {
  const uint32_t words = *(const uint32_t *)(meta + 4 * lane);
  const int upper = lane / 4 % 2;
  const uint2 a = log_gains_fp16(words, 4 * upper), b = log_gains_fp16(words >> 16, 4 * upper); /* classes 0, 1 and 2, 3 */
  *(uint4 *)((uint8_t *)to.values + ((lane / 8 * 4 + lane % 4) * 2 + upper) * 16) = make_uint4(
      __byte_perm(a.x, b.x, 0x5410), __byte_perm(a.x, b.x, 0x7632), __byte_perm(a.y, b.y, 0x5410), __byte_perm(a.y, b.y, 0x7632));
}

/* Operands of a tile's queries: in registers where the number of blocks is known, else in shared memory. */
template <int KEY_BLOCKS, int NT> struct query_operands {
  uint32_t words[NT][KEY_BLOCKS ? KEY_BLOCKS : 1];
  const uint32_t *shared; /* of this lane */
  __device__ __forceinline__ void load(const uint32_t *operands, int lane) {
    shared = operands + lane;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < KEY_BLOCKS; i++) words[n][i] = shared[(n * KEY_BLOCKS + i) * 32];
  }
  __device__ __forceinline__ uint32_t get(int blocks, int n, int i) const {
    return KEY_BLOCKS ? words[n][KEY_BLOCKS ? i : 0] : shared[(n * blocks + i) * 32];
  }
};

/* Sums of bytes of 16 tokens, by class: token g in [0] and [1], high and low, token g + 8 in [2] and [3]. */
template <int KEY_BLOCKS, int NT>
__device__ __forceinline__ void sum_keys(int some_blocks, const uint32_t *words, int tile,
                                         const query_operands<KEY_BLOCKS, NT> &operands, const int (&whole)[4], int lane,
                                         int (&sums)[NT][GAIN_CLASSES][4]) {
  const int blocks = KEY_BLOCKS ? KEY_BLOCKS : some_blocks, full = blocks / GAIN_CLASSES, over = blocks % GAIN_CLASSES;
  if (KEY_BLOCKS < 8) { /* else the first product brings it */
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int p = 0; p < GAIN_CLASSES; p++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[n][p][i] = WHOLE_BITS;
  }
#pragma unroll
  for (int pair = 0; pair < full / 2; pair++) {
    const uint4 w = *(const uint4 *)(words + pair * 512 + tile * 128 + lane * 4);
#pragma unroll
    for (int p = 0; p < GAIN_CLASSES; p++) {
      const uint32_t mask = 0x03030303u << 2 * p;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint32_t b0 = operands.get(blocks, n, pair * 8 + p * 2), b1 = operands.get(blocks, n, pair * 8 + p * 2 + 1);
        if (KEY_BLOCKS >= 8 && pair == 0)
          mma_bytes_from(sums[n][p], w.x & mask, w.y & mask, w.z & mask, w.w & mask, b0, b1, whole);
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
      for (int n = 0; n < NT; n++) mma_bytes_half(sums[n][p], w.x & mask, w.y & mask, operands.get(blocks, n, full / 2 * 8 + p));
    }
  }
  if (over >= 2) { /* one more block in classes 1 and 3, token g + 8 two bits below its place */
    const uint32_t w = words[full * 256 + lane * 4 + tile];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int p = 2 * i + 1;
      const uint32_t mask = 0x03030303u << 2 * p;
#pragma unroll
      for (int n = 0; n < NT; n++) mma_bytes_half(sums[n][p], w & mask, w << 2 & mask, operands.get(blocks, n, full * 4 + i));
    }
  }
  if (over % 2) { /* one more block in class 3 or 2, tokens of two tiles in a word */
    const uint32_t w = words[full * 256 + (over == 3 ? 128 : 0) + lane * 2 + tile / 2] >> tile % 2 * 4;
    if (over == 1) {
#pragma unroll
      for (int n = 0; n < NT; n++)
        mma_bytes_half(sums[n][3], w << 6 & 0xC0C0C0C0u, w << 4 & 0xC0C0C0C0u, operands.get(blocks, n, full * 4));
    } else {
#pragma unroll
      for (int n = 0; n < NT; n++)
        mma_bytes_half(sums[n][2], w << 4 & 0x30303030u, w << 2 & 0x30303030u, operands.get(blocks, n, full * 4 + 2));
    }
  }
}

/* What a lane's rows need to make scores of sums (struct row_constants). */
template <int NT> struct score_scales { float unit[NT][GAIN_CLASSES], high[NT][GAIN_CLASSES], low[NT][GAIN_CLASSES]; };

/* Scores of 16 tokens: token g in s[.][0], token g + 8 in s[.][1]. */
template <int KEY_BLOCKS, int NT>
__device__ __forceinline__ void score_tile(int blocks, const uint32_t *words, int tile,
                                           const query_operands<KEY_BLOCKS, NT> &operands, const int (&whole)[4],
                                           const score_scales<NT> &scales, const float *key_gains, int lane, float (&s)[NT][2]) {
  int sums[NT][GAIN_CLASSES][4];
  sum_keys<KEY_BLOCKS, NT>(blocks, words, tile, operands, whole, lane, sums);
  const float4 low = *(const float4 *)(key_gains + (tile * 16 + lane / 4) * 4);
  const float4 high = *(const float4 *)(key_gains + (tile * 16 + 8 + lane / 4) * 4);
  const float gains[2][GAIN_CLASSES] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int p = 0; p < GAIN_CLASSES; p++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float top = fmaf(__int_as_float(sums[n][p][2 * i]), scales.unit[n][p], scales.high[n][p]);
        const float rest = fmaf(__int_as_float(sums[n][p][2 * i + 1]), scales.unit[n][p], scales.low[n][p]);
        s[n][i] = fmaf(fmaf(top, 128, rest), gains[i][p], s[n][i]);
      }
}

/* What the turning mean adds to the scores of 16 tokens. `weights`: of this page and lane. STEPS 0: as many as there are. */
template <int STEPS, int NT>
__device__ __forceinline__ void score_curves(const uint8_t *curves, int some_steps, int tile, const uint32_t *weights, int lane,
                                             float (&s)[NT][2]) {
  const int steps = STEPS ? STEPS : some_steps;
  float sums[NT][4] = {};
#pragma unroll
  for (int k = 0; k < steps; k++) {
    const uint4 value = *(const uint4 *)(curves + ((k * 4 + tile) * 2 * 32 + lane) * 16);
    const uint4 rest = *(const uint4 *)(curves + (((k * 4 + tile) * 2 + 1) * 32 + lane) * 16);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint2 b = *(const uint2 *)(weights + (n * 32 * steps + k) * 2);
      mma_fp16(sums[n], value.x, value.y, value.z, value.w, b.x, b.y);
      mma_fp16(sums[n], rest.x, rest.y, rest.z, rest.w, b.x, b.y);
    }
  }
#pragma unroll
  for (int n = 0; n < NT; n++) {
    s[n][0] += sums[n][0] + sums[n][1];
    s[n][1] += sums[n][2] + sums[n][3];
  }
}

/* How (cos, sin) of the pairs become weights of the polynomials, for all rows of the tile: operand B, words of values and of what
 * they lost. By the whole block. */
template <int NT, int THREADS> __device__ inline void make_mixing(const arguments &a, const float2 *amplitudes, uint4 *mixing) {
  constexpr int TOGETHER = 4;
  const int pairs = a.rope.pairs, count = pairs / 8 * NT * 8 * 32;
  for (int first = threadIdx.x; first < count; first += THREADS * TOGETHER) {
    float2 ab[TOGETHER][2];
    float s[TOGETHER][2];
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      const int i = min(first + j * THREADS, count - 1), lane = i % 32, column = i / 32 % (NT * 8), k = i / 32 / (NT * 8);
#pragma unroll
      for (int reg = 0; reg < 2; reg++) {
        const int pair = 8 * k + 4 * reg + lane % 4;
        ab[j][reg] = __ldcg(amplitudes + column / 2 * pairs + pair);
        s[j][reg] = __ldg(a.rope.series + pair * 16 + column % 2 * 8 + lane / 4);
      }
    }
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      const int i = first + j * THREADS, odd = i / 32 % 2;
      if (i >= count) continue;
      uint32_t value[2], rest[2];
#pragma unroll
      for (int reg = 0; reg < 2; reg++) {
        const float c = s[j][reg] * (odd ? ab[j][reg].y : ab[j][reg].x), d = s[j][reg] * (odd ? -ab[j][reg].x : ab[j][reg].y);
        value[reg] = pack_half2(c, d);
        rest[reg] = rest_half2(c, d, value[reg]);
      }
      mixing[i] = make_uint4(value[0], value[1], rest[0], rest[1]);
    }
  }
}

/* The curves' weights on WAVE_PAGES pages, as operand B of score_curves: [page][n][lane][steps][2]. */
template <int STEPS, int NT>
__device__ inline void make_weights(const arguments &a, const float2 *amplitudes, const uint4 *mixing,
                                    const struct decode_page *pages, int count, uint32_t *weights, int lane) {
  const int g = lane / 4, q = lane % 4, steps = STEPS ? STEPS : a.rope.curves / 16, pairs = a.rope.pairs;
  const size_t number = (size_t)pages[min(g, count - 1)].number;
  const uint4 *angles = (const uint4 *)a.rope.angles + number * (pairs / 8) * 4 + q;
  uint32_t *mine = weights + g * NT * 32 * steps * 2 + q * steps * 2;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float sums[8][4] = {};
    for (int k = 0; k < pairs / 8; k++) {
      const uint4 w = angles[k * 4]; /* rows g + 8 of the operand are what rows g lost */
      const uint4 *b = mixing + ((k * NT + n) * 8) * 32 + lane;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const uint4 x = b[i * 32];
        mma_fp16(sums[i], w.x, w.y, w.z, w.w, x.x, x.y);
        mma_fp16(sums[i], w.x, w.y, w.z, w.w, x.z, x.w);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float low = sums[i][0] + sums[i][2], high = sums[i][1] + sums[i][3];
      const uint32_t value = pack_half2(low, high);
      uint32_t *to = mine + (n * 32 + i / 2 * 8) * steps * 2 + i % 2;
      to[0] = value;
      to[4 * steps * 2] = rest_half2(low, high, value);
    }
  }
  const float2 *turns = (const float2 *)a.rope.fast_angles + number * a.rope.fast;
  for (int k = 1; k < steps; k++)
#pragma unroll
    for (int reg = 0; reg < 2; reg++) {
      float2 turn[2];
      int pair[2];
      bool cosine[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int curve = 16 * (k - 1) + 8 * reg + 2 * q + i;
        cosine[i] = curve < a.rope.fast;
        pair[i] = cosine[i] ? curve : curve - a.rope.fast;
        turn[i] = pair[i] < a.rope.fast ? turns[pair[i]] : make_float2(0, 0);
        pair[i] = min(pair[i], pairs - 1);
      }
#pragma unroll
      for (int row = 0; row < 4 * NT; row++) {
        float w[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float2 ab = __ldcg(amplitudes + row * pairs + pair[i]);
          w[i] = cosine[i] ? ab.x * turn[i].x + ab.y * turn[i].y : ab.y * turn[i].x - ab.x * turn[i].y;
        }
        const uint32_t value = pack_half2(w[0], w[1]);
        uint32_t *to = mine + ((row / 4 * 32 + row % 4 * 8) * steps + k) * 2 + reg;
        to[0] = value;
        to[4 * steps * 2] = rest_half2(w[0], w[1], value);
      }
    }
}

/* The new maxima of the rows, and what all sums have to be multiplied with; false: nothing changes. The same in the whole warp.
 */
template <int NT> __device__ inline bool raise_maxima(const float (&largest)[NT], softmax<NT> &state, float (&factor)[NT]) {
  bool above = false;
  float top[NT];
#pragma unroll
  for (int n = 0; n < NT; n++) {
    top[n] = largest[n];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) top[n] = fmaxf(top[n], __shfl_xor_sync(~0u, top[n], step));
    above = above || top[n] > state.m[n];
  }
  if (!__any_sync(~0u, above)) return false;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float m = fmaxf(state.m[n], top[n]);
    factor[n] = m > NONE ? exp2_fast(state.m[n] - m) : 1; /* -inf is never subtracted from -inf */
    state.m[n] = m;
    state.l[n] *= factor[n];
  }
  return true;
}

/* acc [block]: rows g and g + 8 of a block of crumbs, in units of 2^-24 and 2^-22. middle: row p is the sum of class p. */
template <int BLOCKS, bool ANY, int NT>
__device__ inline void sum_values(const arguments &a, const uint32_t *words, const __half *value_gains, const uint32_t (&p)[4][2],
                                  int lane, float (&acc)[BLOCKS][4], float (&middle)[4]) {
  const int g = lane / 4, q = lane % 4, blocks = ANY ? a.value_crumbs / 16 : BLOCKS;
  constexpr uint32_t ONES = 0x3C003C00, SIXTEENS = 0x4C004C00;
  uint2 w[ANY ? 1 : BLOCKS];
  if (!ANY)
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) w[b] = *(const uint2 *)(words + (b * 32 + lane) * 2);
#pragma unroll
  for (int tile = 0; tile < 4; tile++) {
    uint32_t weighted[GAIN_CLASSES][2];
    const uint4 *gains = (const uint4 *)(value_gains + (tile * 4 + q) * 16);
    const uint4 one = gains[0], two = gains[1];
    weighted[0][0] = multiply_half2(p[tile][0], one.x), weighted[0][1] = multiply_half2(p[tile][1], two.x);
    weighted[1][0] = multiply_half2(p[tile][0], one.y), weighted[1][1] = multiply_half2(p[tile][1], two.y);
    weighted[2][0] = multiply_half2(p[tile][0], one.z), weighted[2][1] = multiply_half2(p[tile][1], two.z);
    weighted[3][0] = multiply_half2(p[tile][0], one.w), weighted[3][1] = multiply_half2(p[tile][1], two.w);
#pragma unroll
    for (int c = 0; c < GAIN_CLASSES; c++)
      mma_fp16(middle, g == c ? ONES : 0, 0, g == c ? SIXTEENS : 0, 0, weighted[c][0], weighted[c][1]);
#pragma unroll
    for (int c = 0; c < GAIN_CLASSES; c++) {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        if (!ANY && (b < class_begin(BLOCKS, c) || b >= class_begin(BLOCKS, c + 1))) continue;
        if (ANY && (b < class_begin(blocks, c) || b >= class_begin(blocks, c + 1))) continue;
        uint32_t x;
        if (ANY)
          x = words[(b * 32 + lane) * 2 + tile / 2];
        else
          x = tile / 2 ? w[b].y : w[b].x;
        if (tile % 2) x >>= 8;
        mma_fp16(acc[b], x & 0x00030003u, x & 0x000C000Cu, x & 0x00300030u, x & 0x00C000C0u, weighted[c][0], weighted[c][1]);
      }
    }
  }
}

/* ---- leaving a tile ---- */

/* Where warps of a block put their sums: [row][stride], then (m, l) of every row. */
struct warp_sums {
  float *sums;
  float2 *states;
};
template <int NT> __device__ inline warp_sums sums_of_warp(const arguments &a, float *shared, int warp) {
  const int stride = sums_stride(a.head_dim, a.value_crumbs);
  float *at = shared + warp * 4 * NT * (stride + 2);
  return {at, (float2 *)(at + 4 * NT * stride)};
}

/* A part is [DECODE_ROWS] of (m, l), then [DECODE_ROWS][stride]. */
__host__ __device__ inline size_t part_floats(const arguments &a) {
  return (size_t)DECODE_ROWS * (2 + sums_stride(a.head_dim, a.value_crumbs));
}

/* Maxima are stored less `shift`: what the probabilities were made larger by. */
template <int NT> __device__ inline void store_states(softmax<NT> &state, const warp_sums &to, int lane, float shift) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) state.l[n] += __shfl_xor_sync(~0u, state.l[n], step);
    if (lane < 4) to.states[n * 4 + lane] = make_float2(state.m[n] - shift, state.l[n]);
  }
}

/* The sums of all warps, put together, into a part. By the whole block; `width` sums of each row count. */
template <int NT, int WARPS> __device__ inline void store_part(const arguments &a, float *shared, int width, float *part) {
  const int stride = sums_stride(a.head_dim, a.value_crumbs);
  __syncthreads();
  for (int i = threadIdx.x; i < 4 * NT * width; i += WARPS * 32) {
    const int row = i / width, column = i % width;
    float m = NONE, sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) m = fmaxf(m, sums_of_warp<NT>(a, shared, w).states[row].x);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const warp_sums from = sums_of_warp<NT>(a, shared, w);
      if (from.states[row].x > NONE) sum += from.sums[row * stride + column] * exp2_fast(from.states[row].x - m);
    }
    part[2 * DECODE_ROWS + row * stride + column] = sum;
  }
  if (threadIdx.x < 4 * NT) {
    const int row = threadIdx.x;
    float m = NONE, l = 0;
    for (int w = 0; w < WARPS; w++) m = fmaxf(m, sums_of_warp<NT>(a, shared, w).states[row].x);
    for (int w = 0; w < WARPS; w++) {
      const float2 from = sums_of_warp<NT>(a, shared, w).states[row];
      if (from.x > NONE) l += from.y * exp2_fast(from.x - m);
    }
    ((float2 *)part)[row] = make_float2(m, l);
  }
  __syncthreads();
}

/* The parts of one kind of a (tile, KV head): from block `first` to block `last`, `slot` being that of the line's item. */
struct part_range {
  int slot, first, last;
};

/* sums [rows][width] (width a multiple of 4) of the parts at `from`, each times its factor [part][ROWS]. */
template <int THREADS, int ROWS>
__device__ inline void add_parts(const float *from, size_t floats, int parts, const float *factors, int rows, int width,
                                 int stride, float *sums) {
  constexpr int TOGETHER = 8; /* loads under way at once */
  for (int i = threadIdx.x; i < rows * width / 4; i += THREADS) {
    const int row = i / (width / 4), column = i % (width / 4) * 4;
    const float *at = from + 2 * DECODE_ROWS + row * stride + column;
    float4 sum = {};
    for (int first = 0; first < parts; first += TOGETHER) {
      float4 x[TOGETHER];
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) x[k] = __ldcg((const float4 *)(at + (size_t)min(first + k, parts - 1) * floats));
#pragma unroll
      for (int k = 0; k < TOGETHER; k++) {
        const float f = first + k < parts ? factors[(first + k) * ROWS + row] : 0;
        if (f == 0) continue; /* a part that saw nothing holds anything */
        sum.x += f * x[k].x, sum.y += f * x[k].y, sum.z += f * x[k].z, sum.w += f * x[k].w;
      }
    }
    *(float4 *)(sums + row * width + column) = sum;
  }
}

/* What the whole tile comes to: by the block that came last. */
template <int WARPS, int ROWS>
__device__ inline void finish_tile(const arguments &a, const struct decode_tile &tile, int head, const part_range &exact,
                                   const part_range &coded, float *shared) {
  constexpr int THREADS = WARPS * 32;
  const int rows = tile.rows, d = a.head_dim, crumbs = a.value_crumbs, stride = sums_stride(d, crumbs);
  const int exact_parts = exact.last - exact.first + 1, coded_parts = max(coded.last - coded.first + 1, 0);
  const int coded_width = crumbs + GAIN_CLASSES, width = coded_parts ? crumbs + a.value_groups + 1 : 0;
  const size_t floats = part_floats(a);
  const float *exact_from = a.parts + (size_t)(exact.slot + exact.first) * floats;
  const float *coded_from = a.parts + (size_t)(coded.slot + coded.first) * floats;
  float *total = shared, *coded_total = total + DECODE_ROWS, *factors = coded_total + DECODE_ROWS; /* [parts][DECODE_ROWS] */
  float *exact_sums = factors + ROWS * FINISH_PARTS, *coded_sums = exact_sums + ROWS * d;          /* [rows][width] */
  float *products = coded_sums + ROWS * coded_width;                                               /* [splits][rows][d] */
  for (int row = threadIdx.x / 32; row < rows; row += WARPS) {                                     /* a warp for each row */
    const int lane = threadIdx.x % 32, parts = exact_parts + coded_parts;
    float m = NONE, l[2] = {0, 0};
    for (int i = lane; i < parts; i += 32)
      m = fmaxf(m, __ldcg((i < exact_parts ? exact_from + i * floats : coded_from + (i - exact_parts) * floats) + 2 * row));
    m = largest_of_warp(m);
    for (int i = lane; i < parts; i += 32) {
      const float2 from =
          __ldcg((const float2 *)(i < exact_parts ? exact_from + i * floats : coded_from + (i - exact_parts) * floats) + row);
      const float factor = from.x > NONE ? exp2_fast(from.x - m) : 0;
      factors[i * ROWS + row] = factor;
      if (factor > 0) l[i >= exact_parts] += from.y * factor;
    }
#pragma unroll
    for (int kind = 0; kind < 2; kind++)
#pragma unroll
      for (int step = 16; step > 0; step /= 2) l[kind] += __shfl_xor_sync(~0u, l[kind], step);
    if (lane == 0) total[row] = l[0] + l[1], coded_total[row] = l[1];
  }
  __syncthreads();
  add_parts<THREADS, ROWS>(exact_from, floats, exact_parts, factors, rows, d, stride, exact_sums);
  if (coded_parts)
    add_parts<THREADS, ROWS>(coded_from, floats, coded_parts, factors + exact_parts * ROWS, rows, coded_width, stride,
                             coded_sums);
  __syncthreads();
  /* a thread has four columns and every splits-th row of the map */
  constexpr int TOGETHER = 12;
  const int quads = d / 4, splits = finish_splits(d, THREADS);
  for (int of = threadIdx.x; of < splits * quads; of += THREADS) {
    const int split = of / quads, column = of % quads * 4;
    const float *map = a.value_map + (size_t)head * a.value_rows * d + column;
    float4 sum[ROWS] = {};
    for (int first = split; first < width; first += splits * TOGETHER) {
      float4 m[TOGETHER];
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) m[i] = __ldg((const float4 *)(map + (size_t)min(first + i * splits, width - 1) * d));
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) {
        const int k = first + i * splits;
        if (k >= width) continue;
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
          if (row >= rows) continue;
          /* crumbs, then minus the sums of gains, then the sum of probabilities */
          const float x = k == width - 1 ? coded_total[row]
                          : k < crumbs   ? coded_sums[row * coded_width + k]
                                         : -coded_sums[row * coded_width + k];
          sum[row].x += x * m[i].x, sum[row].y += x * m[i].y, sum[row].z += x * m[i].z, sum[row].w += x * m[i].w;
        }
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++)
      if (row < rows) *(float4 *)(products + (split * rows + row) * d + column) = sum[row];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * d; i += THREADS) {
    const int row = i / d, column = i % d;
    float sum = exact_sums[i];
    for (int k = 0; k < splits; k++) sum += products[(k * rows + row) * d + column];
    a.out[row_offset(tile, row, a.kv_heads, a.group, head, d) + column] = sum / total[row];
  }
  __syncthreads();
}

/* ---- exact pages ---- */

/* A stretch of tiles of 16 tokens, `begin` to `end` - 1, shared out to the warps. Scores and sums as for codes, with BF16
 * operands from global memory: a lane's 16 bytes are eight channels of a token, in whatever order of inputs both operands agree
 * on. Queries and probabilities come as two BF16 numbers each, in neighbouring columns. */
template <int D, int NT, int WARPS>
__device__ inline void read_exact(const arguments &a, const struct decode_tile &tile, int head, int begin, int end,
                                  float *shared) {
  constexpr int STEPS = D / 32, CHUNKS = (D + 63) / 64;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int count = end - begin, from = begin + count * warp / WARPS, to = begin + count * (warp + 1) / WARPS;
  softmax<NT> state;
  float acc[NT][CHUNKS * 4][4] = {};
  int64_t seen[NT]; /* the last position that this lane's row sees */
#pragma unroll
  for (int n = 0; n < NT; n++) {
    state.m[n] = NONE, state.l[n] = 0;
    const int row = n * 4 + q;
    seen[n] = row < tile.rows ? tile.position + (tile.first_row + row) / a.group : -1;
  }
  const int64_t last = tile.position + (tile.first_row + tile.rows - 1) / a.group;
  if (from < to) {
    uint32_t operand[NT][STEPS][4];
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const int row = n * 4 + g / 2;
      const float *mine = a.q + row_offset(tile, row < tile.rows ? row : 0, a.kv_heads, a.group, head, D);
      const float scale = row < tile.rows ? a.scale : 0;
#pragma unroll
      for (int j = 0; j < STEPS; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float2 x = *(const float2 *)(mine + 32 * j + 8 * q + 2 * i);
          uint32_t packed = pack_bf162(x.x * scale, x.y * scale);
          if (g % 2) packed = pack_bf162(x.x * scale - low_bf16(packed), x.y * scale - high_bf16(packed));
          operand[n][j][i] = packed;
        }
    }
    for (int i = from; i < to; i++) {
      const struct decode_page page = a.pages[tile.exact_first + i / 4];
      const uint16_t *keys =
          (const uint16_t *)(a.memory + (size_t)page.unit * a.unit_bytes) + (size_t)head * 2 * 64 * D + i % 4 * 16 * D;
      const uint16_t *values = keys + 64 * D;
      const int64_t position = (int64_t)page.number * 64 + i % 4 * 16;
      float s[NT][4] = {};
      uint4 v[CHUNKS][4];
      {
        uint4 low[STEPS], high[STEPS];
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
          low[j] = *(const uint4 *)(keys + g * D + 32 * j + 8 * q);
          high[j] = *(const uint4 *)(keys + (g + 8) * D + 32 * j + 8 * q);
        }
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int token = 2 * q + j % 2 + j / 2 * 8, channel = 8 * (g + 8 * chunk);
            v[chunk][j] = make_uint4(0, 0, 0, 0); /* what lies behind the last position may be anything */
            if (position + token <= last && (D % 64 == 0 || channel < D))
              v[chunk][j] = *(const uint4 *)(values + token * D + channel);
          }
#pragma unroll
        for (int j = 0; j < STEPS; j++)
#pragma unroll
          for (int n = 0; n < NT; n++) {
            mma_bf16(s[n], low[j].x, high[j].x, low[j].y, high[j].y, operand[n][j][0], operand[n][j][1]);
            mma_bf16(s[n], low[j].z, high[j].z, low[j].w, high[j].w, operand[n][j][2], operand[n][j][3]);
          }
      }
      float score[NT][2], largest[NT], factor[NT];
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int64_t at = position + g + 8 * j;
          const bool visible = at <= seen[n] && (a.window == 0 || at > seen[n] - a.window);
          score[n][j] = visible ? s[n][2 * j] + s[n][2 * j + 1] : NONE;
        }
#pragma unroll
      for (int n = 0; n < NT; n++) largest[n] = fmaxf(score[n][0], score[n][1]);
      if (raise_maxima<NT>(largest, state, factor)) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int b = 0; b < CHUNKS * 4; b++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[n][b][j] *= factor[n];
      }
      uint32_t p[NT][2];
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float x = score[n][j] > NONE ? exp2_fast(score[n][j] - state.m[n]) : 0;
          state.l[n] += x;
          const uint32_t rounded = pack_bf162(x, 0);
          p[n][j] = transpose_8x8(pack_bf162(x, x - low_bf16(rounded)));
        }
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const uint32_t *v0 = &v[chunk][0].x, *v1 = &v[chunk][1].x, *v2 = &v[chunk][2].x, *v3 = &v[chunk][3].x;
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
          for (int n = 0; n < NT; n++)
            mma_bf16(acc[n][chunk * 4 + b], __byte_perm(v0[b], v1[b], 0x5410), __byte_perm(v0[b], v1[b], 0x7632),
                     __byte_perm(v2[b], v3[b], 0x5410), __byte_perm(v2[b], v3[b], 0x7632), p[n][0], p[n][1]);
      }
    }
  }
  const warp_sums sums = sums_of_warp<NT>(a, shared, warp);
  store_states<NT>(state, sums, lane, 0);
  const int stride = sums_stride(D, a.value_crumbs);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const int channel = 8 * (g + 8 * chunk);
      if (D % 64 != 0 && channel >= D) continue;
      float *to = sums.sums + (n * 4 + q) * stride + channel;
#pragma unroll
      for (int b = 0; b < 4; b++)
        *(float2 *)(to + 2 * b) =
            make_float2(acc[n][chunk * 4 + b][0] + acc[n][chunk * 4 + b][1], acc[n][chunk * 4 + b][2] + acc[n][chunk * 4 + b][3]);
    }
}

/* ---- coded pages, a stretch of a tile's list ---- */

/* What is known when a kernel is compiled. */
template <int D_, int KEY_BLOCKS_, int VALUE_BLOCKS_, int NT_, bool ANY_, bool ANY_VALUES_, bool WAVES_> struct traits {
  static constexpr int D = D_, KEY_BLOCKS = KEY_BLOCKS_, VALUE_BLOCKS = VALUE_BLOCKS_, NT = NT_;
  static constexpr bool ANY = ANY_;               /* any number of blocks of keys, any form, a window, or waves */
  static constexpr bool ANY_VALUES = ANY_VALUES_; /* any number of blocks of values, up to VALUE_BLOCKS */
  static constexpr bool WAVES = WAVES_;           /* a mean turns; ANY: perhaps */
  static constexpr int WARPS = warps_of(VALUE_BLOCKS_, NT_);
};

/* The pages of this warp, begun while the block is busy with something else. */
struct coded_stretch {
  const struct decode_page *pages;
  int count, next;
  page_list list;
};

template <class T>
__device__ inline coded_stretch begin_coded(const arguments &a, const struct decode_tile &tile, int head, int begin, int end,
                                            ring &ring) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = end - begin;
  coded_stretch c;
  const int from = begin + count * warp / T::WARPS;
  c.count = begin + count * (warp + 1) / T::WARPS - from;
  c.pages = a.pages + tile.coded_first + from;
  c.next = 0;
  list_start(c.list, c.pages, c.count, lane);
  const uint8_t *base = a.memory + (size_t)head * a.head_bytes;
#pragma unroll
  for (int i = 0; i < STAGES; i++) {
    if (c.next < c.count) {
      const int unit = list_unit(c.list, c.next, lane), slot = ring.issued % STAGES;
      copy_page(ring.pages + slot * a.page_bytes, base + (size_t)unit * a.unit_bytes, a.page_bytes, ring.barriers + slot, lane);
      ring.issued++, c.next++;
    } else {
      copy_none();
    }
  }
  return c;
}

template <class T>
__device__ inline void read_coded(const arguments &a, const struct decode_tile &tile, int index, int head, coded_stretch &c,
                                  uint8_t *memory, const shared_layout &layout, ring &ring) {
  constexpr int NT = T::NT, BLOCKS = T::VALUE_BLOCKS, WARPS = T::WARPS;
  constexpr bool ANY = T::ANY;
  constexpr int STEPS = ANY ? 0 : USUAL_STEPS; /* 0: as many as there are */
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, mine = c.count;
  const uint8_t *base = a.memory + (size_t)head * a.head_bytes;
  const bool waves = ANY ? a.waves : T::WAVES, log_gains = !ANY && a.key_form == OSCAR_ROW_LOG_GAINS;

  /* what belongs to the queries */
  const int blocks = ANY ? a.key_crumbs / 16 : T::KEY_BLOCKS, pairs = waves ? a.rope.pairs : 0,
            steps = waves ? a.rope.curves / 16 : 0;
  const prepared_layout prepared = prepared_layout_of(blocks, pairs);
  const uint8_t *from_prepared = a.prepared + ((size_t)index * a.kv_heads + head) * prepared.bytes;
  uint32_t *operand_words = (uint32_t *)(memory + layout.operands);
  struct row_constants *constants = (struct row_constants *)(memory + layout.constants);
  const float2 *amplitudes = (const float2 *)(from_prepared + prepared.amplitudes);
  uint4 *mixing = (uint4 *)(memory + layout.mixing);
  for (int i = threadIdx.x; i < NT * blocks * 8; i += WARPS * 32) ((uint4 *)operand_words)[i] = ((const uint4 *)from_prepared)[i];
  if (threadIdx.x < DECODE_ROWS * sizeof(struct row_constants) / 16)
    ((uint4 *)constants)[threadIdx.x] = ((const uint4 *)(from_prepared + prepared.constants))[threadIdx.x];
  if (waves) make_mixing<NT, WARPS * 32>(a, amplitudes, mixing);
  __syncthreads();

  query_operands<T::KEY_BLOCKS, NT> operands;
  operands.load(operand_words, lane);
  const int whole[4] = {WHOLE_BITS, WHOLE_BITS, WHOLE_BITS, WHOLE_BITS};
  score_scales<NT> scales;
  float mean[NT], zero[NT];
  softmax<NT> state;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const struct row_constants &row = constants[n * 4 + q];
#pragma unroll
    for (int p = 0; p < GAIN_CLASSES; p++)
      scales.unit[n][p] = row.unit[p], scales.high[n][p] = row.high_offset[p], scales.low[n][p] = row.low_offset[p];
    mean[n] = row.mean, zero[n] = row.zero;
    state.m[n] = NONE, state.l[n] = 0;
  }
  float acc[BLOCKS][4] = {}, middle[4] = {}, zeros[NT] = {};
  int exponent = a.value_form == OSCAR_ROW_LOG_GAINS ? 0 : -126;
  const page_gains gains = {(float *)(memory + layout.key_gains) + warp * 320,
                            (float *)(memory + layout.key_gains) + warp * 320 + 256,
                            (__half *)(memory + layout.value_gains) + warp * 256, (const float *)(memory + layout.log_gains)};
  const uint8_t *curves = memory + layout.curves;
  uint32_t *weights = (uint32_t *)(memory + layout.weights) + warp * WAVE_PAGES * NT * 32 * steps * 2;
  const int64_t oldest = ANY && a.window ? tile.position + tile.first_row / a.group - a.window + 1 : 0; /* that any row sees */

#pragma unroll 1
  for (int i = 0; i < mine; i++) {
    if (waves && i % WAVE_PAGES == 0) {
      __syncwarp();
      make_weights<STEPS, NT>(a, amplitudes, mixing, c.pages + i, min(WAVE_PAGES, mine - i), weights, lane);
      __syncwarp();
    }
    const int slot = ring.taken % STAGES;
    copy_wait<STAGES - 1>(ring.barriers + slot, ring.taken / STAGES & 1);
    const uint8_t *page = ring.pages + slot * a.page_bytes;
    const int value_offset = ANY ? a.value_offset : 256 * T::KEY_BLOCKS + 128;
    const uint16_t *value_meta = (const uint16_t *)(page + value_offset + (ANY ? 16 * a.value_crumbs : 256 * BLOCKS));
    const int before = exponent;
    if (log_gains) {
      expand_key_log_gains(gains, page + 256 * T::KEY_BLOCKS, lane);
      expand_value_log_gains(gains, (const uint8_t *)value_meta, lane);
    } else {
      expand_key_gains(a, gains, page, lane);
      expand_value_gains(a, gains, value_meta, exponent, lane);
    }
    __syncwarp();
    if (exponent != before) {
      const float factor = ldexpf(1, max(before - exponent, -126));
#pragma unroll
      for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[b][j] *= factor;
#pragma unroll
      for (int j = 0; j < 4; j++) middle[j] *= factor;
    }

    float s[4][NT][2], largest[NT];
#pragma unroll
    for (int t = 0; t < 4; t++) {
#pragma unroll
      for (int n = 0; n < NT; n++) s[t][n][0] = s[t][n][1] = mean[n];
      score_tile<T::KEY_BLOCKS, NT>(blocks, (const uint32_t *)page, t, operands, whole, scales, gains.keys, lane, s[t]);
      if (waves) score_curves<STEPS, NT>(curves, steps, t, weights + (i % WAVE_PAGES * NT * 32 + lane) * steps * 2, lane, s[t]);
      if (ANY && a.key_form == OSCAR_ROW_SCALE_ZERO)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) s[t][n][j] -= gains.key_zeros[t * 16 + g + 8 * j] * zero[n];
    }
    if (ANY && a.window) {
      const int64_t first = (int64_t)c.pages[i].number * 64;
      if (first < oldest + tile.rows)
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
          for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
              const int64_t seen = tile.position + (tile.first_row + n * 4 + q) / a.group;
              if (first + t * 16 + g + 8 * j <= seen - a.window) s[t][n][j] = NONE;
            }
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      largest[n] = NONE;
#pragma unroll
      for (int t = 0; t < 4; t++) largest[n] = fmaxf(largest[n], fmaxf(s[t][n][0], s[t][n][1]));
    }
    float factor[NT];
    if (raise_maxima<NT>(largest, state, factor)) {
      const float other = factor[NT - 1];
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) acc[b][0] *= factor[0], acc[b][1] *= other, acc[b][2] *= factor[0], acc[b][3] *= other;
      middle[0] *= factor[0], middle[1] *= other;
#pragma unroll
      for (int n = 0; n < NT; n++) zeros[n] *= factor[n];
    }
    uint32_t p[4][2];
    float shift[NT]; /* without a maximum all is masked, and exp2(-inf - 0) is 0 */
#pragma unroll
    for (int n = 0; n < NT; n++) shift[n] = !ANY || state.m[n] > NONE ? PROBABILITY_SHIFT - state.m[n] : 0;
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float x[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < NT; n++) {
          x[n] = exp2_fast(s[t][n][j] + shift[n]);
          state.l[n] += x[n];
        }
        if (ANY && a.value_form == OSCAR_ROW_SCALE_ZERO) {
          const int token = t * 16 + g + 8 * j;
          const float sz =
              __half2float(__ushort_as_half(value_meta[token])) * __half2float(__ushort_as_half(value_meta[64 + token]));
#pragma unroll
          for (int n = 0; n < NT; n++) zeros[n] = fmaf(x[n], sz, zeros[n]);
        }
        p[t][j] = transpose_8x8(pack_half2(x[0], x[1]));
      }
    sum_values<BLOCKS, T::ANY_VALUES, NT>(a, (const uint32_t *)(page + value_offset), gains.values, p, lane, acc, middle);
    __syncwarp();
    ring.taken++;
    if (c.next < mine) {
      const int unit_next = list_unit(c.list, c.next, lane), slot_next = ring.issued % STAGES;
      copy_page(ring.pages + slot_next * a.page_bytes, base + (size_t)unit_next * a.unit_bytes, a.page_bytes,
                ring.barriers + slot_next, lane);
      ring.issued++, c.next++;
    } else {
      copy_none();
    }
  }
  if (waves) __syncthreads(); /* sums and weights share memory */
  float *shared = (float *)(memory + layout.sums);
  const warp_sums sums = sums_of_warp<NT>(a, shared, warp);
  store_states<NT>(state, sums, lane, PROBABILITY_SHIFT);
  const int stride = sums_stride(a.head_dim, a.value_crumbs);
  const float low = ldexpf(1, 24 + exponent), high = ldexpf(1, 22 + exponent), one = ldexpf(1, exponent);
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
    if (T::ANY_VALUES && b >= a.value_crumbs / 16) continue;
    float *to = sums.sums + q * stride + b * 16 + g;
    to[0] = acc[b][0] * low;
    to[8] = acc[b][2] * high;
    if (NT == 2) to[4 * stride] = acc[b][1] * low, to[4 * stride + 8] = acc[b][3] * high;
  }
  /* the sum of probabilities times gains of every group: that of any of its classes */
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float *to = sums.sums + (n * 4 + q) * stride + a.value_crumbs;
    if (ANY && a.value_form == OSCAR_ROW_SCALE_ZERO) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) zeros[n] += __shfl_xor_sync(~0u, zeros[n], step);
      if (g < GAIN_CLASSES) to[g] = g == 0 ? zeros[n] : 0;
    } else {
      float x = middle[n] * one; /* of class g, where g < 4 */
      float group = 0;
#pragma unroll
      for (int p = 0; p < GAIN_CLASSES; p++) {
        const float of_class = __shfl_sync(~0u, x, 4 * p + q);
        if ((a.value_groups == GAIN_CLASSES ? p : p * a.value_groups / GAIN_CLASSES) == g) group = of_class;
      }
      if (g < GAIN_CLASSES) to[g] = group;
    }
  }
}

/* ---- the line of work ---- */

template <class T> __global__ void __launch_bounds__(T::WARPS * 32, 1) kernel(const __grid_constant__ arguments a) {
  constexpr int WARPS = T::WARPS, NT = T::NT;
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ int came_last;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const shared_layout layout = shared_layout_of(a, WARPS, NT);
  ring ring = {memory + warp * STAGES * a.page_bytes, (uint64_t *)(memory + layout.barriers) + warp * STAGES, 0, 0};
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < STAGES; i++) copies_init(ring.barriers + i);
  copies_visible();
  __syncwarp();
  if (threadIdx.x < 16) ((float *)(memory + layout.log_gains))[threadIdx.x] = exp2f(((int)threadIdx.x - 8) * 0.25f);
  if (a.waves)
    for (int i = threadIdx.x; i < a.rope.curves / 16 * 256; i += WARPS * 32)
      ((uint4 *)(memory + layout.curves))[i] = ((const uint4 *)a.rope.curve_words)[i];
  float *shared = (float *)(memory + layout.sums);

  const int units = a.total_units,
            blocks = min((int)gridDim.x, units); /* each has at least one unit, or parts would be missing */
  if ((int)blockIdx.x >= blocks) return;
  int unit = (int)((long long)units * blockIdx.x / blocks);
  const int end = (int)((long long)units * (blockIdx.x + 1) / blocks);
  while (unit < end) {
    int low = 0, high = a.tile_count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (a.tiles[middle].begin <= unit)
        low = middle;
      else
        high = middle - 1;
    }
    const struct decode_tile tile = a.tiles[low];
    const int head = (unit - tile.begin) / tile.units, item = low * a.kv_heads + head;
    const int begin = tile.begin + head * tile.units, exact_units = EXACT_WEIGHT * tile.exact_tiles;
    const int stop = min(end, begin + tile.units), first = unit - begin, last = stop - begin;
    const bool coded_here = last > exact_units;
    coded_stretch stretch;
    if (coded_here) {
      stretch = begin_coded<T>(a, tile, head, max(first, exact_units) - exact_units, last - exact_units, ring);
      if (threadIdx.x == 0) prefetch_bulk(a.value_map + (size_t)head * a.value_rows * T::D, (uint32_t)(a.value_rows * T::D * 4));
    }
    if (first < exact_units) {
      const int to = min(last, exact_units);
      read_exact<T::D, NT, WARPS>(a, tile, head, (first + EXACT_WEIGHT - 1) / EXACT_WEIGHT,
                                  (to + EXACT_WEIGHT - 1) / EXACT_WEIGHT, shared);
      store_part<NT, WARPS>(a, shared, T::D, a.parts + (size_t)(2 * item + blockIdx.x) * part_floats(a));
    }
    if (coded_here) {
      read_coded<T>(a, tile, low, head, stretch, memory, layout, ring);
      store_part<NT, WARPS>(a, shared, a.value_crumbs + GAIN_CLASSES,
                            a.parts + (size_t)(2 * item + 1 + blockIdx.x) * part_floats(a));
    }
    part_range exact = {2 * item, block_of_unit(begin, units, blocks), -1}, coded = {2 * item + 1, 0, -1};
    if (exact_units > 0) exact.last = block_of_unit(begin + exact_units - 1, units, blocks);
    if (tile.units > exact_units) {
      coded.first = block_of_unit(begin + exact_units, units, blocks);
      coded.last = block_of_unit(begin + tile.units - 1, units, blocks);
    }
    const int pieces = block_of_unit(begin + tile.units - 1, units, blocks) - block_of_unit(begin, units, blocks) + 1;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      came_last = atomicAdd(a.done + item, 1u) == (unsigned)(pieces - 1);
      if (came_last) a.done[item] = 0;
    }
    __syncthreads();
    if (came_last) {
      __threadfence();
      finish_tile<WARPS, 4 * NT>(a, tile, head, exact, coded, shared);
    }
    unit = stop;
  }
}

} // namespace decode

#endif
