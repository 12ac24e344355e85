/*
 * packed_kernels.h - the kernels on packed weights (packed.h), for every vector width: a lane is a row.
 *
 * Codes of four columns are a dword of every row; they meet four activations that all rows share. Per run of columns with one
 * scale integers are added up, then the scales of as many rows as a vector has lanes meet their sums. A group is ROW_VECS vectors
 * of rows, whose sums are kept side by side as far as registers go, so that they share what is loaded of the activations; where
 * they do not, a part (at most 12 cache lines) is gone through once for each.
 *
 * The including file defines
 *   LANES                rows of a vector, and vec and ivec: so many floats, and bytes of so many rows
 *   SUM_VECS, MOST_SUMS  vectors of a struct sums; how many of all sums are kept in registers
 *   struct active        activations of a unit's columns, filled by load_active
 *   struct sums          what add_quad adds up: codes of four columns of a unit times the activations of its columns from
 *                        `at` on; total() is the sum, over 128 high + low
 * and functions on vec and ivec.
 */
#ifndef OSCAR_CPU_PACKED_KERNELS_H
#define OSCAR_CPU_PACKED_KERNELS_H

#include "backend/blocks.h"

#define ROW_VECS (GROUP_ROWS / LANES)
#define TOKENS   4 /* at a time, at most */

/* A format in terms of the loops below. */
struct format {
  enum weight_type type;
  enum { NIBBLES, BYTES, SUPER_NIBBLES, SIX_BITS } kind;
  bool fifth;   /* bits beside nibbles */
  bool minimum; /* a scale and a minimum; if not, */
  float offset; /* a code of this value stands for 0 */
};

/* A group's first unit. */
INLINE const uint8_t *group_at(const struct packed_form *form, const struct weight *w, int64_t g) {
  return (const uint8_t *)w->packed + (size_t)g * packed_group_bytes(form, w->cols);
}

/* Rows of a group; of the last one there may be fewer. */
INLINE int rows_of(int64_t rows, int64_t g) {
  int64_t left = rows - g * GROUP_ROWS;
  return left < GROUP_ROWS ? (int)left : GROUP_ROWS;
}

/* Where the columns from 32 block + 4 i on of a unit are: the part's codes; the place of its scale among the part's. */
INLINE const uint8_t *part_at(struct format f, const uint8_t *unit, int block, int i) {
  const struct packed_form form = packed_form_of(f.type);
  const int part = f.kind == SUPER_NIBBLES ? block / 2 : f.kind == SIX_BITS ? block / 4 * 2 + i / 4 : 0;
  return unit + (size_t)part * packed_part_bytes(&form);
}
INLINE const uint8_t *scales_at(struct format f, const uint8_t *unit, int block, int i) {
  const struct packed_form form = packed_form_of(f.type);
  const int run = f.kind == SUPER_NIBBLES ? block % 2 : block % 4;
  return part_at(f, unit, block, i) + form.codes + form.fifth_bits + run * GROUP_ROWS;
}
INLINE const uint8_t *factors_at(struct format f, const uint8_t *unit) {
  const struct packed_form form = packed_form_of(f.type);
  return unit + packed_unit_bytes(&form) - form.factors;
}

/* Codes of those four columns, of the rows of vector v. */
INLINE ivec load_quad(struct format f, const uint8_t *unit, int block, int i, int v) {
  const uint8_t *part = part_at(f, unit, block, i), *codes = part + v * LANES * 4;
  ivec q;
  if (f.kind == BYTES) {
    q = ivec_load(codes + i * VECTOR);
  } else if (f.kind == NIBBLES) {
    ivec x = ivec_load(codes + i % 4 * VECTOR);
    q = i < 4 ? low_halves(x) : high_halves(x);
  } else if (f.kind == SUPER_NIBBLES) {
    ivec x = ivec_load(codes + i * VECTOR);
    q = block % 2 == 0 ? low_halves(x) : high_halves(x);
  } else {
    int quarter = block % 4;
    ivec x = ivec_load(codes + (i % 4 * 3 + quarter % 2) * VECTOR), upper = ivec_load(codes + (i % 4 * 3 + 2) * VECTOR);
    upper = quarter < 2 ? shift_left(upper, 4 - 2 * quarter) : shift_right(upper, 2 * quarter - 4);
    q = add_upper(quarter < 2 ? low_halves(x) : high_halves(x), upper);
  }
  const struct packed_form form = packed_form_of(f.type);
  return f.fifth ? add_fifth(q, part + form.codes + block % 2 * VECTOR + 8 * i + v * LANES / 2) : q;
}

