/*
 * engine/grammar/automaton.h - a grammar at work on a vocabulary: situations, what a byte makes of them, which tokens fit.
 * Private to engine/grammar/.
 *
 * A situation is all that a text so far may go on with: a set of places in the grammar's program, each with the calls that it is
 * inside of. Situations have numbers; the same situation has the same number. All of this changes behind the lock of the
 * grammar's cache.
 */
#ifndef OSCAR_GRAMMAR_AUTOMATON_H
#define OSCAR_GRAMMAR_AUTOMATON_H

#include "engine/grammar/grammar_impl.h"

struct automaton;
enum { DEAD = 0 }; /* the situation of a text that is no beginning of a sentence */

/* Takes the one of this table from the grammar, or makes it. NULL: no memory. */
struct automaton *automaton_of(const struct grammar *grammar, const struct token_table *table);
/* Where a text begins; -1 after an error. */
int32_t automaton_begin(struct automaton *a);
/* Errors of what follows: -1, and automaton_status says which. */
int32_t automaton_step(struct automaton *a, int32_t situation, uint8_t byte);
int32_t automaton_steps(struct automaton *a, int32_t situation, const char *text, size_t bytes);
oscar_status automaton_status(struct automaton *a);                   /* and forgets it */
bool automaton_accepts(const struct automaton *a, int32_t situation); /* the text may end */
bool automaton_goes_on(const struct automaton *a, int32_t situation); /* a byte may follow */
/* Sets the bits of tokens whose spelling may follow, and clears all others. */
oscar_status automaton_allowed(struct automaton *a, int32_t situation, uint64_t *allowed);

/* Numbers that must stay valid: whoever holds one is in a list. */
struct situation_holder {
  int32_t situation;
  struct situation_holder *previous, *next;
};
void automaton_hold(struct automaton *a, struct situation_holder *holder);
void automaton_release(struct automaton *a, struct situation_holder *holder);
/* Forgets all situations but those that are held if they take too much memory. */
oscar_status automaton_tidy(struct automaton *a);

#endif
