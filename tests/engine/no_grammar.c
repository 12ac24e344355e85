/* no_grammar.c - in the place of engine/grammar.h for tests of answers that keep to none. */
#include "engine/grammar.h"

#include <stdlib.h>

#define STAND_IN __attribute__((weak))

STAND_IN oscar_status token_table_create(const struct tokenizer *tokenizer, const int32_t *visible, int n_visible,
                                         struct token_table **table) {
  (void)tokenizer, (void)visible, (void)n_visible, (void)table;
  abort();
}
STAND_IN void token_table_free(struct token_table *table) {
  (void)table;
  abort();
}
STAND_IN oscar_status grammar_state_create(const struct grammar *grammar, const struct token_table *table,
                                           struct grammar_state **state) {
  (void)grammar, (void)table, (void)state;
  abort();
}
STAND_IN void grammar_state_free(struct grammar_state *state) {
  (void)state;
  abort();
}
STAND_IN bool grammar_must_end(const struct grammar_state *state) {
  (void)state;
  abort();
}
STAND_IN oscar_status grammar_allowed(struct grammar_state *state, uint64_t *allowed) {
  (void)state, (void)allowed;
  abort();
}
STAND_IN oscar_status grammar_accept(struct grammar_state *state, int32_t id) {
  (void)state, (void)id;
  abort();
}