INLINE int blocks_of(struct format f) { return packed_form_of(f.type).columns / SMALL_BLOCK; }

/* ---- products ---- */

/* Blocks of a part: those that share vectors of codes are summed side by side. Of SIX_BITS it is a run of four of them. */
INLINE int part_blocks(struct format f) { return f.kind == SIX_BITS ? 4 : f.kind == SUPER_NIBBLES ? 2 : 1; }

/* Sums of a part and n tokens are kept for whole groups if they fit; otherwise for one vector of rows at a time. Four tokens for
 * which they do not fit are faster as two and two, two for which those of a vector do not, alone. */
INLINE int sums_of(struct format f, int n) { return SUM_VECS * part_blocks(f) * n; }
INLINE bool group_fits(struct format f, int n) { return sums_of(f, n) * ROW_VECS <= MOST_SUMS; }
INLINE bool vector_fits(struct format f, int n) { return sums_of(f, n) <= MOST_SUMS; }

/* What a unit's runs add up to before the factors that all of its columns share: times d, and times dmin or m. */
struct unit_sums {
  vec part[ROW_VECS][TOKENS], minima[ROW_VECS][TOKENS];
};

/* Part p of a unit, whose columns begin at `column` of the activations' chunks: `vecs` vectors of rows from `first` on. */
INLINE void dot_part(struct format f, const uint8_t *unit, int p, int first, int vecs, const struct active *active,
                     const struct act_chunk *x, int64_t stride, int column, int n, struct unit_sums *u) {
  const int blocks = part_blocks(f), quads = f.kind == SIX_BITS ? 4 : 8;
  const int block = f.kind == SIX_BITS ? p / 2 * 4 : p * blocks, quad = f.kind == SIX_BITS ? p % 2 * 4 : 0;
  struct sums s[4][ROW_VECS][TOKENS];
#pragma GCC unroll 4
  for (int b = 0; b < blocks; b++)
#pragma GCC unroll 2
    for (int v = 0; v < vecs; v++)
#pragma GCC unroll 4
      for (int t = 0; t < n; t++) clear(&s[b][v][t]);
#pragma GCC unroll 8
  for (int i = quad; i < quad + quads; i++)
#pragma GCC unroll 4
    for (int b = 0; b < blocks; b++)
#pragma GCC unroll 2
      for (int v = 0; v < vecs; v++) {
        const ivec q = load_quad(f, unit, block + b, i, first + v);
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) add_quad(q, active + t, SMALL_BLOCK * (block + b) + 4 * i, &s[b][v][t]);
      }
#pragma GCC unroll 4
  for (int b = 0; b < blocks; b++) {
    const int at = (column + SMALL_BLOCK * (block + b)) / RUN;
    const uint8_t *scales = scales_at(f, unit, block + b, quad) + first * LANES;
#pragma GCC unroll 4
    for (int t = 0; t < n; t++) {
      const struct act_chunk *c = x + t * stride;
      const float both = c->sum[at] + c->sum[at + 1];
#pragma GCC unroll 2
      for (int v = 0; v < vecs; v++) {
        vec scale = vec_set(c->scale[at]), sum = total(&s[b][v][t]), *part = &u->part[first + v][t];
        if (f.kind == SIX_BITS) {
          sum = vec_fma(sum, scale, vec_set(-f.offset * c->sum[at + quad / 4]));
          *part = vec_fma(sum, load_signed_bytes(scales + v * LANES), *part);
        } else if (f.kind == SUPER_NIBBLES) {
          vec *minima = &u->minima[first + v][t];
          *part = vec_fma(vec_mul(sum, scale), load_bytes(scales + v * LANES), *part);
          *minima = vec_fnma(vec_set(both), load_bytes(scales + 2 * GROUP_ROWS + v * LANES), *minima);
        } else if (f.minimum) {
          *part = vec_mul(sum, scale);
          u->minima[first + v][t] = vec_set(both);
        } else {
          *part = vec_fma(sum, scale, vec_set(-f.offset * both));
        }
      }
    }
  }
}

