/*
 * vector_kernels.h - the kernels that are the same for every vector width, included by the file of an instruction set.
 *
 * The including file defines `vec` (LANES floats), BLOCK_VECS and the vec_ functions used here. Matrix products keep
 * a block of BLOCK_ROWS x (BLOCK_VECS * LANES) sums, or a block of LANES dot products, in registers.
 */
#ifndef OSCAR_ATTENTION_VECTOR_KERNELS_H
#define OSCAR_ATTENTION_VECTOR_KERNELS_H

#include "attention/kernels.h"

#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define BLOCK_ROWS 6
/* Up to this many rows a BF16 page is converted while it is read, beyond that once into the panel. */
#define FEW_ROWS 6

/* `call` with ROWS as a constant 1 .. most, at most BLOCK_ROWS, so that the loops in it unroll; nothing for 0 rows. */
#define WITH_CONSTANT(rows, most, call)                                                                                          \
  switch (rows) {                                                                                                                \
    CASE_OF(1, most, call)                                                                                                       \
    CASE_OF(2, most, call)                                                                                                       \
    CASE_OF(3, most, call)                                                                                                       \
    CASE_OF(4, most, call)                                                                                                       \
    CASE_OF(5, most, call)                                                                                                       \
    CASE_OF(6, most, call)                                                                                                       \
  default:                                                                                                                       \
    break;                                                                                                                       \
  }
#define CASE_OF(number, most, call)                                                                                              \
  case number: {                                                                                                                 \
    enum { ROWS = (number) <= (most) ? (number) : 1 };                                                                           \
    if ((number) <= (most)) (call);                                                                                              \
  } break;

typedef vec (*load_function)(const void *base, int index);
INLINE vec load_f32(const void *base, int index) { return vec_load((const float *)base + index); }
INLINE vec load_bf16(const void *base, int index) { return vec_load_bf16((const uint16_t *)base + index); }

/* ---- out += a b ---- */

INLINE void sum_block(int rows, int vecs, int n, int k, const float *a, int a_stride, const void *b, load_function load,
                      float *out, int out_stride) {
  vec acc[BLOCK_ROWS][BLOCK_VECS];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vecs; v++) acc[r][v] = vec_load(out + r * out_stride + v * LANES);
  for (int i = 0; i < k; i++) {
    vec y[BLOCK_VECS];
#pragma GCC unroll 8
    for (int v = 0; v < vecs; v++) y[v] = load(b, i * n + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      vec x = vec_set(a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < vecs; v++) acc[r][v] = vec_fma(x, y[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vecs; v++) vec_store(out + r * out_stride + v * LANES, acc[r][v]);
}

INLINE void sum_rows(int vecs, int rows, int n, int k, const float *a, int a_stride, const void *b, load_function load,
                     float *out, int out_stride) {
  int r = 0;
  for (; r + BLOCK_ROWS <= rows; r += BLOCK_ROWS)
    sum_block(BLOCK_ROWS, vecs, n, k, a + r * a_stride, a_stride, b, load, out + r * out_stride, out_stride);
  a += r * a_stride;
  out += r * out_stride;
  WITH_CONSTANT(rows - r, BLOCK_ROWS, sum_block(ROWS, vecs, n, k, a, a_stride, b, load, out, out_stride));
}

static void multiply_add(int rows, int n, int k, const float *a, int a_stride, const float *b, float *out, int out_stride) {
  int j = 0;
  for (; j + BLOCK_VECS * LANES <= n; j += BLOCK_VECS * LANES)
    sum_rows(BLOCK_VECS, rows, n, k, a, a_stride, b + j, load_f32, out + j, out_stride);
  for (; j < n; j += LANES) sum_rows(1, rows, n, k, a, a_stride, b + j, load_f32, out + j, out_stride);
}

static void multiply_add_bf16(int rows, int n, int k, const float *a, int a_stride, const uint16_t *b, float *out,
                              int out_stride) {
  int j = 0;
  for (; j + BLOCK_VECS * LANES <= n; j += BLOCK_VECS * LANES)
    sum_rows(BLOCK_VECS, rows, n, k, a, a_stride, b + j, load_bf16, out + j, out_stride);
  for (; j < n; j += LANES) sum_rows(1, rows, n, k, a, a_stride, b + j, load_bf16, out + j, out_stride);
}

/* ---- out = a b' ---- */

#define DOT_ROWS (LANES / 4) /* rows of a block; times 4 columns: LANES sums, reduced together */

INLINE void dot_block(int rows, int n, int k, const float *a, const void *b, load_function load, float *out) {
  vec acc[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) acc[i] = vec_zero();
  for (int i = 0; i < k; i += LANES) {
    vec y[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) y[c] = load(b, c * k + i);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      vec x = vec_load(a + r * k + i);
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) acc[r * 4 + c] = vec_fma(x, y[c], acc[r * 4 + c]);
    }
  }
  float sums[LANES];
  vec_store(sums, vec_sums(acc));
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++) memcpy(out + r * n, sums + r * 4, 4 * sizeof *out);
}

