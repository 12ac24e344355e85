/*
 * quant/cuda/encode_row.h - the arithmetic of encoding, row by row, for the GPU and for tests on the CPU. Private; C and CUDA.
 *
 * It gives the same bits as quant/rows_body.h, whose formulas it repeats one row at a time: every sum runs in the same order,
 * each product and each sum is rounded (no fused operations: built with -fmad=false), and metadata are rounded before codes.
 * Where the CPU searches for a gain, all sixteen are tried: that finds the same one (quant/rows_gains.h).
 *
 * A row's numbers lie `stride` apart, its codes `code_stride` apart: rows are columns of arrays [channels][rows].
 */
#ifndef OSCAR_QUANT_CUDA_ENCODE_ROW_H
#define OSCAR_QUANT_CUDA_ENCODE_ROW_H

#include "quant/cuda/coders.h"
#include "quant/device_form.h"

#include <float.h>
#include <math.h>
#include <string.h>

#ifdef __CUDA_ARCH__
#define UNROLLED _Pragma("unroll")
#elif defined(__CUDACC__)
#define UNROLLED
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

/* ---- numbers ---- */

ON_BOTH static inline uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

ON_BOTH static inline float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

ON_BOTH static inline uint32_t magnitude_of(float x) { return float_bits(x) & 0x7FFFFFFFu; }
ON_BOTH static inline bool is_finite(float x) { return magnitude_of(x) < 0x7F800000u; }

/* As f32_to_f16 and f16_to_f32 (base/half.c), which a GPU cannot call. */
ON_BOTH static inline uint16_t half_bits(float x) {
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);
  if (magnitude < 0x38800000u) return (uint16_t)(sign | (float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f)));
  return (uint16_t)(sign | ((magnitude + 0xFFFu + (magnitude >> 13 & 1) - 0x38000000u) >> 13));
}

