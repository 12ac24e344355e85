/*
 * packed_avx512.c - packed weights (packed.h) with AVX-512 and VNNI: a lane is a row.
 *
 * A product takes up to four tokens at a time. Per run of columns with one scale, VPDPBUSD adds up codes times the high and the
 * low bytes of the activations (dot.h), whose four bytes every lane shares; then the scales of 16 rows meet one vector.
 */
#include "backend/cpu/packed.h"

#include "backend/blocks.h"
#include "base/transpose16.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define TOKENS 4 /* at a time; two where a run of sums takes twice the registers */

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

INLINE __m512i load_vector(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE __m512i low_halves(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE __m512i high_halves(__m512i v) { return low_halves(_mm512_srli_epi16(v, 4)); }
/* Sets bit 4 where the word has a one. */
INLINE __m512i add_fifth(__m512i q, const uint8_t *word) {
  uint64_t mask;
  memcpy(&mask, word, sizeof mask);
  return _mm512_mask_add_epi8(q, mask, q, _mm512_set1_epi8(16));
}
INLINE __m512 load_halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
INLINE __m512 load_bytes(const uint8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
INLINE __m512 load_signed_bytes(const uint8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

/* Integer sums of a run, for every token. */
struct run {
  __m512i high[TOKENS], low[TOKENS];
};

INLINE void clear(struct run *s, int n) {
  for (int t = 0; t < n; t++) s->high[t] = s->low[t] = _mm512_setzero_si512();
}

INLINE __m512i four_bytes(const int8_t *p) {
  int32_t x;
  memcpy(&x, p, sizeof x);
  return _mm512_set1_epi32(x);
}

/* Codes of four columns times those of the activations of n tokens, which lie `stride` chunks apart; `at` is in x's chunk. */
INLINE void add_columns(__m512i q, const struct act_chunk *x, int64_t stride, int at, int n, struct run *s) {
  for (int t = 0; t < n; t++) {
    s->high[t] = _mm512_dpbusd_epi32(s->high[t], q, four_bytes(x[t * stride].high + at));
    s->low[t] = _mm512_dpbusd_epi32(s->low[t], q, four_bytes(x[t * stride].low + at));
  }
}

INLINE __m512 total(const struct run *s, int t) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(s->high[t], 7), s->low[t]));
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

/* Codes of those four columns. */
INLINE __m512i load_quad(struct format f, const uint8_t *unit, int block, int i) {
  const uint8_t *codes = part_at(f, unit, block, i);
  __m512i q;
  if (f.kind == BYTES) {
    q = load_vector(codes + i * VECTOR);
  } else if (f.kind == NIBBLES) {
    __m512i v = load_vector(codes + i % 4 * VECTOR);
    q = i < 4 ? low_halves(v) : high_halves(v);
  } else if (f.kind == SUPER_NIBBLES) {
    __m512i v = load_vector(codes + i * VECTOR);
    q = block % 2 == 0 ? low_halves(v) : high_halves(v);
  } else {
    int quarter = block % 4;
    __m512i v = load_vector(codes + (i % 4 * 3 + quarter % 2) * VECTOR);
    __m512i upper = load_vector(codes + (i % 4 * 3 + 2) * VECTOR);
    upper = quarter < 2 ? _mm512_slli_epi16(upper, 4 - 2 * quarter) : _mm512_srli_epi16(upper, 2 * quarter - 4);
    q = quarter < 2 ? low_halves(v) : high_halves(v);
    q = _mm512_ternarylogic_epi64(q, upper, _mm512_set1_epi8(0x30), 0xF8); /* q | (upper & 0x30) */
  }
  const struct packed_form form = packed_form_of(f.type);
  return f.fifth ? add_fifth(q, codes + form.codes + block % 2 * VECTOR + 8 * i) : q;
}

INLINE int blocks_of(struct format f) { return packed_form_of(f.type).columns / SMALL_BLOCK; }

/* ---- products ---- */

/* What a unit's runs add up to before the factors that all of its columns share: times d, and times dmin or m. */
struct unit_sums {
  __m512 part[TOKENS], minima[TOKENS];
};

/* Part p of a unit, whose columns begin at `column` of the activations' chunks. Blocks that share vectors are summed side by
 * side: two of SUPER_NIBBLES; of SIX_BITS a run of four. */
INLINE void dot_part(struct format f, const uint8_t *unit, int p, const struct act_chunk *x, int64_t stride, int column, int n,
                     struct unit_sums *u) {
  const int blocks = f.kind == SIX_BITS ? 4 : f.kind == SUPER_NIBBLES ? 2 : 1, quads = f.kind == SIX_BITS ? 4 : 8;
  const int block = f.kind == SIX_BITS ? p / 2 * 4 : p * blocks, quad = f.kind == SIX_BITS ? p % 2 * 4 : 0;
  struct run s[4];
#pragma GCC unroll 4
  for (int b = 0; b < blocks; b++) clear(&s[b], n);
#pragma GCC unroll 8
  for (int i = quad; i < quad + quads; i++)
#pragma GCC unroll 4
    for (int b = 0; b < blocks; b++)
      add_columns(load_quad(f, unit, block + b, i), x, stride, column + SMALL_BLOCK * (block + b) + 4 * i, n, &s[b]);
#pragma GCC unroll 4
  for (int b = 0; b < blocks; b++) {
    const int at = (column + SMALL_BLOCK * (block + b)) / RUN;
    const uint8_t *scales = scales_at(f, unit, block + b, quad);
    for (int t = 0; t < n; t++) {
      const struct act_chunk *c = x + t * stride;
      __m512 scale = _mm512_set1_ps(c->scale[at]), sum = total(&s[b], t);
      if (f.kind == SIX_BITS) {
        sum = _mm512_fmadd_ps(sum, scale, _mm512_set1_ps(-f.offset * c->sum[at + quad / 4]));
        u->part[t] = _mm512_fmadd_ps(sum, load_signed_bytes(scales), u->part[t]);
        continue;
      }
      const float both = c->sum[at] + c->sum[at + 1];
      if (f.kind == SUPER_NIBBLES) {
        u->part[t] = _mm512_fmadd_ps(_mm512_mul_ps(sum, scale), load_bytes(scales), u->part[t]);
        u->minima[t] = _mm512_fnmadd_ps(_mm512_set1_ps(both), load_bytes(scales + 2 * GROUP_ROWS), u->minima[t]);
      } else if (f.minimum) {
        u->part[t] = _mm512_mul_ps(sum, scale);
        u->minima[t] = _mm512_set1_ps(both);
      } else {
        u->part[t] = _mm512_fmadd_ps(sum, scale, _mm512_set1_ps(-f.offset * both));
      }
    }
  }
}

/* One group times n tokens, whose chunks are `stride` apart. */
INLINE void dot_group(struct format f, const uint8_t *group, int64_t cols, const struct act_chunk *x, int64_t stride, int n,
                      __mmask16 rows, float *y, int64_t y_stride) {
  const struct packed_form form = packed_form_of(f.type);
  __m512 sums[TOKENS];
  for (int t = 0; t < n; t++) sums[t] = _mm512_setzero_ps();
  for (int64_t column = 0; column < cols; column += form.columns, group += packed_unit_bytes(&form)) {
    struct unit_sums u;
    for (int t = 0; t < n; t++) u.part[t] = u.minima[t] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int p = 0; p < form.parts; p++) {
      const size_t share = packed_unit_bytes(&form) / (size_t)form.parts; /* all at once would wait for each other */
      prefetch_ahead(group + (size_t)p * share, share);
      dot_part(f, group, p, x + column / CHUNK, stride, (int)(column % CHUNK), n, &u);
    }
    const uint8_t *factors = factors_at(f, group);
    __m512 d = load_halves(factors), m = f.minimum ? load_halves(factors + 2 * GROUP_ROWS) : _mm512_setzero_ps();
    for (int t = 0; t < n; t++) {
      sums[t] = _mm512_fmadd_ps(d, u.part[t], sums[t]);
      if (f.minimum) sums[t] = _mm512_fmadd_ps(m, u.minima[t], sums[t]);
    }
  }
  for (int t = 0; t < n; t++) _mm512_mask_storeu_ps(y + t * y_stride, rows, sums[t]);
}

INLINE __mmask16 rows_of(const struct weight *w, int64_t g) {
  int64_t left = w->rows - g * GROUP_ROWS;
  return left >= GROUP_ROWS ? 0xFFFF : (__mmask16)((1u << left) - 1);
}

INLINE void dot_rows_of(struct format f, const struct weight *w, int64_t first, int64_t last, const struct dot_input *in,
                        float *y) {
  const struct packed_form form = packed_form_of(f.type);
  const int64_t stride = in->chunks_per_token;
  for (int64_t g = first / GROUP_ROWS; g * GROUP_ROWS < last; g++) {
    const uint8_t *group = group_at(&form, w, g);
    __mmask16 rows = rows_of(w, g);
    const struct act_chunk *x = in->chunks;
    float *to = y + g * GROUP_ROWS;
    int left = in->n;
    for (; left >= 4; left -= 4, x += 4 * stride, to += 4 * w->rows)
      dot_group(f, group, w->cols, x, stride, 4, rows, to, w->rows);
    for (; left >= 2; left -= 2, x += 2 * stride, to += 2 * w->rows)
      dot_group(f, group, w->cols, x, stride, 2, rows, to, w->rows);
    if (left) dot_group(f, group, w->cols, x, stride, 1, rows, to, w->rows);
  }
}

/* ---- expansion ---- */

/* Scale and minimum of the rows, w = a q + m, for the columns from 32 block + 4 i on: one rounding of a q + m is one of the exact
 * value, as in weight_dequantize. */
INLINE void load_scales(struct format f, const uint8_t *unit, int block, int i, __m512 *a, __m512 *m) {
  const uint8_t *factors = factors_at(f, unit), *scales = scales_at(f, unit, block, i);
  *a = load_halves(factors);
  *m = f.minimum ? load_halves(factors + 2 * GROUP_ROWS) : _mm512_setzero_ps();
  if (f.kind == SIX_BITS) *a = _mm512_mul_ps(*a, load_signed_bytes(scales));
  if (f.kind == SUPER_NIBBLES) {
    *a = _mm512_mul_ps(*a, load_bytes(scales));
    *m = _mm512_fnmadd_ps(*m, load_bytes(scales + 2 * GROUP_ROWS), _mm512_setzero_ps());
  }
  if (!f.minimum) *m = _mm512_mul_ps(*a, _mm512_set1_ps(-f.offset));
}

/* Column j of four: a float of every row. */
INLINE __m512 expand_column(__m512i q, int j, __m512 a, __m512 m) {
  __m512i code = _mm512_and_si512(_mm512_srli_epi32(q, (unsigned)(8 * j)), _mm512_set1_epi32(255));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), a, m);
}

