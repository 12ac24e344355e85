/*
 * quant/rope.h - rotary position embedding as the codecs with a rotating mean see it. Private.
 */
#ifndef OSCAR_QUANT_ROPE_H
#define OSCAR_QUANT_ROPE_H

#include "base/base.h"
#include <oscar/codec.h>

struct oscar_rope {
  oscar_context *context;
  int references;
  oscar_rope_spec spec; /* frequencies lie behind the table */
  float *table;         /* [rotary_dim/2][cos, sin][64]: of (j - ROPE_CENTRE) * frequency, j the place of a token in its page */
  double *pages;        /* [ROPE_PAGE_BITS][rotary_dim/2][cos, sin]: of 64 * 2^bit * frequency */
  double *centres;      /* [rotary_dim/2][cos, sin]: of ROPE_CENTRE * frequency */
};
#define ROPE_PAGE_BITS 40   /* of page numbers: positions below 2^46 */
#define ROPE_CENTRE    31.5 /* of a page, from its first token: what angles within the page are counted from */

static inline int rope_first(const oscar_rope_spec *r, int pair) { return r->layout == OSCAR_ROPE_HALVES ? pair : 2 * pair; }
static inline int rope_second(const oscar_rope_spec *r, int pair) {
  return r->layout == OSCAR_ROPE_HALVES ? pair + r->rotary_dim / 2 : 2 * pair + 1;
}
/* cos and sin of the pair's angles from the centre of a page to its 64 places; sin follows cos. */
static inline const float *rope_cosines(const oscar_rope *rope, int pair) { return rope->table + (size_t)pair * 2 * PAGE_TOKENS; }
/* Of the angle at the centre of a page. */
void rope_page_angle(const oscar_rope *rope, int pair, int64_t page, float *cosine, float *sine);
/* The same of n pairs: the same numbers sooner. */
void rope_page_angles(const oscar_rope *rope, int n, const uint16_t *pairs, int64_t page, float *cosines, float *sines);
/* Of the angle from one page to the next. */
static inline void rope_page_turn(const oscar_rope *rope, int pair, float *cosine, float *sine) {
  *cosine = (float)rope->pages[2 * pair];
  *sine = (float)rope->pages[2 * pair + 1];
}
bool rope_equal(const oscar_rope *a, const oscar_rope *b); /* the same turning; both may be NULL */

#endif
