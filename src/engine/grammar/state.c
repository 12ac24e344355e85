/* state.c - one answer on its way through a grammar: a situation of the automaton, held while the answer lives. */
#include "engine/grammar/automaton.h"

#include <stdlib.h>

struct grammar_state {
  const struct grammar *grammar;
  const struct token_table *table;
  struct automaton *automaton;
  struct situation_holder holder;
  bool ended; /* a token that ends the turn was taken */
};

static void lock(const struct grammar_state *s) { (void)pthread_mutex_lock(&s->grammar->cache->lock); }
static void unlock(const struct grammar_state *s) { (void)pthread_mutex_unlock(&s->grammar->cache->lock); }

oscar_status grammar_state_create(const struct grammar *grammar, const struct token_table *table, struct grammar_state **state) {
  *state = NULL;
  struct grammar_state *s = calloc(1, sizeof *s);
  if (!s) return OSCAR_NO_MEMORY;
  s->grammar = grammar;
  s->table = table;
  lock(s);
  oscar_status status = OSCAR_NO_MEMORY;
  s->automaton = automaton_of(grammar, table);
  if (s->automaton) {
    s->holder.situation = automaton_begin(s->automaton);
    status = automaton_status(s->automaton);
  }
  if (status == OSCAR_OK) automaton_hold(s->automaton, &s->holder);
  unlock(s);
  if (status == OSCAR_OK)
    *state = s;
  else
    free(s);
  return status;
}

oscar_status grammar_state_copy(const struct grammar_state *state, struct grammar_state **copy) {
  *copy = malloc(sizeof **copy);
  if (!*copy) return OSCAR_NO_MEMORY;
  lock(state);
  **copy = *state;
  automaton_hold((*copy)->automaton, &(*copy)->holder);
  unlock(state);
  return OSCAR_OK;
}

void grammar_state_free(struct grammar_state *s) {
  if (!s) return;
  lock(s);
  automaton_release(s->automaton, &s->holder);
  unlock(s);
  free(s);
}

bool grammar_may_end(const struct grammar_state *s) {
  lock(s);
  const bool may = !s->ended && automaton_accepts(s->automaton, s->holder.situation);
  unlock(s);
  return may;
}

bool grammar_must_end(const struct grammar_state *s) {
  lock(s);
  const bool must = s->ended || !automaton_goes_on(s->automaton, s->holder.situation);
  unlock(s);
  return must;
}

oscar_status grammar_allowed(struct grammar_state *s, uint64_t *allowed) {
  const int words = (s->table->vocab + 63) / 64;
  if (s->ended) {
    for (int i = 0; i < words; i++) allowed[i] = 0;
    return OSCAR_OK;
  }
  lock(s);
  oscar_status status = automaton_tidy(s->automaton);
  if (status == OSCAR_OK) status = automaton_allowed(s->automaton, s->holder.situation, allowed);
  const bool may_end = status == OSCAR_OK && automaton_accepts(s->automaton, s->holder.situation);
  unlock(s);
  for (int i = 0; may_end && i < words; i++) allowed[i] |= s->table->ends[i];
  return status;
}

/* The situation after a token; DEAD if it does not fit, -1 after an error. */
static int32_t situation_after(const struct grammar_state *s, int32_t id) {
  const uint32_t begin = s->table->offset[id], end = s->table->offset[id + 1];
  return begin == end ? DEAD : automaton_steps(s->automaton, s->holder.situation, s->table->text + begin, end - begin);
}

static bool in_vocabulary(const struct grammar_state *s, int32_t id) { return id >= 0 && id < s->table->vocab && !s->ended; }

bool grammar_allows(const struct grammar_state *s, int32_t id) {
  if (!in_vocabulary(s, id)) return false;
  if (token_ends(s->table, id)) return grammar_may_end(s);
  lock(s);
  const bool fits = situation_after(s, id) > DEAD;
  (void)automaton_status(s->automaton);
  unlock(s);
  return fits;
}

oscar_status grammar_accept(struct grammar_state *s, int32_t id) {
  if (!in_vocabulary(s, id)) return OSCAR_INVALID_ARGUMENT;
  if (token_ends(s->table, id)) {
    s->ended = grammar_may_end(s);
    return s->ended ? OSCAR_OK : OSCAR_INVALID_ARGUMENT;
  }
  lock(s);
  oscar_status status = automaton_tidy(s->automaton);
  const int32_t next = status == OSCAR_OK ? situation_after(s, id) : DEAD;
  if (status == OSCAR_OK) status = automaton_status(s->automaton);
  if (status == OSCAR_OK && next == DEAD) status = OSCAR_INVALID_ARGUMENT;
  if (status == OSCAR_OK) s->holder.situation = next;
  unlock(s);
  return status;
}
