/*
 * vector_kernels.h - the kernels that are the same for every vector width, included by the file of an instruction set.
 *
 * The including file defines `vec` (LANES floats), BLOCK_VECS and the vec_ functions used here. Matrix products keep
 * a block of BLOCK_ROWS x (BLOCK_VECS * LANES) sums, or a block of LANES dot products, in registers.
 */
#ifndef OSCAR_ATTENTION_VECTOR_KERNELS_H
#define OSCAR_ATTENTION_VECTOR_KERNELS_H

#include "attention/kernels.h"
#include "base/inline.h"

#include <math.h>
#include <string.h>

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

static inline void multiply_add(int rows, int n, int k, const float *a, int a_stride, const float *b, float *out,
                                int out_stride) {
  int j = 0;
  for (; j + BLOCK_VECS * LANES <= n; j += BLOCK_VECS * LANES)
    sum_rows(BLOCK_VECS, rows, n, k, a, a_stride, b + j, load_f32, out + j, out_stride);
  for (; j < n; j += LANES) sum_rows(1, rows, n, k, a, a_stride, b + j, load_f32, out + j, out_stride);
}

static inline void multiply_add_bf16(int rows, int n, int k, const float *a, int a_stride, const uint16_t *b, float *out,
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

static inline void multiply_transposed(int rows, int n, int k, const float *a, const float *b, float *out) {
  for (int j = 0; j < n; j += 4) dot_rows(rows, n, k, a, b + (size_t)j * (size_t)k, load_f32, out + j);
}

static inline void score_exact(const struct query_rows *queries, const uint16_t *keys, float *scores, float *panel) {
  int rows = queries->rows, d = queries->head_dim;
  if (rows <= FEW_ROWS) {
    for (int t = 0; t < PAGE_TOKENS; t += 4) dot_rows(rows, PAGE_TOKENS, d, queries->q, keys + t * d, load_bf16, scores + t);
    return;
  }
  transpose_keys(d, keys, panel);
  memset(scores, 0, sizeof *scores * (size_t)rows * PAGE_TOKENS);
  multiply_add(rows, PAGE_TOKENS, d, queries->q, d, panel, scores, PAGE_TOKENS);
}

static inline void accumulate_exact(int rows, int head_dim, int tokens, const float *p, const uint16_t *values, float *out,
                                    int stride, float *panel) {
  if (rows <= FEW_ROWS) {
    multiply_add_bf16(rows, head_dim, tokens, p, PAGE_TOKENS, values, out, stride);
    return;
  }
  for (int i = 0; i < tokens * head_dim; i += LANES) vec_store(panel + i, vec_load_bf16(values + i));
  multiply_add(rows, head_dim, tokens, p, PAGE_TOKENS, panel, out, stride);
}

/* ---- the rotating mean ---- */

/* Floats that score_waves works in, per row of a block: the amplitudes at the page's centre, and the weight of every curve. */
static inline int wave_floats(const struct side_form *keys) { return 4 * keys->rotating_pairs + 2 + WAVE_TERMS; }

static inline size_t panel_bytes(int head_dim, const struct side_form *keys, const struct side_form *values) {
  int width = head_dim; /* floats for each of 64 rows or tokens: a page as floats, the waves of rows, gains and zeros of groups */
  if (keys && wave_floats(keys) > width) width = wave_floats(keys);
  if (keys && 2 * keys->groups > width) width = 2 * keys->groups;
  if (values && 2 * values->groups > width) width = 2 * values->groups;
  return sizeof(float) * PAGE_TOKENS * (size_t)width;
}

/* Amplitudes of one row at an angle of zero -> at the angle: (cos, sin) of every pair in turn. */
INLINE void turn_waves(int pairs, const float *angle, const float *from, float *waves) {
  const float *restrict c = angle, *restrict s = angle + pairs;
  int k = 0;
  for (; k + LANES <= pairs; k += LANES) {
    vec a = vec_load(from + k), b = vec_load(from + pairs + k), cosine = vec_load(c + k), sine = vec_load(s + k);
    vec_store_pairs(waves + 2 * k, vec_fma(a, cosine, vec_mul(b, sine)), vec_sub(vec_mul(b, cosine), vec_mul(a, sine)));
  }
  for (; k < pairs; k++) {
    float a = from[k], b = from[pairs + k];
    waves[2 * k] = a * c[k] + b * s[k];
    waves[2 * k + 1] = b * c[k] - a * s[k];
  }
}

/* The weights of the polynomials, even and odd in turn: sums over slow pairs of their amplitudes times the pair's terms. Even
 * terms take the amplitudes of cos, odd ones those of sin, which lie beside each other in the same order. */
INLINE void project_waves(int rows, const struct wave_basis *basis, const float *waves, int waves_stride, float *weights,
                          int weights_stride) {
  enum { PER_TERM = WAVE_TERMS / LANES };
  vec sum[2][BLOCK_ROWS][PER_TERM]; /* of every other pair, so that additions need not wait for each other */
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int i = 0; i < PER_TERM; i++) sum[0][r][i] = sum[1][r][i] = vec_zero();
  const float *slow = waves + 2 * basis->fast;
  for (int k = 0; k < wave_term_rows(basis); k += 2) {
#pragma GCC unroll 8
    for (int j = 0; j < 2 * PER_TERM; j++) {
      int odd = j % 2, i = j / 2, set = rows <= 3 ? odd : 0; /* one set of many rows is enough */
      vec terms = vec_load(basis->terms + (k + odd) * WAVE_TERMS + i * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++)
        sum[set][r][i] = vec_fma(vec_load_pair(slow + r * waves_stride + 2 * (k + odd)), terms, sum[set][r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int i = 0; i < PER_TERM; i++) vec_store(weights + r * weights_stride + i * LANES, vec_add(sum[0][r][i], sum[1][r][i]));
}

/* Sums over n curves, those of cos and even polynomials in `even`, those of sin and odd ones in `odd`, of WAVE_VECS vectors from
 * the centre of the page on. */
#define WAVE_VECS (BLOCK_VECS / 2)
INLINE void wave_steps(int rows, int n, const float *weights, int stride, const float *even_curves, const float *odd_curves,
                       vec even[BLOCK_ROWS][WAVE_VECS], vec odd[BLOCK_ROWS][WAVE_VECS]) {
  for (int k = 0; k < n; k++) {
    vec x[WAVE_VECS], y[WAVE_VECS];
#pragma GCC unroll 4
    for (int v = 0; v < WAVE_VECS; v++) {
      x[v] = vec_load(even_curves + k * PAGE_TOKENS + v * LANES);
      y[v] = vec_load(odd_curves + k * PAGE_TOKENS + v * LANES);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      vec a = vec_set(weights[r * stride + 2 * k]), b = vec_set(weights[r * stride + 2 * k + 1]);
#pragma GCC unroll 4
      for (int v = 0; v < WAVE_VECS; v++) {
        even[r][v] = vec_fma(a, x[v], even[r][v]);
        odd[r][v] = vec_fma(b, y[v], odd[r][v]);
      }
    }
  }
}

/* Curves of cos and even polynomials are the same on both sides of a page's centre, the others change their sign: sums are made
 * for the tokens behind the centre, and serve those before it too. */
INLINE void wave_block(int rows, const struct wave_basis *basis, const float *weights, float *scores) {
  enum { HALF = PAGE_TOKENS / 2, TERMS = WAVE_TERMS / 2 };
  int stride = basis->curves;
  for (int t = 0; t < HALF; t += WAVE_VECS * LANES) {
    vec even[BLOCK_ROWS][WAVE_VECS], odd[BLOCK_ROWS][WAVE_VECS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < WAVE_VECS; v++) even[r][v] = odd[r][v] = vec_zero();
    const float *curve = basis->curve + HALF + t, *fast = curve + WAVE_TERMS * PAGE_TOKENS;
    wave_steps(rows, TERMS, weights, stride, curve, curve + TERMS * PAGE_TOKENS, even, odd);
    wave_steps(rows, basis->fast, weights + WAVE_TERMS, stride, fast, fast + basis->fast * PAGE_TOKENS, even, odd);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < WAVE_VECS; v++) {
        float *behind = scores + r * PAGE_TOKENS + HALF + t + v * LANES;
        float *before = scores + r * PAGE_TOKENS + HALF - t - (v + 1) * LANES;
        vec_store(behind, vec_add(vec_load(behind), vec_add(even[r][v], odd[r][v])));
        vec_store(before, vec_add(vec_load(before), vec_reverse(vec_sub(even[r][v], odd[r][v]))));
      }
  }
}

INLINE void score_waves_block(int rows, const struct wave_basis *basis, const float *amplitudes, int amplitudes_stride,
                              const float *angle, float *scores, float *panel) {
  const int stride = 2 * basis->pairs + 2; /* a pair of zeros may follow the last */
  float *waves = panel, *weights = panel + BLOCK_ROWS * stride;
  for (int r = 0; r < rows; r++) {
    float *to = waves + r * stride;
    turn_waves(basis->pairs, angle, amplitudes + r * amplitudes_stride, to);
    to[2 * basis->pairs] = to[2 * basis->pairs + 1] = 0;
    memcpy(weights + r * basis->curves + WAVE_TERMS, to, sizeof *to * (size_t)(2 * basis->fast));
  }
  project_waves(rows, basis, waves, stride, weights, basis->curves);
  wave_block(rows, basis, weights, scores);
}

static inline void score_waves(const struct query_rows *queries, const struct side_form *form, const struct wave_basis *basis,
                               const float *angle, float *scores, float *panel) {
  int stride = form_rows(form), rows = queries->rows;
  for (int r = 0, n; r < rows; r += n) {
    n = rows - r < BLOCK_ROWS ? rows - r : BLOCK_ROWS;
    /* Three rows and fewer add up in another order: of many, none may be the last three. */
    if (rows >= MANY_ROWS && rows - r > BLOCK_ROWS && (rows - r - 1) % BLOCK_ROWS < 3) n = 4;
    const float *of = queries->mapped + r * stride + form_rotating_row(form);
    float *to = scores + r * PAGE_TOKENS;
    WITH_CONSTANT(n, BLOCK_ROWS, score_waves_block(ROWS, basis, of, stride, angle, to, panel));
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

static inline void softmax(int rows, float *scores, struct softmax_state *states) {
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
