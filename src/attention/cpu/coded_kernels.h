/*
 * coded_kernels.h - scores and sums over coded pages with byte dot products, for every vector width that has them.
 *
 * Coded pages are never expanded: a shift and a mask turn a vector of a page into four crumbs a lane, which one byte dot product
 * multiplies with four bytes of a row. The other operand, queries or probabilities, is a 16-bit integer in two signed bytes,
 *     x ~ step (256 high + low),  step = max |x| / 32512,
 * so every crumb costs two byte products, and a block of rows shares one unpacking. Errors of rounding x, at most step / 2 each,
 * mostly meet a crumb's mean of 1.5; that part is taken out: for keys by a shift that is known in advance, for values by summing
 * Z over the rounded weights too.
 *
 * The including file defines what vector_kernels.h wants, and
 *   CODED_ROWS, CODED_VECS       the block of rows and of vectors of tokens or crumbs whose sums stay in registers
 *   ivec                         LANES 32-bit integers, with the ivec_ functions used here
 *   ivec_dot(sum, crumbs, q)     lane += sum over j < 4 and k < 4 of byte k of crumbs[j] (unsigned, 0 .. 3) times q[4 j + k]
 */
#ifndef OSCAR_ATTENTION_CODED_KERNELS_H
#define OSCAR_ATTENTION_CODED_KERNELS_H

#include "attention/cpu/vector_kernels.h"

#define LARGEST    32512.f               /* 127 * 256: the largest number of two signed bytes whose low byte is -128 .. 127 */
#define NEGLIGIBLE 0x1p-100f             /* a row whose largest number is below is taken as zero: 1 / step would overflow */
#define VECS       (PAGE_TOKENS / LANES) /* of a page's tokens */
#define PER_BLOCK  (16 / LANES)          /* vectors that 16 tokens or crumbs take */

INLINE vec join(ivec high, ivec low) { return ivec_to_float(ivec_add(ivec_shift_left(high, 8), low)); }

/* Rounds LANES numbers, writes them as two signed bytes each, 256 high + low, and returns them. */
INLINE ivec split(vec x, int8_t *high, int8_t *low) {
  ivec whole = ivec_nearest(x);
  ivec_store_bytes(high, ivec_shift_right(ivec_add(whole, ivec_set(128)), 8));
  ivec_store_bytes(low, whole); /* the lowest byte, of which the signed high part knows */
  return whole;
}

INLINE void unpack(const uint8_t *codes, ivec crumbs[4]) {
  ivec packed = ivec_load(codes);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) crumbs[j] = ivec_crumbs(packed, j);
}

/* Metadata of a page as floats: [groups][64] gains, and where z is stored, behind them, as many zeros. */
INLINE const float *load_meta(const struct side_form *f, const uint8_t *side, float *panel) {
  for (int group = 0; group < f->groups; group++)
    for (int v = 0; v < VECS; v++) {
      int tile = v / PER_BLOCK, first = v % PER_BLOCK * LANES;
      float *to = panel + group * PAGE_TOKENS + v * LANES;
      if (f->meta_values == 0)
        vec_store(to, vec_load_log_gains(tile_meta(f, side, tile, 0, 0) + first, group));
      else
        vec_store(to, vec_load_f16(tile_meta(f, side, tile, group, 0) + first));
      if (f->meta_values == 2) vec_store(to + f->groups * PAGE_TOKENS, vec_load_f16(tile_meta(f, side, tile, group, 1) + first));
    }
  return panel;
}

/* Of the LANES tokens of vector v. */
INLINE vec gain_vec(const float *meta, int group, int v) { return vec_load(meta + group * PAGE_TOKENS + v * LANES); }
INLINE vec zero_vec(const struct side_form *f, const float *meta, int group, int v) {
  return vec_load(meta + (f->groups + group) * PAGE_TOKENS + v * LANES);
}

