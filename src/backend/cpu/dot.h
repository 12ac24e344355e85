/*
 * backend/cpu/dot.h - products of weight blocks with a few tokens: the form of the activations, and the table of kernels.
 * Private.
 *
 * Every quantized format is, in runs of 16 elements, w = a q + m with an unsigned integer q and two floats per run (m takes in
 * the offset of formats with signed values). Activations are x = scale * (128 high + low), quantized once per call. So
 *
 *     w . x = sum over runs of  a scale I + m sum,   I = sum q (128 high + low) exactly in int32,  sum = scale * sum(128 high +
 * low)
 *
 * and a kernel is an unpacking of q, a and m plus one loop that all formats share.
 *
 * Activations have 15 bits, in two bytes, because a product with one token waits for memory: the second byte's multiplication
 * is hidden behind the weights' loads (bench/products.c), and the error is a hundredth of that of one byte. With |128 high + low|
 * <= 16256 and q <= 255 the sum over four elements stays below 2^24, so that even one 32-bit lane of a vector dot product
 * converts to float exactly; in 16 bits, 2 * 63 * 127 and 2 * 128 * 127 do not saturate maddubs.
 */
#ifndef OSCAR_CPU_DOT_H
#define OSCAR_CPU_DOT_H

#include "backend/blocks.h"

#include <string.h>

#define CHUNK          256 /* elements that a kernel handles at a time: a super-block, or eight small blocks */
#define RUN            16  /* elements of a weight with one scale, at least */
#define SCALED         32  /* activations with one scale: two runs */
#define CHUNK_RUNS     (CHUNK / RUN)
#define ALL_GROUPS     (CHUNK / SMALL_BLOCK) /* of 32 elements, of a chunk */
#define LARGEST_ACTIVE 16256                 /* 127 * 128 */

struct act_chunk {
  _Alignas(64) int8_t high[CHUNK]; /* -127 .. 127 */
  int8_t low[CHUNK];               /* -64 .. 63 */
  float scale[CHUNK_RUNS], sum[CHUNK_RUNS];
};

/* x [n][cols]; chunks [n][chunks_per_token] is its quantized form, elements past cols zero. */
struct dot_input {
  int64_t cols;
  int n;
  const float *x;
  const struct act_chunk *chunks;
  int64_t chunks_per_token;
};

/* y[t * w->rows + r] for rows first <= r < last and all tokens. A value depends on its row and its token alone. */
typedef void dot_rows(const struct weight *w, int64_t first, int64_t last, const struct dot_input *in, float *y);
/* Rows first .. last - 1 expanded to [last - first][cols]. */
typedef void expand_f32(const struct weight *w, int64_t first, int64_t last, float *out);

/*
 * BF16 panels are laid out as the multiplier reads them (oneDNN's BA16a64b2a): 64 rows side by side, of which 32 columns make a
 * block [16 pairs of columns][64 rows][2]. A stripe is 16 of those rows: the stripe's part of a block begins at
 * out + block * PANEL_BLOCK. `count` rows from `first` on are expanded; further rows and columns past cols are zero.
 */
#define PANEL_COLS  32
#define PANEL_ROWS  64
#define PANEL_BLOCK (PANEL_COLS * PANEL_ROWS)
#define STRIPE_ROWS 16
typedef void expand_stripe(const struct weight *w, int64_t first, int count, uint16_t *out);

#define WEIGHT_TYPES (WEIGHT_BF16 + 1)
struct dot_kernels {
  const char *name;
  /* From this many tokens on, expanding the weights for oneDNN is faster than further rounds of these kernels (bench_products
   * with one thread of Sapphire Rapids; weights of 1536 columns). */
  int many_tokens;
  /* count: 1 .. CHUNK elements */
  void (*quantize)(const float *x, int count, struct act_chunk *chunk);
  dot_rows *rows[WEIGHT_TYPES];
  expand_f32 *f32[WEIGHT_TYPES];
  /* For CPUs that also have AMX and AVX512-BF16; NULL in levels that such CPUs do not stop at. */
  expand_stripe *stripe[WEIGHT_TYPES];
  void (*round_bf16)(const float *x, size_t count, uint16_t *out);
};

extern const struct dot_kernels dot_portable, dot_avx2, dot_avx512, dot_neon;

