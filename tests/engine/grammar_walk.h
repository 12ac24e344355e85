/* tests/engine/grammar_walk.h - vocabularies and walks that the tests of grammars share. */
#ifndef OSCAR_GRAMMAR_WALK_H
#define OSCAR_GRAMMAR_WALK_H

#include "support.h"

#include "engine/grammar/automaton.h"

/* All 256 bytes, some pieces of several, `more` [n_more], and as the last token the end. */
struct test_vocabulary {
  struct token_spelling spelling[4096];
  char room[4096][12];
  int n;
  int32_t end;
  struct token_table *table;
};

static inline void vocabulary_add(struct test_vocabulary *v, const char *text, size_t bytes) {
  assert_true(v->n < 4096 && bytes <= sizeof v->room[0]);
  memcpy(v->room[v->n], text, bytes);
  v->spelling[v->n] = (struct token_spelling){v->room[v->n], bytes, false};
  v->n++;
}

static inline struct test_vocabulary *vocabulary_make(const char *alphabet, int pieces, const char *const *more, int n_more,
                                                      uint64_t seed) {
  struct test_vocabulary *v = calloc(1, sizeof *v);
  const size_t letters = strlen(alphabet);
  for (int b = 0; b < 256; b++) vocabulary_add(v, &(const char){(char)b}, 1);
  for (int i = 0; i < pieces; i++) {
    char piece[8];
    const size_t n = 2 + test_random(&seed) % 4;
    for (size_t k = 0; k < n; k++) piece[k] = alphabet[test_random(&seed) % letters];
    vocabulary_add(v, piece, n);
  }
  for (int i = 0; i < n_more; i++) vocabulary_add(v, more[i], strlen(more[i]));
  vocabulary_add(v, "", 0); /* a control token: no text */
  v->end = v->n;
  vocabulary_add(v, "<end>", 5);
  v->spelling[v->end].ends = true;
  assert_int_equal(token_table_build(v->n, v->spelling, &v->table), OSCAR_OK);
  return v;
}

static inline void vocabulary_free_all(struct test_vocabulary *v) {
  token_table_free(v->table);
  free(v);
}

static inline bool bit_of(const uint64_t *bits, int i) { return bits[i / 64] >> (i % 64) & 1; }

/* The text is a sentence of the grammar, or the beginning of one. */
enum fit { FITS_NOT, FITS_BEGINNING, FITS_SENTENCE };
static inline enum fit grammar_fit(const struct grammar *g, const struct token_table *table, const char *text, size_t bytes) {
  struct automaton *a = automaton_of(g, table);
  assert_non_null(a);
  const int32_t s = automaton_steps(a, automaton_begin(a), text, bytes);
  assert_int_equal(automaton_status(a), OSCAR_OK);
  return s == DEAD ? FITS_NOT : automaton_accepts(a, s) ? FITS_SENTENCE : FITS_BEGINNING;
}

/* The allowed tokens are those that are allowed one by one. */
static inline int check_mask(struct grammar_state *state, const struct token_table *t, uint64_t *allowed) {
  int n = 0;
  assert_int_equal(grammar_allowed(state, allowed), OSCAR_OK);
  for (int32_t id = 0; id < t->vocab; id++) {
    const bool one = grammar_allows(state, id);
    if (one != bit_of(allowed, id)) fail_msg("token %d: %d alone, %d in the mask", (int)id, one, bit_of(allowed, id));
    n += one;
  }
  return n;
}

#endif
