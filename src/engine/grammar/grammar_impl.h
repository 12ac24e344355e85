/*
 * engine/grammar/grammar_impl.h - what the files of grammars share. Private to engine/grammar/ and their tests.
 *
 * A grammar is built as expressions over rules (struct builder) and compiled into a program over bytes: a nondeterministic
 * automaton for every rule, with calls between them (struct grammar). engine/grammar/state.c runs it.
 */
#ifndef OSCAR_GRAMMAR_IMPL_H
#define OSCAR_GRAMMAR_IMPL_H

#include "engine/grammar.h"

#include <pthread.h>
#include <stddef.h>

/* What a grammar may grow to, whoever wrote it. */
enum {
  MOST_GRAMMAR_BYTES = 1 << 20, /* of its text */
  MOST_GRAMMAR_CODE = 1 << 20,  /* instructions */
  MOST_GRAMMAR_RULES = 1 << 17,
  MOST_GRAMMAR_DEPTH = 200, /* of parentheses, of a schema */
  MOST_REPETITIONS = 100000 /* that a count asks for */
};

/* ---- the program ---- */
enum instruction_kind {
  BYTE_IN,   /* a byte of set `set`, then `next` */
  SPLIT,     /* `next` or `other` */
  CALL_RULE, /* what starts at `other`, then `next` */
  RETURN     /* the end of a rule */
};
struct instruction {
  uint8_t kind;
  bool useful; /* something can be matched from here to the end of the rule */
  uint16_t set;
  int32_t next, other;
};
struct byte_set {
  uint64_t bits[4];
};
static inline bool byte_set_has(const struct byte_set *set, int byte) { return set->bits[byte >> 6] >> (byte & 63) & 1; }
static inline void byte_set_add(struct byte_set *set, int first, int last) {
  for (int b = first; b <= last; b++) set->bits[b >> 6] |= (uint64_t)1 << (b & 63);
}

/* Copies of one part after each other: copy k begins at first + k * stride, and k more follow it. */
struct stretch {
  int32_t first, stride, copies;
};

struct automaton;
struct grammar_cache { /* what states of one grammar share; changes behind the lock */
  pthread_mutex_t lock;
  struct automaton *automata;
};
struct grammar {
  struct instruction *code;
  int32_t n_code, start;
  struct byte_set *sets;
  int n_sets;
  struct stretch *stretches; /* [n_stretches] the longer ones, by `first`; they do not overlap */
  int n_stretches;
  uint8_t class_of[256]; /* bytes that no set tells apart are of one class */
  int n_classes;
  bool *set_has; /* [n_sets][n_classes] */
  struct grammar_cache *cache;
};
void automata_free(struct automaton *automata); /* engine/grammar/automaton.c */

/* ---- building ---- */
struct char_range {
  uint32_t first, last; /* code points, inclusive */
};
struct expression;
struct rule {
  char *name; /* for messages */
  int32_t expression, entry;
};
/* Calls go on after an error, which is kept and ends up in what builder_finish returns; expressions are then 0. */
struct builder {
  oscar_status status;
  char *error; /* [error_bytes] */
  size_t error_bytes;
  struct expression *expressions;
  size_t n_expressions, expression_room;
  int32_t *children;
  size_t n_children, children_room;
  struct char_range *ranges;
  size_t n_ranges, ranges_room;
  struct rule *rules;
  size_t n_rules, rule_room;
  char *text; /* of literals */
  size_t n_text, text_room;
  struct grammar *grammar; /* being compiled */
  size_t code_room, set_room, stretch_room;
};
void builder_begin(struct builder *b, char *error, size_t error_bytes);
/* Compiles from rule `start`, frees all that the builder holds. */
oscar_status builder_finish(struct builder *b, int32_t start, struct grammar **grammar);
/* Records the first error; returns 0. */
int32_t builder_fail(struct builder *b, oscar_status status, const char *format, ...) OSCAR_PRINTF(3, 4);
bool room_for(void **list, size_t *room, size_t count, size_t size); /* grows it to more than count; false: no memory */

