/*
 * attention/kernels.h - the arithmetic of attention on one page, one table per instruction set. Private.
 *
 * A page is 64 tokens of one KV head. Rows are queries that share that KV head: (position, query head) pairs, 1 .. MAX_ROWS of
 * them. Queries arrive multiplied by the scale of the scores. Nothing here allocates; `panel` is the caller's work space of
 * panel_floats() floats, which holds at most one page expanded to float.
 */
#ifndef OSCAR_ATTENTION_KERNELS_H
#define OSCAR_ATTENTION_KERNELS_H

#include "quant/page_form.h"

#define MAX_ROWS 64

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
  const uint8_t *prepared; /* what prepare_queries made of `mapped` */
};

/* Running softmax of one row. Masked and empty rows keep max = -inf, sum = 0. */
struct softmax_state {
  float max;
  float sum;     /* of exp(score - max) */
  float rescale; /* out: what earlier accumulators must be multiplied with after this page */
  int lo, hi;    /* in: tokens [lo, hi) of the page are seen; hi <= lo: none */
};

struct attention_kernels {
  /* Bytes per row that prepare_queries writes: queries in the form score_coded multiplies with. A multiple of 64, may be 0. */
  size_t (*prepared_bytes)(const struct side_form *keys);
  void (*prepare_queries)(const struct side_form *keys, int rows, const float *mapped, uint8_t *prepared);

  /* scores [rows][64] = queries times the keys of a page (exact: [64][head_dim] BF16; coded: the packed side). */
  void (*score_exact)(const struct query_rows *queries, const uint16_t *keys, float *scores, float *panel);
  void (*score_coded)(const struct query_rows *queries, const struct side_form *form, const uint8_t *keys, float *scores,
                      float *panel);

  /* The rotating mean's part of the scores of a coded page. `waves` [rows][2 pairs]: for every pair the amplitudes of cos, then
   * for every pair those of sin, as they are at the page's first token.
   * turn_waves: waves at an angle -> waves at that angle plus (turn[k] = cos, turn[pairs + k] = sin) further on.
   * score_waves: scores [rows][64] += sum over pairs of the amplitudes times the pair's cos and sin at the page's places:
   * table [pair][cos, sin][64] (rope.h), of which pair[k] is used. */
  void (*turn_waves)(int rows, int pairs, const float *turn, const float *from, int from_stride, float *waves);
  void (*score_waves)(int rows, int pairs, const float *waves, const float *table, const uint16_t *pair, float *scores);

  /* scores [rows][64] become probabilities exp(score - new max), 0 outside [lo, hi); max and sum are brought forward. */
  void (*softmax)(int rows, float *scores, struct softmax_state *states);

  /* out [rows][stride] += p [rows][64] times the values of a page. Coded: the first form_rows(values) columns of a row collect
   * A [C], -Z [groups] and the sum of p (codec.h). Exact: only the first `tokens` of the page hold
   * anything; what lies behind may be NaN, which a probability of 0 would not silence. */
  void (*accumulate_exact)(int rows, int head_dim, int tokens, const float *p, const uint16_t *values, float *out, int stride,
                           float *panel);
  void (*accumulate_coded)(int rows, const struct side_form *form, const float *p, const uint8_t *values, float *out, int stride,
                           float *panel);

  /* out [rows][n] = a [rows][k] times b [n][k] transposed; n and k multiples of 16 */
  void (*multiply_transposed)(int rows, int n, int k, const float *a, const float *b, float *out);
  /* out [rows][out_stride] += a [rows][a_stride] times b [k][n]; n a multiple of 16 */
  void (*multiply_add)(int rows, int n, int k, const float *a, int a_stride, const float *b, float *out, int out_stride);
};

static inline size_t panel_floats(int head_dim, const struct side_form *keys, const struct side_form *values) {
  int width = head_dim;
  if (keys && form_rows(keys) > width) width = form_rows(keys);
  if (values && form_rows(values) > width) width = form_rows(values);
  return (size_t)PAGE_TOKENS * (size_t)width;
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
extern const struct attention_kernels attention_kernels_avx512;
#endif

/* The table for the instruction set the context has chosen. */
const struct attention_kernels *attention_kernels_for(oscar_isa isa);

#endif