/* One group of `rows` rows times n tokens, whose chunks are `stride` apart. */
INLINE void dot_group(struct format f, const uint8_t *group, int64_t cols, const struct act_chunk *x, int64_t stride, int n,
                      int rows, float *y, int64_t y_stride) {
  const struct packed_form form = packed_form_of(f.type);
  const int vecs = group_fits(f, n) ? ROW_VECS : 1;
  vec sums[ROW_VECS][TOKENS];
#pragma GCC unroll 2
  for (int v = 0; v < ROW_VECS; v++)
    for (int t = 0; t < n; t++) sums[v][t] = vec_zero();
  for (int64_t column = 0; column < cols; column += form.columns, group += packed_unit_bytes(&form)) {
    struct unit_sums u;
    struct active active[TOKENS];
    for (int t = 0; t < n; t++) load_active(x + t * stride + column / CHUNK, (int)(column % CHUNK), form.columns, active + t);
#pragma GCC unroll 2
    for (int v = 0; v < ROW_VECS; v++)
      for (int t = 0; t < n; t++) u.part[v][t] = u.minima[v][t] = vec_zero();
#pragma GCC unroll 4
    for (int p = 0; p < form.parts; p++) {
      const size_t share = packed_unit_bytes(&form) / (size_t)form.parts; /* all at once would wait for each other */
      prefetch_ahead(group + (size_t)p * share, share);
#pragma GCC unroll 2
      for (int v = 0; v < ROW_VECS; v += vecs) {
        dot_part(f, group, p, v, vecs, active, x + column / CHUNK, stride, (int)(column % CHUNK), n, &u);
        /* Compilers would move all prefetches of a unit to its beginning, and keep what two passes load in registers. Q6_K in
         * vectors of 16 rows gains more from instructions of several parts side by side: 25 against 20 GB/s (Zen 4). */
        if (ROW_VECS > 1 || f.kind != SIX_BITS) __asm__ volatile("" ::: "memory");
      }
    }
    const uint8_t *factors = factors_at(f, group);
#pragma GCC unroll 2
    for (int v = 0; v < ROW_VECS; v++) {
      vec d = load_halves(factors + v * LANES * 2);
      vec m = f.minimum ? load_halves(factors + (GROUP_ROWS + v * LANES) * 2) : vec_zero();
      for (int t = 0; t < n; t++) {
        sums[v][t] = vec_fma(d, u.part[v][t], sums[v][t]);
        if (f.minimum) sums[v][t] = vec_fma(m, u.minima[v][t], sums[v][t]);
      }
    }
  }
  for (int t = 0; t < n; t++)
#pragma GCC unroll 2
    for (int v = 0; v < ROW_VECS; v++) store_rows(y + t * y_stride + v * LANES, rows - v * LANES, sums[v][t]);
}

INLINE void dot_rows_of(struct format f, const struct weight *w, int64_t first, int64_t last, const struct dot_input *in,
                        float *y) {
  const struct packed_form form = packed_form_of(f.type);
  const int64_t stride = in->chunks_per_token;
  for (int64_t g = first / GROUP_ROWS; g * GROUP_ROWS < last; g++) {
    const uint8_t *group = group_at(&form, w, g);
    const int rows = rows_of(w->rows, g);
    const struct act_chunk *x = in->chunks;
    float *to = y + g * GROUP_ROWS;
    int left = in->n;
    for (; group_fits(f, 4) && left >= 4; left -= 4, x += 4 * stride, to += 4 * w->rows)
      dot_group(f, group, w->cols, x, stride, 4, rows, to, w->rows);
    for (; vector_fits(f, 2) && left >= 2; left -= 2, x += 2 * stride, to += 2 * w->rows)
      dot_group(f, group, w->cols, x, stride, 2, rows, to, w->rows);
    for (; left > 0; left--, x += stride, to += w->rows) dot_group(f, group, w->cols, x, stride, 1, rows, to, w->rows);
  }
}

/* ---- expansion ---- */

/* Scale and minimum of the rows of vector v, w = a q + m, for the columns from 32 block + 4 i on: one rounding of a q + m is one
 * of the exact value, as in weight_dequantize. */
INLINE void load_scales(struct format f, const uint8_t *unit, int block, int i, int v, vec *a, vec *m) {
  const uint8_t *factors = factors_at(f, unit) + v * LANES * 2, *scales = scales_at(f, unit, block, i) + v * LANES;
  *a = load_halves(factors);
  *m = f.minimum ? load_halves(factors + 2 * GROUP_ROWS) : vec_zero();
  if (f.kind == SIX_BITS) *a = vec_mul(*a, load_signed_bytes(scales));
  if (f.kind == SUPER_NIBBLES) {
    *a = vec_mul(*a, load_bytes(scales));
    *m = vec_fnma(*m, load_bytes(scales + 2 * GROUP_ROWS), vec_zero());
  }
  if (!f.minimum) *m = vec_mul(*a, vec_set(-f.offset));
}

