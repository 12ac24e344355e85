/*
 * attention/cuda/decode/page_gains.cuh - the gains of a page, from one token after the other into the orders that scores and sums
 * want. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_PAGE_GAINS_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_PAGE_GAINS_CUH

#include "attention/cuda/decode/arguments.cuh"

namespace decode {

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

/* Log gains of a page, as half_gain: factors in the low halves of words. */
constexpr int HALF_GAIN_TABLE_BYTES = GAIN_CLASSES * 64;
/* [class][k + 8], for crumbs where those of a class are. */
__device__ inline void make_half_gains(uint32_t *table) {
  if (threadIdx.x >= GAIN_CLASSES * 16) return;
  const half_gain gain = half_gain_of(threadIdx.x % 16 - 8, threadIdx.x / 16 * 2);
  table[threadIdx.x] = pack_half2(gain.factor, gain.offset);
}
/* Of tokens lane and lane + 32, to the place of page_gains.keys. */
struct key_half_gains : key_log_gains {
  __device__ __forceinline__ void store(const page_gains &to, const uint8_t *table, int lane) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const auto of = [&](int class_, uint32_t four_times) {
        return *(const uint32_t *)(table + class_ * 64 + (four_times & 0x3C));
      };
      *(uint4 *)(to.keys + 4 * (lane + 32 * i)) =
          make_uint4(of(0, words[i] << 2), of(1, words[i] >> 2), of(2, words[i] >> 6), of(3, words[i] >> 10));
    }
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

/* What multiplies probabilities besides gains, in the form of page_gains.values: ones, where lanes of rows 4 to 7 of the sums of
 * gains of FOUR_LOG_GAINS sum up the probabilities themselves; and zeros for half of the tokens. */
constexpr int GAIN_HALF_BYTES = 256, CONSTANT_GAINS_BYTES = 3 * GAIN_HALF_BYTES;
__device__ inline void store_constant_gains(uint8_t *to) {
  for (int i = threadIdx.x; i < CONSTANT_GAINS_BYTES / 4; i += blockDim.x)
    ((uint32_t *)to)[i] = i < GAIN_HALF_BYTES / 4 ? 0x3C003C00 : i < 2 * GAIN_HALF_BYTES / 4 ? 0x2C002C00 : 0;
}

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

} // namespace decode

#endif