INLINE void dot_rows(int rows, int n, int k, const float *a, const void *b, load_function load, float *out) {
  int r = 0;
  for (; r + DOT_ROWS <= rows; r += DOT_ROWS) dot_block(DOT_ROWS, n, k, a + r * k, b, load, out + r * n);
  a += r * k;
  out += r * n;
  WITH_CONSTANT(rows - r, DOT_ROWS, dot_block(ROWS, n, k, a, b, load, out));
}

static void multiply_transposed(int rows, int n, int k, const float *a, const float *b, float *out) {
  for (int j = 0; j < n; j += 4) dot_rows(rows, n, k, a, b + (size_t)j * (size_t)k, load_f32, out + j);
}

static void score_exact(const struct query_rows *queries, const uint16_t *keys, float *scores, float *panel) {
  int rows = queries->rows, d = queries->head_dim;
  if (rows <= FEW_ROWS) {
    for (int t = 0; t < PAGE_TOKENS; t += 4) dot_rows(rows, PAGE_TOKENS, d, queries->q, keys + t * d, load_bf16, scores + t);
    return;
  }
  transpose_keys(d, keys, panel);
  memset(scores, 0, sizeof *scores * (size_t)rows * PAGE_TOKENS);
  multiply_add(rows, PAGE_TOKENS, d, queries->q, d, panel, scores, PAGE_TOKENS);
}

static void accumulate_exact(int rows, int head_dim, int tokens, const float *p, const uint16_t *values, float *out, int stride,
                             float *panel) {
  if (rows <= FEW_ROWS) {
    multiply_add_bf16(rows, head_dim, tokens, p, PAGE_TOKENS, values, out, stride);
    return;
  }
  for (int i = 0; i < tokens * head_dim; i += LANES) vec_store(panel + i, vec_load_bf16(values + i));
  multiply_add(rows, head_dim, tokens, p, PAGE_TOKENS, panel, out, stride);
}

/* ---- the rotating mean ---- */

static void turn_waves(int rows, int pairs, const float *turn, const float *from, int from_stride, float *waves) {
  const float *restrict c = turn, *restrict s = turn + pairs;
  for (int r = 0; r < rows; r++, from += from_stride, waves += 2 * pairs) {
    int k = 0;
    for (; k + LANES <= pairs; k += LANES) {
      vec a = vec_load(from + k), b = vec_load(from + pairs + k), cosine = vec_load(c + k), sine = vec_load(s + k);
      vec_store(waves + k, vec_fma(a, cosine, vec_mul(b, sine)));
      vec_store(waves + pairs + k, vec_sub(vec_mul(b, cosine), vec_mul(a, sine)));
    }
    for (; k < pairs; k++) {
      float a = from[k], b = from[pairs + k];
      waves[k] = a * c[k] + b * s[k];
      waves[pairs + k] = b * c[k] - a * s[k];
    }
  }
}