/* Calls store(out, cols, column, row, rows, columns) for every square of LANES columns and rows of a group; `columns` has a
 * vector for each column, of rows from `row` on, of which there are `rows` (or none). */
typedef void store_columns(void *out, int64_t cols, int64_t column, int row, int rows, const vec columns[LANES]);
INLINE void expand_group(struct format f, const struct weight *w, int64_t g, int rows, store_columns *store, void *out) {
  const struct packed_form form = packed_form_of(f.type);
  const uint8_t *group = group_at(&form, w, g);
  for (int64_t column = 0; column < w->cols; column += form.columns, group += packed_unit_bytes(&form))
#pragma GCC unroll 8
    for (int b = 0; b < blocks_of(f); b++)
#pragma GCC unroll 4
      for (int square = 0; square < SMALL_BLOCK / LANES; square++)
        for (int v = 0; v < ROW_VECS; v++) {
          const int quad = square * LANES / 4;
          vec a, m, columns[LANES];
          load_scales(f, group, b, quad, v, &a, &m);
#pragma GCC unroll 4
          for (int i = 0; i < LANES / 4; i++) {
            ivec q = load_quad(f, group, b, quad + i, v);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) columns[4 * i + j] = vec_fma(byte_of_dwords(q, j), a, m);
          }
          store(out, w->cols, column + b * SMALL_BLOCK + square * LANES, v * LANES, rows - v * LANES, columns);
        }
}

/* Rows after each other: out [rows][cols]. */
INLINE void store_f32(void *out, int64_t cols, int64_t column, int row, int rows, const vec columns[LANES]) {
  ivec x[LANES];
  for (int i = 0; i < LANES; i++) x[i] = bits_of(columns[i]);
  transpose(x);
  float *to = (float *)out + row * cols + column;
  for (int r = 0; r < LANES && r < rows; r++) ivec_store(to + r * cols, x[r]);
}

INLINE void expand_rows(struct format f, const struct weight *w, int64_t first, int64_t last, float *out) {
  for (int64_t g = first / GROUP_ROWS; g * GROUP_ROWS < last; g++, out += GROUP_ROWS * w->cols)
    expand_group(f, w, g, rows_of(last, g), store_f32, out);
}

#define FORMAT(type, kind, fifth, minimum, offset) ((struct format){type, kind, fifth, minimum, offset})
#define Q4_0                                       FORMAT(WEIGHT_Q4_0, NIBBLES, false, false, 8)
#define Q4_1                                       FORMAT(WEIGHT_Q4_1, NIBBLES, false, true, 0)
#define Q5_0                                       FORMAT(WEIGHT_Q5_0, NIBBLES, true, false, 16)
#define Q5_1                                       FORMAT(WEIGHT_Q5_1, NIBBLES, true, true, 0)
#define Q8_0                                       FORMAT(WEIGHT_Q8_0, BYTES, false, false, 128)
#define Q4_K                                       FORMAT(WEIGHT_Q4_K, SUPER_NIBBLES, false, true, 0)
#define Q5_K                                       FORMAT(WEIGHT_Q5_K, SUPER_NIBBLES, true, true, 0)
#define Q6_K                                       FORMAT(WEIGHT_Q6_K, SIX_BITS, false, false, 32)

#define KERNELS(name)                                                                                                            \
  static void rows_##name(const struct weight *w, int64_t first, int64_t last, const struct dot_input *in, float *y) {           \
    dot_rows_of(name, w, first, last, in, y);                                                                                    \
  }                                                                                                                              \
  static void f32_##name(const struct weight *w, int64_t first, int64_t last, float *out) {                                      \
    expand_rows(name, w, first, last, out);                                                                                      \
  }
KERNELS(Q4_0)
KERNELS(Q4_1)
KERNELS(Q5_0)
KERNELS(Q5_1)
KERNELS(Q8_0)
KERNELS(Q4_K)
KERNELS(Q5_K)
KERNELS(Q6_K)

#define ALL_TYPES(kind)                                                                                                          \
  {                                                                                                                              \
    [WEIGHT_Q4_0] = kind##_Q4_0, [WEIGHT_Q4_1] = kind##_Q4_1, [WEIGHT_Q5_0] = kind##_Q5_0, [WEIGHT_Q5_1] = kind##_Q5_1,          \
    [WEIGHT_Q8_0] = kind##_Q8_0, [WEIGHT_Q4_K] = kind##_Q4_K, [WEIGHT_Q5_K] = kind##_Q5_K, [WEIGHT_Q6_K] = kind##_Q6_K           \
  }

#endif
