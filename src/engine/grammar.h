/*
 * engine/grammar.h - answers that keep to a form: a JSON schema or a grammar. Private.
 *
 * A grammar is compiled once, is immutable and may be shared by threads. A grammar_state follows one answer: it says which tokens
 * may come next and takes the one that was chosen. Tokens are judged by their bytes, so a token may end in the middle of a
 * character or span several terminals. docs/grammars.md says what is understood. Neither grammar nor state uses a context; texts
 * of errors go to the caller's buffer.
 *
 * GBNF-like grammars (llama.cpp's notation):  root ::= "yes" | "no" [0-9]{2,4} ("," ws number)* # comment
 *   literals "..." with \n \t \r \\ \" \xHH \uHHHH \UHHHHHHHH, classes [a-z] [^"\\] and . , groups, ? * + {n} {n,} {n,m}, rule
 * names.
 */
#ifndef OSCAR_GRAMMAR_H
#define OSCAR_GRAMMAR_H

#include "model/tokenizer.h"

struct grammar;
/* The rule `root` begins. Errors: FORMAT (with line and column), UNSUPPORTED (left recursion, limits), NO_MEMORY. */
oscar_status grammar_parse(const char *text, size_t bytes, struct grammar **grammar, char *error, size_t error_bytes);
/* schema: a JSON text; JSON Schema as OpenAI's structured outputs and json_object need it: type, properties, required,
 * additionalProperties, items, prefixItems, minItems, maxItems, enum, const, anyOf, oneOf, allOf of objects, $ref into $defs,
 * pattern (regular expressions without look-around), format (date, time, date-time, uuid, ipv4, hostname, email), minLength,
 * maxLength, minimum and maximum of integers; oneOf where its schemas can be seen to exclude each other. What restricts and is
 * not followed is UNSUPPORTED and named; annotations are ignored. */
oscar_status grammar_of_schema(const char *schema, size_t bytes, struct grammar **grammar, char *error, size_t error_bytes);
/* One of several forms, each some parts after each other: for calls of tools, whose arguments are JSON between fixed words. */
struct grammar_part {
  const char *literal; /* or, if it is NULL, */
  const char *schema;  /* a JSON text as above */
};
struct grammar_form {
  const struct grammar_part *parts;
  int n_parts;
};
oscar_status grammar_of_forms(const struct grammar_form *forms, int n_forms, struct grammar **grammar, char *error,
                              size_t error_bytes);
/* Any JSON object. */
oscar_status grammar_of_json(struct grammar **grammar);
void grammar_free(struct grammar *grammar);

/* What tokens of a vocabulary look like, made once for a tokenizer, immutable, shared by all states. Control tokens are no text
 * but for those in visible [n_visible], which are their spelling. */
struct token_table;
oscar_status token_table_create(const struct tokenizer *tokenizer, const int32_t *visible, int n_visible,
                                struct token_table **table);
void token_table_free(struct token_table *table);

struct grammar_state;
/* The grammar and the table outlive the state. States of one grammar share what they find out, behind a lock, so each may be used
 * by a thread of its own. */
oscar_status grammar_state_create(const struct grammar *grammar, const struct token_table *table, struct grammar_state **state);
oscar_status grammar_state_copy(const struct grammar_state *state, struct grammar_state **copy);
void grammar_state_free(struct grammar_state *state);

/* The text so far is a sentence of the grammar: a token that ends the turn may come. */
bool grammar_may_end(const struct grammar_state *state);
/* Nothing but the end may come. */
bool grammar_must_end(const struct grammar_state *state);
/* allowed: a bit for each token of the vocabulary, [ceil(vocab / 64)], tokens that end a turn by grammar_may_end. Errors:
 * UNSUPPORTED (the grammar leaves too many ways open at once), NO_SPACE (what it takes to follow it is too large), NO_MEMORY. */
oscar_status grammar_allowed(struct grammar_state *state, uint64_t *allowed);
bool grammar_allows(const struct grammar_state *state, int32_t id);
/* INVALID_ARGUMENT if it is not allowed; other errors as above. The state is then as before. */
oscar_status grammar_accept(struct grammar_state *state, int32_t id);

#endif