/* Calls store(out, cols, column, rows, columns) for every 16 columns of a group; `columns` has a vector for each. */
typedef void store_columns(void *out, int64_t cols, int64_t column, int rows, const __m512 columns[16]);
INLINE void expand_group(struct format f, const struct weight *w, int64_t g, int rows, store_columns *store, void *out) {
  const struct packed_form form = packed_form_of(f.type);
  const uint8_t *group = group_at(&form, w, g);
  for (int64_t column = 0; column < w->cols; column += form.columns, group += packed_unit_bytes(&form))
#pragma GCC unroll 8
    for (int b = 0; b < blocks_of(f); b++)
#pragma GCC unroll 2
      for (int part = 0; part < 2; part++) {
        __m512 a, m, columns[16];
        load_scales(f, group, b, 4 * part, &a, &m);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          __m512i q = load_quad(f, group, b, 4 * part + i);
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) columns[4 * i + j] = expand_column(q, j, a, m);
        }
        store(out, w->cols, column + b * SMALL_BLOCK + 16 * part, rows, columns);
      }
}

/* Rows after each other: out [rows][cols]. */
INLINE void store_f32(void *out, int64_t cols, int64_t column, int rows, const __m512 columns[16]) {
  __m512i x[16];
  for (int i = 0; i < 16; i++) x[i] = _mm512_castps_si512(columns[i]);
  transpose(x);
  for (int r = 0; r < rows; r++) _mm512_storeu_si512((float *)out + r * cols + column, x[r]);
}

