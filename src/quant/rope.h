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
  float *table;         /* [rotary_dim/2][cos, sin][64]: of j * frequency, j the place of a token in its page */
  double *pages;        /* [ROPE_PAGE_BITS][rotary_dim/2][cos, sin]: of 64 * 2^bit * frequency */
};
#define ROPE_PAGE_BITS 40 /* of page numbers: positions below 2^46 */

static inline int rope_first(const oscar_rope_spec *r, int pair) { return r->layout == OSCAR_ROPE_HALVES ? pair : 2 * pair; }
static inline int rope_second(const oscar_rope_spec *r, int pair) {
  return r->layout == OSCAR_ROPE_HALVES ? pair + r->rotary_dim / 2 : 2 * pair + 1;
}
/* cos and sin of the pair's angles at the 64 places of a page; sin follows cos. */
static inline const float *rope_cosines(const oscar_rope *rope, int pair) { return rope->table + (size_t)pair * 2 * PAGE_TOKENS; }
/* Of the angle at the first position of a page. */
void rope_page_angle(const oscar_rope *rope, int pair, int64_t page, float *cosine, float *sine);
bool rope_equal(const oscar_rope *a, const oscar_rope *b); /* the same turning; both may be NULL */

#endif