/* Of a finite half. */
ON_BOTH static inline float half_value(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 0x1Fu, mantissa = h & 0x3FFu;
  if (exponent == 0) return bits_float(float_bits((float)mantissa * 0x1p-24f) | sign);
  return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

ON_BOTH static inline bool half_is_finite(uint16_t h) { return (h & 0x7C00) != 0x7C00; }

/* Of x from 0 to 2^22. */
ON_BOTH static inline float floor_of(float x) {
#ifdef __CUDA_ARCH__
  return __fadd_rd(x, 0x1p23f) - 0x1p23f; /* rounding down where numbers are whole: sooner than the instruction for floors */
#else
  return floorf(x);
#endif
}

ON_BOTH static inline uint8_t code_of(float u, float top) { return (uint8_t)(int)(u < 0 ? 0 : u > top ? top : u); }

/* ---- the rotating mean ---- */

/* The k-th pair's, at the centre of a page. */
ON_BOTH static inline void turn_pair(const struct coder *c, int64_t page, int k, float *first, float *second) {
  const int pair = c->rotating_pair[k];
  const double *turn = c->rope_pages + 2 * pair;
  double cosine = c->rope_centres[2 * pair], sine = c->rope_centres[2 * pair + 1];
  for (; page > 0; page >>= 1, turn += 2 * c->rope_pairs) {
    const double a = turn[0], b = turn[1], turned = cosine * a - sine * b;
    sine = page & 1 ? cosine * b + sine * a : sine;
    cosine = page & 1 ? turned : cosine;
  }
  const float b1 = c->rotating_mean[2 * k], b2 = c->rotating_mean[2 * k + 1], cos_page = (float)cosine, sin_page = (float)sine;
  *first = b1 * cos_page - b2 * sin_page;
  *second = b1 * sin_page + b2 * cos_page;
}

/* From x1 and x2, the pair's channels in the row at `place` of the page. */
ON_BOTH static inline void subtract_pair(const struct coder *c, int k, int place, float first, float second, float *x1,
                                         float *x2) {
  const float *table = c->rope_table + c->rotating_pair[k] * 128 + place, cosine = table[0], sine = table[64];
  *x1 = *x1 - (first * cosine - second * sine);
  *x2 = *x2 - (first * sine + second * cosine);
}

/* ---- LOG_GAINS ---- */

#define GAINS_AT_ONCE 8

/* The number of a group's gain. t: y_i / step_i. */
ON_BOTH static inline int best_gain(const struct coder *c, int first, int last, const float *t, int stride) {
  float least = INFINITY;
  int best = 0;
  for (int low = 0; low < 16; low += GAINS_AT_ONCE) {
    float errors[GAINS_AT_ONCE], inverse[GAINS_AT_ONCE];
    UNROLLED for (int j = 0; j < GAINS_AT_ONCE; j++) errors[j] = 0, inverse[j] = c->inverse_gains[low + j];
    for (int i = first; i < last; i++) {
      const float magnitude = fminf(fabsf(t[i * stride]), 0x1p40f); /* MOST_MAGNITUDE of rows_gains.h */
      const float weight = c->channel[i].weight, outer = c->channel[i].outer_level;
      UNROLLED for (int j = 0; j < GAINS_AT_ONCE; j++) {
        const float a = magnitude * inverse[j], e = (a - floor_of(fminf(a, outer)) - 0.5f) * weight;
        errors[j] = errors[j] + e * e;
      }
    }
    UNROLLED for (int j = 0; j < GAINS_AT_ONCE; j++) {
      const float s = c->gains[low + j], error = errors[j] * (s * s);
      best = error < least ? low + j : best; /* the smaller gain on ties */
      least = fminf(error, least);
    }
  }
  return best;
}

ON_BOTH static inline uint8_t log_gain_code(const struct coder_channel *channel, float t, float inverse) {
  const float half_levels = channel->outer_level + 1, top = half_levels + half_levels - 1;
  return (uint8_t)(int)fminf(fmaxf(t * inverse + half_levels, 0), top);
}

/* t -> codes of group p; the number of its gain. */
ON_BOTH static inline int quantize_log_gain(const struct coder *c, int p, const float *t, int stride, uint8_t *codes,
                                            int code_stride) {
  const int first = c->group_channel[p], last = c->group_channel[p + 1], gain = best_gain(c, first, last, t, stride);
  const float inverse = c->inverse_gains[gain];
  for (int i = first; i < last; i++) codes[i * code_stride] = log_gain_code(&c->channel[i], t[i * stride], inverse);
  return gain;
}

/* ---- SCALE_ZERO ---- */

/* The rank-th smallest |y| of the row, found bit by bit. */
ON_BOTH static inline float magnitude_of_rank(const float *y, int stride, int channels, int rank) {
  uint32_t found = 0;
  for (uint32_t bit = 1u << 30; bit; bit >>= 1) {
    const uint32_t limit = found + (bit - 1);
    int below = 0;
    for (int i = 0; i < channels; i++) below += magnitude_of(y[i * stride]) <= limit;
    if (below <= rank) found += bit;
  }
  return bits_float(found);
}

ON_BOTH static inline void clip_row(const struct coder *c, float *y, int stride) {
  const float tau = magnitude_of_rank(y, stride, c->channels, c->clip_rank);
  for (int i = 0; i < c->channels; i++) {
    const float x = y[i * stride];
    y[i * stride] = x < -tau ? -tau : x > tau ? tau : x;
  }
}

ON_BOTH static inline uint16_t half_at_least(float x) {
  const uint16_t h = half_bits(x);
  return half_is_finite(h) && half_value(h) < x ? (uint16_t)(h + 1) : h;
}

ON_BOTH static inline bool scale_and_zero(float low, float high, float levels, uint16_t *scale, uint16_t *zero) {
  const float s = fmaxf(high - low, 1e-8f) / (levels - 1);
  *scale = half_bits(s);
  *zero = half_bits(-low / s);
  if (s >= 0x1p-14f && half_is_finite(*zero)) return half_is_finite(*scale);
  const float largest = fmaxf(fabsf(low), fabsf(high));
  *scale = half_at_least(fmaxf(fmaxf(s, 0x1p-24f), largest / 65504.0f));
  if (!half_is_finite(*scale)) return false;
  *zero = half_bits(-low / half_value(*scale));
  return half_is_finite(*zero);
}

/* y -> codes and metadata (scale, zero) of group p. false: they leave fp16. */
ON_BOTH static inline bool quantize_scale_zero(const struct coder *c, int p, const float *y, int stride, uint8_t *codes,
                                               int code_stride, uint16_t meta[2]) {
  const int first = c->group_channel[p], last = c->group_channel[p + 1];
  const float levels = c->channel[first].levels, top = levels - 1;
  float low = INFINITY, high = -INFINITY;
  for (int i = first; i < last; i++) {
    const float t = y[i * stride] / c->channel[i].step;
    low = t < low ? t : low;
    high = t > high ? t : high;
  }
  if (!is_finite(high - low) || !scale_and_zero(low, high, levels, &meta[0], &meta[1])) return false;
  const float s = half_value(meta[0]), z = half_value(meta[1]);
  for (int i = first; i < last; i++) codes[i * code_stride] = code_of(y[i * stride] / c->channel[i].step / s + z + 0.5f, top);
  return true;
}

/* ---- GAIN ---- */

struct gain_group { /* one group of a row */
  int n, stride, code_stride;
  const struct coder_channel *channel;
  const float *y;
  uint8_t *codes;
};

enum gain_sum { UNIT_SQUARES, SAMPLES_BY_CODES, CODE_SQUARES };

/* Of (y_i / sigma_i)^2, y_i q_i or q_i^2, q_i being what the codes stand for: in double, sixteen partial sums. */
ON_BOTH static inline double sum_of(const struct gain_group *g, enum gain_sum what) {
  double lanes[16], sum = 0;
  UNROLLED for (int j = 0; j < 16; j++) lanes[j] = 0;
  for (int i = 0; i < g->n; i += 16) {
    UNROLLED for (int j = 0; j < 16; j++) {
      if (i + j >= g->n) continue;
      const struct coder_channel *channel = &g->channel[i + j];
      const float y = g->y[(i + j) * g->stride], unit = y * channel->inverse_sigma;
      const float q =
          what == UNIT_SQUARES ? unit : channel->step * ((float)g->codes[(i + j) * g->code_stride] - (channel->levels - 1) / 2);
      lanes[j] += (double)(what == SAMPLES_BY_CODES ? y : q) * (double)q;
    }
  }
  UNROLLED for (int j = 0; j < 16; j++) sum += lanes[j];
  return sum;
}

ON_BOTH static inline void gain_codes(const struct gain_group *g, float s) {
  const float divisor = s > 0 ? s : FLT_MAX;
  for (int i = 0; i < g->n; i++) {
    const struct coder_channel *channel = &g->channel[i];
    g->codes[i * g->code_stride] =
        code_of(g->y[i * g->stride] / channel->step / divisor + channel->levels / 2, channel->levels - 1);
  }
}

/* y -> codes and metadata (the gain) of group p. false: it leaves fp16. */
ON_BOTH static inline bool quantize_gain(const struct coder *c, int p, const float *y, int stride, uint8_t *codes,
                                         int code_stride, uint16_t *meta) {
  const int first = c->group_channel[p];
  const struct gain_group g = {c->group_channel[p + 1] - first, stride, code_stride, c->channel + first, y + first * stride,
                               codes + first * code_stride};
  int coded = 0;
  for (int i = 0; i < g.n; i++) coded += g.channel[i].inverse_sigma > 0;
  float s = (float)sqrt(sum_of(&g, UNIT_SQUARES) / coded);
  for (int refit = 0; refit < 2 && s > 0 && is_finite(s); refit++) {
    gain_codes(&g, s);
    s = (float)(sum_of(&g, SAMPLES_BY_CODES) / sum_of(&g, CODE_SQUARES));
  }
  *meta = half_bits(s);
  if (!half_is_finite(*meta)) return false;
  gain_codes(&g, half_value(*meta));
  return true;
}

/* ---- words of the device form ---- */

/* Bits 2 `slot` of the four bytes of a word of keys: crumbs crumb .. crumb + 3 of a token. The inverse of place_of_key_crumb. */
struct key_slot {
  int token, crumb;
};
ON_BOTH static inline struct key_slot key_slot_of(int blocks, int word, int slot) {
  const int full = blocks / KEY_CLASSES, over = blocks % KEY_CLASSES, paired = full / 2 * 512;
  int class_ = slot, i = full, tile, high = word % 2, lane = word % 128 / 4;
  if (word < paired) {
    i = word / 512 * 2 + word % 4 / 2;
    tile = word % 512 / 128;
  } else if (word < full * 256) {
    i = full - 1;
    tile = (word - paired) / 128 * 2 + word % 4 / 2;
  } else if (over >= 2 && word < full * 256 + 128) {
    tile = word % 4;
    class_ = slot / 2 * 2 + 1;
    high = 1 - slot % 2;
  } else {
    tile = word % 2 * 2 + slot / 2;
    class_ = over == 3 ? 2 : 3;
    high = slot % 2;
    lane = word % 64 / 2;
  }
  struct key_slot out;
  out.token = tile * 16 + lane / 4 + 8 * high;
  out.crumb = (class_begin(blocks, class_) + i) * 16 + lane % 4 * 4;
  return out;
}

/* Codes of `rows` rows from row `from` on. */
struct coded_rows {
  const uint8_t *codes; /* [channels][code_stride] */
  int code_stride, from, rows;
};

ON_BOTH static inline uint32_t crumb_at(const struct coded_rows *r, int source, int token) {
  return (uint32_t)r->codes[(source >> 2) * r->code_stride + token - r->from] >> 2 * (source & 3) & 3;
}

ON_BOTH static inline bool has_row(const struct coded_rows *r, int token) {
  return token >= r->from && token < r->from + r->rows;
}

/* What the rows have of a word: zeros where other rows' crumbs are. */
ON_BOTH static inline uint32_t key_word(const struct coder *c, const struct coded_rows *r, int word) {
  uint32_t out = 0;
  UNROLLED for (int slot = 0; slot < 4; slot++) {
    const struct key_slot at = key_slot_of(c->crumbs / 16, word, slot);
    if (!has_row(r, at.token)) continue;
    UNROLLED for (int k = 0; k < 4; k++) out |= crumb_at(r, c->crumb_source[at.crumb + k], at.token) << (8 * k + 2 * slot);
  }
  return out;
}

ON_BOTH static inline uint32_t value_word(const struct coder *c, const struct coded_rows *r, int word) {
  const int lane = word % 64 / 2, crumb = word / 64 * 16 + lane / 4, token = word % 2 * 32 + lane % 4 * 2;
  uint32_t out = 0;
  UNROLLED for (int j = 0; j < 2; j++) {
    const int source = c->crumb_source[crumb + 8 * j];
    UNROLLED for (int k = 0; k < 4; k++) {
      if (!has_row(r, token + 8 * k)) continue; /* two tokens: neither is in when one is not */
      out |= crumb_at(r, source, token + 8 * k) << (4 * k + 2 * j);
      out |= crumb_at(r, source, token + 8 * k + 1) << (4 * k + 2 * j + 16);
    }
  }
  return out;
}

#endif
