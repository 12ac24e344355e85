/* tests/engine/fuzz_grammar.h - a walk through a grammar, steered by bytes. */
#ifndef OSCAR_FUZZ_GRAMMAR_H
#define OSCAR_FUZZ_GRAMMAR_H

#include "engine/grammar/grammar_impl.h"

#include <stdlib.h>
#include <string.h>

enum { FUZZ_VOCABULARY = 300 };

/* All bytes, some longer pieces, an end. */
static inline const struct token_table *fuzz_table(void) {
  static struct token_table *table;
  static const char *const pieces[] = {"{\"", "\": ", "\", \"",   "\"}",      "]}", "true",
                                       "aa",  "ab",   "\xC3\xA9", "\xE6\x97", "12", "\\u00"};
  static char bytes[256];
  struct token_spelling spellings[FUZZ_VOCABULARY] = {0};
  if (table) return table;
  for (int i = 0; i < 256; i++) {
    bytes[i] = (char)i;
    spellings[i] = (struct token_spelling){&bytes[i], 1, false};
  }
  for (size_t i = 0; i < sizeof pieces / sizeof pieces[0]; i++)
    spellings[256 + i] = (struct token_spelling){pieces[i], strlen(pieces[i]), false};
  spellings[FUZZ_VOCABULARY - 1].ends = true;
  if (token_table_build(FUZZ_VOCABULARY, spellings, &table) != OSCAR_OK) abort();
  return table;
}

/* Whatever the grammar, a text that can be begun can be ended: some token fits, or the text may end. */
static inline void walk_grammar(const struct grammar *g, const uint8_t *data, size_t n) {
  struct grammar_state *s;
  uint64_t allowed[(FUZZ_VOCABULARY + 63) / 64];
  if (grammar_state_create(g, fuzz_table(), &s) != OSCAR_OK) return;
  for (size_t i = 0; i < n && i < 40; i++) {
    if (grammar_allowed(s, allowed) != OSCAR_OK) break;
    int32_t few[FUZZ_VOCABULARY], n_few = 0;
    for (int32_t id = 0; id < FUZZ_VOCABULARY; id++) {
      const bool one = allowed[id / 64] >> (id % 64) & 1;
      if (i % 8 == 0 && one != grammar_allows(s, id)) __builtin_trap();
      if (one && id != FUZZ_VOCABULARY - 1) few[n_few++] = id;
    }
    if ((n_few == 0) != grammar_must_end(s) || (n_few == 0 && !grammar_may_end(s))) __builtin_trap();
    if (n_few == 0) break;
    if (grammar_accept(s, few[data[i] % n_few]) != OSCAR_OK) __builtin_trap();
  }
  grammar_state_free(s);
}

#endif