/* Rows are cut into blocks of equal size as far as that goes: 5 are 3 and 2, not 4 and 1. */
static inline int next_block(int rows) {
  int blocks = (rows + CODED_ROWS - 1) / CODED_ROWS;
  return (rows + blocks - 1) / blocks;
}

/* ---- keys ---- */

/* A prepared row: [C] high bytes, [C] low bytes, then per group the step and what is added to a sum in steps. */
static inline size_t row_bytes(const struct side_form *keys) {
  return round_up((size_t)(2 * keys->crumbs) + 2 * sizeof(float) * (size_t)keys->groups, 64);
}

static inline size_t prepared_bytes(int head_dim, const struct side_form *keys) {
  (void)head_dim;
  return keys ? row_bytes(keys) : 0;
}

static inline void prepare_queries(const struct query_rows *queries, const struct side_form *keys, uint8_t *prepared) {
  if (!queries->mapped) return;
  int width = form_rows(keys);
  for (int r = 0; r < queries->rows; r++) {
    int8_t *high = (int8_t *)prepared + (size_t)r * row_bytes(keys), *low = high + keys->crumbs;
    float *steps = (float *)(void *)(low + keys->crumbs), *shifts = steps + keys->groups;
    for (int group = 0; group < keys->groups; group++) {
      const float *q = queries->mapped + r * width;
      int begin = form_group_begin(keys, group), end = form_group_begin(keys, group + 1);
      vec largest = vec_zero(), error = vec_zero();
      for (int c = begin; c < end; c += LANES) largest = vec_max(largest, vec_abs(vec_load(q + c)));
      float max = vec_highest(largest), inverse = max < NEGLIGIBLE ? 0 : LARGEST / max, step = max / LARGEST;
      for (int c = begin; c < end; c += LANES) {
        vec x = vec_load(q + c), whole = ivec_to_float(split(vec_mul(x, vec_set(inverse)), high + c, low + c));
        error = vec_add(error, vec_sub(vec_mul(whole, vec_set(step)), x));
      }
      steps[group] = step;
      shifts[group] = -1.5f * vec_total(error);
      if (keys->meta_values != 2) shifts[group] -= q[keys->crumbs + group]; /* what z would be multiplied with, and is 1 */
    }
  }
}

