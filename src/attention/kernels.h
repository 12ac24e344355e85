/*
 * attention/kernels.h - the arithmetic of attention on one page, tables per instruction set. Private.
 *
 * A page is 64 tokens of one KV head. Rows are queries that share that KV head: (position, query head) pairs, 1 .. MAX_ROWS of
 * them. Queries arrive multiplied by the scale of the scores. Nothing here allocates; `panel` is the caller's work space of
 * panel_bytes, 64-byte aligned, whose contents a kernel need not find again.
 *
 * Page kernels with `row_block` above 1 are for CPUs that multiply matrices and for at least MANY_ROWS rows of many tokens;
 * scores, sums and prepared queries have rows up to the next multiple of row_block, which they write too.
 */
#ifndef OSCAR_ATTENTION_KERNELS_H
#define OSCAR_ATTENTION_KERNELS_H

#include "attention/waves.h"
#include "quant/page_form.h"

#define MAX_ROWS  64
#define MANY_ROWS 16

/* Rows of the map of a codec of this form (codec.h): C crumbs, groups offsets, the mean, rotating pairs, padding. */
static inline int form_rows(const struct side_form *f) {
  return (int)round_up((size_t)(f->crumbs + f->groups + 1 + 2 * f->rotating_pairs), 16);
}
/* The first of the rotating pairs' rows. */
static inline int form_rotating_row(const struct side_form *f) { return f->crumbs + f->groups + 1; }

/* Queries of a tile. */
struct query_rows {
  int rows;
  int head_dim;
  const float *q;          /* [rows][head_dim] */
  const float *mapped;     /* [rows][form_rows(keys)]: q map^T; NULL when no coded page is read */
  const uint8_t *prepared; /* [rows][prepared_stride]: what prepare_queries made of both */
  size_t prepared_stride;
};

/* Running softmax of one row. Masked and empty rows keep max = -inf, sum = 0. */
struct softmax_state {
  float max;
  float sum;     /* of exp(score - max) */
  float rescale; /* out: what earlier accumulators must be multiplied with after this page */
  int lo, hi;    /* in: tokens [lo, hi) of the page are seen; hi <= lo: none */
};

struct page_kernels {
  const char *name;
  int row_block;

  /* Around the work of one thread with the kernels below; NULL: nothing to do. */
  void (*begin)(void);
  void (*end)(void);

  /* Work space. `keys` and `values` are NULL when no page is coded. */
  size_t (*panel_bytes)(int head_dim, const struct side_form *keys, const struct side_form *values);

  /* Bytes per row that prepare_queries writes: queries in the form that scores are made from. A multiple of 64, may be 0. */
  size_t (*prepared_bytes)(int head_dim, const struct side_form *keys);
  void (*prepare_queries)(const struct query_rows *queries, const struct side_form *keys, uint8_t *prepared);

  /* scores [rows][64] = queries times the keys of a page (exact: [64][head_dim] BF16; coded: the packed side). Without a stored z
   * column C + p of `mapped` is 1.5 times the sum of the columns of group p, as a map has it, and kernels may use either. */
  void (*score_exact)(const struct query_rows *queries, const uint16_t *keys, float *scores, float *panel);
  void (*score_coded)(const struct query_rows *queries, const struct side_form *form, const uint8_t *keys, float *scores,
                      float *panel);

  /* scores [rows][64] += the rotating mean's part (waves.h) on the page at whose centre the pairs' angles are `angle`: cos of
   * every pair, then sin. */
  void (*score_waves)(const struct query_rows *queries, const struct side_form *form, const struct wave_basis *basis,
                      const float *angle, float *scores, float *panel);

  /* out [rows][stride] += p [rows][64] times the values of a page. Coded: the first form_rows(values) columns of a row collect
   * A [C], -Z [groups] and the sum of p (codec.h); without a stored z, A and Z may both leave out what cancels in A - 1.5 Z, the
   * sum over crumbs counted from their middle. Exact: only the first `tokens` of the page hold
   * anything; what lies behind may be NaN, which a probability of 0 would not silence. */
  void (*accumulate_exact)(int rows, int head_dim, int tokens, const float *p, const uint16_t *values, float *out, int stride,
                           float *panel);
  void (*accumulate_coded)(int rows, const struct side_form *form, const float *p, const uint8_t *values, float *out, int stride,
                           float *panel);
};

struct attention_kernels {
  struct page_kernels pages;

  /* scores [rows][64] become probabilities exp(score - new max), 0 outside [lo, hi); max and sum are brought forward. */
  void (*softmax)(int rows, float *scores, struct softmax_state *states);

  /* out [rows][n] = a [rows][k] times b [n][k] transposed; n and k multiples of 16 */
  void (*multiply_transposed)(int rows, int n, int k, const float *a, const float *b, float *out);
  /* out [rows][out_stride] += a [rows][a_stride] times b [k][n]; n a multiple of 16 */
  void (*multiply_add)(int rows, int n, int k, const float *a, int a_stride, const float *b, float *out, int out_stride);
};

/* The table of functions that have the names of its fields. */
#define ATTENTION_KERNELS(label)                                                                                                 \
  {                                                                                                                              \
    .pages = {.name = (label),                                                                                                   \
              .row_block = 1,                                                                                                    \
              .panel_bytes = panel_bytes,                                                                                        \
              .prepared_bytes = prepared_bytes,                                                                                  \
              .prepare_queries = prepare_queries,                                                                                \
              .score_exact = score_exact,                                                                                        \
              .score_coded = score_coded,                                                                                        \
              .score_waves = score_waves,                                                                                        \
              .accumulate_exact = accumulate_exact,                                                                              \
              .accumulate_coded = accumulate_coded},                                                                             \
    .softmax = softmax, .multiply_transposed = multiply_transposed, .multiply_add = multiply_add                                 \
  }

/* Metadata of 16 tokens: value 0 is s, value 1 is z; with log gains (meta_values 0) there is one word for all groups. */
static inline const uint16_t *tile_meta(const struct side_form *f, const uint8_t *side, int tile, int group, int value) {
  const uint16_t *meta = (const uint16_t *)(const void *)(side + side_code_bytes(f));
  return meta + (tile * side_meta_words(f) + group * f->meta_values + value) * 16;
}
/* First crumb of a group. */
static inline int form_group_begin(const struct side_form *f, int group) { return group_begin(f->crumbs, f->groups, group); }

extern const struct attention_kernels attention_kernels_portable;
#if defined(__x86_64__)
extern const struct attention_kernels attention_kernels_avx2;
extern const struct attention_kernels attention_kernels_avx_vnni; /* for CPUs with AVX2 too */
extern const struct attention_kernels attention_kernels_avx512;
extern const struct page_kernels page_kernels_amx;
extern const struct page_kernels page_kernels_avx512_bf16;
extern const struct page_kernels page_kernels_vector_tiles; /* for tests */
#elif defined(__aarch64__)
extern const struct attention_kernels attention_kernels_neon_dot;
#endif

const struct attention_kernels *attention_kernels_for(const struct cpu_features *cpu);
/* For tiles of many rows; NULL where those of attention_kernels_for serve them best. */
const struct page_kernels *page_kernels_for_many(const struct cpu_features *cpu);
/* "attention: AVX-512 VNNI kernels, AMX BF16 for many tokens" */
void attention_kernels_describe(const struct cpu_features *cpu, char *text, size_t bytes);

#endif