/* A block of rows x (BLOCK_VECS * LANES) tokens, its sums in registers while the pairs go by. */
INLINE void wave_block(int rows, int pairs, const float *waves, const float *table, const uint16_t *pair, float *scores) {
  vec acc[BLOCK_ROWS][BLOCK_VECS];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECS; v++) acc[r][v] = vec_load(scores + r * PAGE_TOKENS + v * LANES);
  for (int k = 0; k < 2 * pairs; k++) {
    const float *curve = table + (k < pairs ? 2 * pair[k] : 2 * pair[k - pairs] + 1) * PAGE_TOKENS;
    vec y[BLOCK_VECS];
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECS; v++) y[v] = vec_load(curve + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      vec x = vec_set(waves[r * 2 * pairs + k]);
#pragma GCC unroll 8
      for (int v = 0; v < BLOCK_VECS; v++) acc[r][v] = vec_fma(x, y[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECS; v++) vec_store(scores + r * PAGE_TOKENS + v * LANES, acc[r][v]);
}

static void score_waves(int rows, int pairs, const float *waves, const float *table, const uint16_t *pair, float *scores) {
  for (int r = 0, n; r < rows; r += n, waves += n * 2 * pairs) {
    n = rows - r < BLOCK_ROWS ? rows - r : BLOCK_ROWS;
    for (int t = 0; t < PAGE_TOKENS; t += BLOCK_VECS * LANES) {
      float *to = scores + r * PAGE_TOKENS + t;
      WITH_CONSTANT(n, BLOCK_ROWS, wave_block(ROWS, pairs, waves, table + t, pair, to));
    }
  }
}

/* ---- softmax ---- */

#define EXP_SMALLEST (-87.33654f) /* ln 2^-126: below, the result would be subnormal and is 0 */

/* e^x for x <= 0, within 2 ulp; 0 below EXP_SMALLEST. x = n ln 2 + r, |r| <= ln(2)/2, Taylor up to r^7/7! (the rest is below
 * 2^-27); ln 2 is split so that n * high is exact (Cody and Waite). */
INLINE vec vec_exp(vec x) {
  vec clamped = vec_max(x, vec_set(EXP_SMALLEST));
  vec n = vec_round(vec_mul(clamped, vec_set(1.44269504f)));
  vec r = vec_fma(n, vec_set(-0.693359375f), clamped);
  r = vec_fma(n, vec_set(2.12194440e-4f), r);
  vec y = vec_set(1.f / 5040);
  y = vec_fma(y, r, vec_set(1.f / 720));
  y = vec_fma(y, r, vec_set(1.f / 120));
  y = vec_fma(y, r, vec_set(1.f / 24));
  y = vec_fma(y, r, vec_set(1.f / 6));
  y = vec_fma(y, r, vec_set(.5f));
  y = vec_fma(y, r, vec_set(1));
  y = vec_fma(y, r, vec_set(1));
  return vec_zero_below(vec_times_power_of_two(y, n), x, vec_set(EXP_SMALLEST));
}

static void softmax(int rows, float *scores, struct softmax_state *states) {
  for (int r = 0; r < rows; r++) {
    float *s = scores + r * PAGE_TOKENS;
    struct softmax_state *state = states + r;
    for (int t = 0; t < state->lo && t < PAGE_TOKENS; t++) s[t] = -INFINITY;
    for (int t = state->hi > 0 ? state->hi : 0; t < PAGE_TOKENS; t++) s[t] = -INFINITY;
    vec highest = vec_load(s);
    for (int t = LANES; t < PAGE_TOKENS; t += LANES) highest = vec_max(highest, vec_load(s + t));
    float max = vec_highest(highest);
    if (state->max > max) max = state->max;
    state->rescale = 1;
    if (!(max > -INFINITY)) { /* nothing seen yet: never subtract -inf from -inf */
      memset(s, 0, sizeof *s * PAGE_TOKENS);
      continue;
    }
    vec shift = vec_set(max), sum = vec_zero();
    for (int t = 0; t < PAGE_TOKENS; t += LANES) {
      vec p = vec_exp(vec_sub(vec_load(s + t), shift));
      vec_store(s + t, p);
      sum = vec_add(sum, p);
    }
    if (state->max < max) {
      state->rescale = expf(state->max - max);
      state->sum *= state->rescale;
      state->max = max;
    }
    state->sum += vec_total(sum);
  }
}

#endif