/* Scores of a block of rows: sum over groups of s (step dot + shift - z b), plus the mean. */
INLINE void score_block(int rows, const struct side_form *f, const float *mapped, const uint8_t *prepared, const uint8_t *keys,
                        const float *meta, float *scores) {
  int blocks = f->crumbs / 16, width = form_rows(f);
  size_t stride = row_bytes(f);
  for (int v = 0; v < VECS; v += CODED_VECS) {
    vec total[CODED_ROWS][CODED_VECS];
    const uint8_t *codes[CODED_VECS];
#pragma GCC unroll 4
    for (int i = 0; i < CODED_VECS; i++) {
      codes[i] = keys + ((v + i) / PER_BLOCK * blocks * 16 + (v + i) % PER_BLOCK * LANES) * 4;
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) total[r][i] = vec_set(mapped[r * width + f->crumbs + f->groups]);
    }
    for (int group = 0; group < f->groups; group++) {
      ivec high[CODED_ROWS][CODED_VECS], low[CODED_ROWS][CODED_VECS];
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < CODED_VECS; i++) high[r][i] = low[r][i] = ivec_set(0);
      for (int block = form_group_begin(f, group) / 16; block < form_group_begin(f, group + 1) / 16; block++) {
        ivec crumbs[CODED_VECS][4];
#pragma GCC unroll 4
        for (int i = 0; i < CODED_VECS; i++) unpack(codes[i] + block * 64, crumbs[i]);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
          const uint8_t *q = prepared + (size_t)r * stride + block * 16;
#pragma GCC unroll 4
          for (int i = 0; i < CODED_VECS; i++) {
            high[r][i] = ivec_dot(high[r][i], crumbs[i], q);
            low[r][i] = ivec_dot(low[r][i], crumbs[i], q + f->crumbs);
          }
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < CODED_VECS; i++) {
        vec s = gain_vec(meta, group, v + i);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
          const float *steps = (const float *)(const void *)(prepared + (size_t)r * stride + 2 * f->crumbs);
          vec dot = vec_fma(join(high[r][i], low[r][i]), vec_set(steps[group]), vec_set(steps[f->groups + group]));
          if (f->meta_values == 2)
            dot = vec_fma(zero_vec(f, meta, group, v + i), vec_set(-mapped[r * width + f->crumbs + group]), dot);
          total[r][i] = vec_fma(s, dot, total[r][i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int i = 0; i < CODED_VECS; i++) vec_store(scores + r * PAGE_TOKENS + (v + i) * LANES, total[r][i]);
  }
}

static inline void score_coded(const struct query_rows *queries, const struct side_form *form, const uint8_t *keys, float *scores,
                               float *panel) {
  const float *meta = load_meta(form, keys, panel);
  size_t stride = row_bytes(form);
  for (int r = 0, n; r < queries->rows; r += n) {
    const float *mapped = queries->mapped + r * form_rows(form);
    const uint8_t *prepared = queries->prepared + (size_t)r * stride;
    float *out = scores + r * PAGE_TOKENS;
    n = next_block(queries->rows - r);
    WITH_CONSTANT(n, CODED_ROWS, score_block(ROWS, form, mapped, prepared, keys, meta, out));
  }
}

/* ---- values ---- */

struct weights { /* of one row and one group: p s of 64 tokens */
  int8_t high[PAGE_TOKENS], low[PAGE_TOKENS];
};

INLINE float largest_gain(const struct side_form *f, const float *meta) {
  vec largest = vec_load(meta);
  for (int i = LANES; i < f->groups * PAGE_TOKENS; i += LANES) largest = vec_max(largest, vec_load(meta + i));
  return vec_highest(largest);
}

INLINE float largest_weight(const float *p) {
  vec largest = vec_load(p);
  for (int t = LANES; t < PAGE_TOKENS; t += LANES) largest = vec_max(largest, vec_load(p + t));
  return vec_highest(largest);
}

/* Lanes add up to Z, the sum of the rounded weights times z, in steps. */
INLINE vec prepare_weights(const struct side_form *f, const float *meta, int group, const float *p, float inverse,
                           struct weights *weights) {
  if (f->meta_values == 2) {
    vec offset = vec_zero();
    for (int v = 0; v < VECS; v++) {
      vec w = vec_mul(vec_mul(vec_load(p + v * LANES), vec_set(inverse)), gain_vec(meta, group, v));
      vec whole = ivec_to_float(split(w, weights->high + v * LANES, weights->low + v * LANES));
      offset = vec_fma(whole, zero_vec(f, meta, group, v), offset);
    }
    return offset;
  }
  ivec offset = ivec_set(0);
#pragma GCC unroll 4
  for (int v = 0; v < VECS; v++) {
    vec w = vec_mul(vec_mul(vec_load(p + v * LANES), vec_set(inverse)), gain_vec(meta, group, v));
    offset = ivec_add(offset, split(w, weights->high + v * LANES, weights->low + v * LANES));
  }
  return ivec_to_float(offset);
}

/* out [rows][n * LANES crumbs] += weights times crumbs; `codes` is the first of n vectors in tile 0. */
INLINE void value_block(int rows, int n, int tile_bytes, const uint8_t *codes, const struct weights *weights, const float *steps,
                        float *out, int stride) {
  ivec high[CODED_ROWS][CODED_VECS], low[CODED_ROWS][CODED_VECS];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) high[r][i] = low[r][i] = ivec_set(0);
#pragma GCC unroll 4
  for (int tile = 0; tile < 4; tile++) {
    /* Broadcasting weights from memory costs nothing here. Compilers would rather take them apart in registers, or broadcast all
     * of them ahead and store that. */
    __asm__ volatile("" : : "r"(weights) : "memory");
    ivec crumbs[CODED_VECS][4];
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) unpack(codes + tile * tile_bytes + i * LANES * 4, crumbs[i]);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int i = 0; i < n; i++) {
        high[r][i] = ivec_dot(high[r][i], crumbs[i], weights[r].high + tile * 16);
        low[r][i] = ivec_dot(low[r][i], crumbs[i], weights[r].low + tile * 16);
      }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
      float *o = out + r * stride + i * LANES;
      vec_store(o, vec_fma(join(high[r][i], low[r][i]), vec_set(steps[r]), vec_load(o)));
    }
}