INLINE void expand_rows(struct format f, const struct weight *w, int64_t first, int64_t last, float *out) {
  for (int64_t row = first; row < last; row += GROUP_ROWS, out += GROUP_ROWS * w->cols)
    expand_group(f, w, row / GROUP_ROWS, last - row < GROUP_ROWS ? (int)(last - row) : GROUP_ROWS, store_f32, out);
}

/* Made only on CPUs that have AVX512-BF16 too. */
#define BF16_CPU __attribute__((target("avx512bf16")))

/* Pairs of columns, rounded to nearest even, into their places in the blocks of a panel. */
BF16_CPU INLINE void store_pairs(void *out, int64_t cols, int64_t column, int rows, const __m512 columns[16]) {
  (void)cols, (void)rows;
  uint16_t *to = (uint16_t *)out + column / PANEL_COLS * PANEL_BLOCK + column % PANEL_COLS * PANEL_ROWS;
  _Alignas(64) static const uint16_t beside[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int i = 0; i < 16; i += 2, to += 2 * PANEL_ROWS) {
    __m512bh rounded = _mm512_cvtne2ps_pbh(columns[i + 1], columns[i]);
    __m512i bits;
    memcpy(&bits, &rounded, sizeof bits);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(beside), bits));
  }
}

BF16_CPU INLINE void expand_stripe_of(struct format f, const struct weight *w, int64_t first, int count, uint16_t *out) {
  if (count > 0) {
    expand_group(f, w, first / GROUP_ROWS, count, store_pairs, out);
    return;
  }
  for (int64_t k = 0; k < w->cols; k += 2)
    memset(out + k / PANEL_COLS * PANEL_BLOCK + k % PANEL_COLS * PANEL_ROWS, 0, 2 * STRIPE_ROWS * sizeof *out);
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
  }                                                                                                                              \
  BF16_CPU static void stripe_##name(const struct weight *w, int64_t first, int count, uint16_t *out) {                          \
    expand_stripe_of(name, w, first, count, out);                                                                                \
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

const struct packed_kernels packed_avx512 = {.rows = ALL_TYPES(rows), .f32 = ALL_TYPES(f32), .stripe = ALL_TYPES(stripe)};
