/*
 * rope.c - which channels turn together and how fast (quant/rope.h).
 *
 * The angle of position t = 64 p + j is that of the page's centre plus that from there to j. The latter takes one of 64 values
 * per pair, which lie in a table; the former is put together in double from the angles of the powers of two in p. So neither
 * encoder nor kernel computes a sine, and both see the same numbers whatever the C library.
 */
#include "quant/rope.h"

#include <math.h>
#include <string.h>

oscar_status oscar_rope_create(oscar_context *context, const oscar_rope_spec *spec, oscar_rope **rope) {
  *rope = NULL;
  if (spec->layout != OSCAR_ROPE_ADJACENT && spec->layout != OSCAR_ROPE_HALVES)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "rope: layout %d is neither ADJACENT (0) nor HALVES (1)",
                     (int)spec->layout);
  if (spec->rotary_dim < 2 || spec->rotary_dim % 2 || spec->rotary_dim > OSCAR_MAX_HEAD_DIM)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "rope: rotary_dim %d is not an even number from 2 to %d", spec->rotary_dim,
                     OSCAR_MAX_HEAD_DIM);
  size_t pairs = (size_t)spec->rotary_dim / 2;
  for (size_t i = 0; i < pairs; i++)
    if (!isfinite(spec->frequencies[i])) return set_error(context, OSCAR_NUMERIC, "rope: frequencies[%zu] is not finite", i);
  oscar_rope *r = mem_zalloc(context, 1, sizeof *r);
  if (!r) return OSCAR_NO_MEMORY;
  r->context = context;
  r->references = 1;
  r->spec = *spec;
  size_t table = pairs * 2 * PAGE_TOKENS;
  r->table = mem_alloc(context, table + pairs, sizeof(float));
  r->pages = r->table ? mem_alloc(context, pairs * 2 * (ROPE_PAGE_BITS + 1), sizeof(double)) : NULL;
  if (!r->pages) {
    oscar_rope_release(r);
    return OSCAR_NO_MEMORY;
  }
  r->centres = r->pages + pairs * 2 * ROPE_PAGE_BITS;
  float *frequencies = r->table + table;
  memcpy(frequencies, spec->frequencies, pairs * sizeof(float));
  r->spec.frequencies = frequencies;
  for (size_t i = 0; i < pairs; i++) {
    for (int j = 0; j < PAGE_TOKENS; j++) {
      double angle = (double)frequencies[i] * (j - ROPE_CENTRE);
      r->table[2 * i * PAGE_TOKENS + (size_t)j] = (float)cos(angle);
      r->table[(2 * i + 1) * PAGE_TOKENS + (size_t)j] = (float)sin(angle);
    }
    r->centres[2 * i] = cos((double)frequencies[i] * ROPE_CENTRE);
    r->centres[2 * i + 1] = sin((double)frequencies[i] * ROPE_CENTRE);
  }
  for (size_t bit = 0; bit < ROPE_PAGE_BITS; bit++)
    for (size_t i = 0; i < pairs; i++) {
      double angle = ldexp((double)frequencies[i] * PAGE_TOKENS, (int)bit), *at = r->pages + (bit * pairs + i) * 2;
      at[0] = cos(angle);
      at[1] = sin(angle);
    }
  *rope = r;
  return OSCAR_OK;
}

oscar_rope *oscar_rope_retain(oscar_rope *rope) {
  if (rope) rope->references++;
  return rope;
}

void oscar_rope_release(oscar_rope *rope) {
  if (!rope || --rope->references > 0) return;
  oscar_context *context = rope->context;
  mem_free(context, rope->pages);
  mem_free(context, rope->table);
  mem_free(context, rope);
}

const oscar_rope_spec *oscar_rope_describe(const oscar_rope *rope) { return &rope->spec; }

bool rope_equal(const oscar_rope *a, const oscar_rope *b) {
  if (a == b) return true;
  if (!a || !b || a->spec.layout != b->spec.layout || a->spec.rotary_dim != b->spec.rotary_dim) return false;
  return memcmp(a->spec.frequencies, b->spec.frequencies, (size_t)a->spec.rotary_dim / 2 * sizeof(float)) == 0;
}

void rope_page_angles(const oscar_rope *rope, int n, const uint16_t *pairs, int64_t page, float *cosines, float *sines) {
  double c[OSCAR_MAX_HEAD_DIM / 2], s[OSCAR_MAX_HEAD_DIM / 2];
  for (int i = 0; i < n; i++) {
    c[i] = rope->centres[2 * pairs[i]];
    s[i] = rope->centres[2 * pairs[i] + 1];
  }
  /* Powers of two outside, pairs inside: the turns of one pair wait for each other, those of different pairs do not. */
  for (const double *at = rope->pages; page > 0; page >>= 1, at += rope->spec.rotary_dim) {
    if (!(page & 1)) continue;
    for (int i = 0; i < n; i++) {
      const double *turn = at + 2 * (size_t)pairs[i];
      double turned = c[i] * turn[0] - s[i] * turn[1];
      s[i] = c[i] * turn[1] + s[i] * turn[0];
      c[i] = turned;
    }
  }
  for (int i = 0; i < n; i++) {
    cosines[i] = (float)c[i];
    sines[i] = (float)s[i];
  }
}

void rope_page_angle(const oscar_rope *rope, int pair, int64_t page, float *cosine, float *sine) {
  rope_page_angles(rope, 1, &(uint16_t){(uint16_t)pair}, page, cosine, sine);
}