/* Groups whose vectors are added up across lanes together. */
#define JOINT_GROUPS 4
#define JOINT_SUMS   round_up((size_t)(CODED_ROWS * (JOINT_GROUPS + 1)), LANES)

/* totals[i] = sum of the lanes of sums[i], i < n; sums up to a multiple of LANES are written. */
INLINE void add_up(int n, vec sums[], float *totals) {
  for (int i = n; i % LANES != 0; i++) sums[i] = vec_zero();
  for (int i = 0; i < n; i += LANES) vec_store(totals + i, vec_sums(sums + i));
}

INLINE void accumulate_block(int rows, const struct side_form *f, const float *p, const uint8_t *values, const float *meta,
                             float gain, float *out, int stride) {
  int tile_bytes = f->crumbs * 4;
  float steps[CODED_ROWS], inverses[CODED_ROWS], totals[JOINT_SUMS];
  vec sums[JOINT_SUMS]; /* of p of every row; then Z in steps, [groups at a time][rows] */
  for (int r = 0; r < rows; r++) {
    steps[r] = largest_weight(p + r * PAGE_TOKENS) * gain / LARGEST;
    inverses[r] = steps[r] < NEGLIGIBLE ? 0 : 1 / steps[r];
    sums[r] = vec_load(p + r * PAGE_TOKENS);
    for (int t = LANES; t < PAGE_TOKENS; t += LANES) sums[r] = vec_add(sums[r], vec_load(p + r * PAGE_TOKENS + t));
  }
  int n = rows;
  for (int group = 0; group < f->groups; group++) {
    struct weights weights[CODED_ROWS];
    for (int r = 0; r < rows; r++) sums[n++] = prepare_weights(f, meta, group, p + r * PAGE_TOKENS, inverses[r], weights + r);
    int c = form_group_begin(f, group), end = form_group_begin(f, group + 1);
    for (; c + CODED_VECS * LANES <= end; c += CODED_VECS * LANES)
      value_block(rows, CODED_VECS, tile_bytes, values + c * 4, weights, steps, out + c, stride);
    for (; c < end; c += LANES) value_block(rows, 1, tile_bytes, values + c * 4, weights, steps, out + c, stride);
    if (group % JOINT_GROUPS != JOINT_GROUPS - 1 && group + 1 < f->groups) continue;
    add_up(n, sums, totals);
    const bool with_p = group < JOINT_GROUPS;
    for (int r = 0; r < rows; r++) {
      const float *total = totals + (with_p ? rows : 0);
      float *to = out + r * stride + f->crumbs;
      for (int g = group / JOINT_GROUPS * JOINT_GROUPS; g <= group; g++, total += rows) to[g] -= steps[r] * total[r];
      if (with_p) to[f->groups] += totals[r];
    }
    n = 0;
  }
}

static inline void accumulate_coded(int rows, const struct side_form *form, const float *p, const uint8_t *values, float *out,
                                    int stride, float *panel) {
  const float *meta = load_meta(form, values, panel);
  const float gain = largest_gain(form, meta);
  for (int r = 0, n; r < rows; r += n) {
    n = next_block(rows - r);
    WITH_CONSTANT(n, CODED_ROWS, accumulate_block(ROWS, form, p + r * PAGE_TOKENS, values, meta, gain, out + r * stride, stride));
  }
}

#endif