/*
 * Asks for the bytes that a kernel will need a little later. Left alone, a core's prefetcher stays so close ahead that a product
 * waits for memory and computes in turn: 7.4 GB/s of Q4_K for one thread of Sapphire Rapids, 10.6 with this. There distances of 2
 * and 4 KiB do as well as each other and 1 KiB less; on Zen 4, 8 KiB is too far. The address may lie past the weights: a prefetch
 * never faults.
 */
#define AHEAD_BYTES 2048
static inline void prefetch_ahead(const uint8_t *p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const void *)((uintptr_t)p + AHEAD_BYTES + i));
}

static inline bool weight_is_float(enum weight_type type) {
  return type == WEIGHT_F32 || type == WEIGHT_F16 || type == WEIGHT_BF16;
}

/*
 * The quantization itself, compiled once per instruction set; the operations are exact or correctly rounded, so all give the
 * same bits. Two runs, the 32 elements of a small block, share a scale. If a value is not finite they become NaN as a whole: it
 * must not disappear.
 *
 * A peak is known by its bits, because magnitudes of floats are ordered as their bits are.
 */
static inline bool run_is_finite(uint32_t peak_bits) { return peak_bits < 0x7F800000u; }

/* What values of a run are multiplied by. Below 2^-100 it would overflow, and nothing would be seen of the result. */
static inline float run_inverse(uint32_t peak_bits) {
  float peak;
  memcpy(&peak, &peak_bits, sizeof peak);
  return run_is_finite(peak_bits) && peak > 0x1p-100f ? (float)LARGEST_ACTIVE / peak : 0;
}

static inline float run_scale(uint32_t peak_bits, float inverse) {
  float peak;
  memcpy(&peak, &peak_bits, sizeof peak);
  return run_is_finite(peak_bits) ? (inverse != 0 ? peak / (float)LARGEST_ACTIVE : 0) : peak - peak;
}

/* Added to a float, 1.5 * 2^23 rounds it to an integer (to even) in the low bits of the sum, whose other bits are these. */
#define ROUNDING_SHIFT      12582912.0f
#define ROUNDING_SHIFT_BITS 0x4B400000u

static inline uint32_t peak_of(const float *x, int n) {
  uint32_t peak_bits = 0;
  for (int i = 0; i < n; i++) {
    uint32_t u;
    memcpy(&u, x + i, sizeof u);
    u &= 0x7FFFFFFFu;
    peak_bits = u > peak_bits ? u : peak_bits;
  }
  return peak_bits;
}

static inline void quantize_run(const float *x, uint32_t peak_bits, int8_t *high, int8_t *low, float *scale, float *sum) {
  uint32_t kept = run_is_finite(peak_bits) ? UINT32_MAX : 0; /* as a mask, which compilers can keep in vectors */
  float inverse = run_inverse(peak_bits);
  int32_t total = 0;
  for (int i = 0; i < RUN; i++) {
    uint32_t u;
    float value, shifted;
    memcpy(&u, x + i, sizeof u);
    u &= kept;
    memcpy(&value, &u, sizeof value);
    shifted = value * inverse + ROUNDING_SHIFT;
    memcpy(&u, &shifted, sizeof u);
    int32_t v = (int32_t)(u - ROUNDING_SHIFT_BITS);
    int32_t h = (v + 64) >> 7;
    high[i] = (int8_t)h;
    low[i] = (int8_t)(v - h * 128);
    total += v;
  }
  *scale = run_scale(peak_bits, inverse);
  *sum = *scale * (float)total;
}

/* A whole chunk: x itself, or a copy followed by zeros. */
static inline const float *pad_chunk(const float *x, int count, float padded[CHUNK]) {
  if (count >= CHUNK) return x;
  memset(padded, 0, CHUNK * sizeof *padded);
  memcpy(padded, x, (size_t)count * sizeof *x);
  return padded;
}

static inline void quantize_chunk_inline(const float *x, int count, struct act_chunk *chunk) {
  float padded[CHUNK];
  x = pad_chunk(x, count, padded);
  for (int k = 0; k < CHUNK; k += SCALED) {
    uint32_t peak_bits = peak_of(x + k, SCALED);
    for (int i = k; i < k + SCALED; i += RUN)
      quantize_run(x + i, peak_bits, chunk->high + i, chunk->low + i, chunk->scale + i / RUN, chunk->sum + i / RUN);
  }
}

#endif