int32_t expr_empty(struct builder *b);
int32_t expr_literal(struct builder *b, const char *text, size_t bytes);
int32_t expr_bytes(struct builder *b, const struct byte_set *set);
int32_t expr_chars(struct builder *b, const struct char_range *ranges, size_t n); /* none of them: matches nothing */
int32_t expr_sequence(struct builder *b, const int32_t *parts, size_t n);
int32_t expr_choice(struct builder *b, const int32_t *parts, size_t n);            /* of none: matches nothing */
int32_t expr_repeat(struct builder *b, int32_t part, int64_t least, int64_t most); /* most -1: any number */
int32_t expr_call(struct builder *b, int32_t rule);
int32_t rule_new(struct builder *b, const char *name, size_t bytes);
void rule_define(struct builder *b, int32_t rule, int32_t expression);

/* A growing list of expressions, for sequences and choices whose length is not known beforehand. */
struct expr_list {
  int32_t *parts;
  size_t n, room;
};
void expr_list_add(struct builder *b, struct expr_list *list, int32_t part);
int32_t expr_list_sequence(struct builder *b, struct expr_list *list); /* frees the list */
int32_t expr_list_choice(struct builder *b, struct expr_list *list);

/* ---- classes of characters ---- */
#define LAST_CODE_POINT 0x10FFFFu
struct char_class {
  struct char_range *ranges;
  size_t n, room;
};
void class_add(struct builder *b, struct char_class *class, uint32_t first, uint32_t last);
/* Sorts and joins; surrogates, which no UTF-8 text has, are left out. */
void class_settle(struct char_class *class);
void class_invert(struct builder *b, struct char_class *class); /* settles, too */
void class_free(struct char_class *class);

/* ---- parts of JSON (engine/grammar/json.c) ---- */
/* A character class inside a JSON string: as it is where that may be, else escaped. */
int32_t json_chars(struct builder *b, const struct char_class *class);
/* A regular expression of ECMAScript's kind over the contents of a JSON string; `where` begins messages. */
int32_t json_pattern(struct builder *b, const char *pattern, size_t bytes, const char *where);
/* Rules for whole values, made on first use. */
struct json_rules {
  int32_t space, character, string, integer, number, value, object, array; /* 0: not yet */
};
int32_t json_gap(struct builder *b);                             /* nothing or a space: around colons, before commas */
int32_t json_space(struct builder *b, struct json_rules *rules); /* or a new line: behind commas, within brackets */
int32_t any_character(struct builder *b, struct json_rules *rules);
int32_t any_string(struct builder *b, struct json_rules *rules);
int32_t any_integer(struct builder *b, struct json_rules *rules);
int32_t any_number(struct builder *b, struct json_rules *rules);
int32_t any_value(struct builder *b, struct json_rules *rules);
int32_t any_object(struct builder *b, struct json_rules *rules);
int32_t any_array(struct builder *b, struct json_rules *rules);
/* Integers from least to most, in decimal, both within 18 digits. */
int32_t json_integer_range(struct builder *b, int64_t least, int64_t most);
#define MOST_JSON_INTEGER 999999999999999999

/* A JSON Schema as an expression (engine/grammar/schema.c). */
int32_t schema_expression(struct builder *b, struct json_rules *rules, const char *schema, size_t bytes);

/* ---- tokens (engine/grammar/tokens.c) ---- */
/* The spellings as a tree of bytes in preorder; node 0 is the empty beginning. */
struct token_table {
  uint64_t serial; /* no other table has it */
  int vocab, n_nodes, most_bytes;
  uint8_t *byte;        /* [n_nodes] the last byte */
  uint16_t *depth;      /* [n_nodes] */
  int32_t *end;         /* [n_nodes] the node after all that begin with this one */
  int32_t *first_token; /* [n_nodes + 1] tokens that end at node i: order[first_token[i] .. first_token[i + 1]) */
  int32_t *order;       /* tokens that have a spelling, sorted by it */
  char *text;
  uint32_t *offset; /* [vocab + 1] of spellings in text; empty: no text */
  uint64_t *ends;   /* [ceil(vocab / 64)] tokens that end a turn */
};
struct token_spelling {
  const char *text;
  size_t bytes;
  bool ends;
};
oscar_status token_table_build(int vocab, const struct token_spelling *spellings, struct token_table **table);
static inline bool token_ends(const struct token_table *t, int32_t id) { return t->ends[id / 64] >> (id % 64) & 1; }

#endif
