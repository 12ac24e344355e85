/* engine/grammar/schema_impl.h - what the files of JSON Schemas share. Private to schema*.c. */
#ifndef OSCAR_SCHEMA_IMPL_H
#define OSCAR_SCHEMA_IMPL_H

#include "engine/grammar/grammar_impl.h"

#include <jansson.h>

enum {
  OBJECT = 1,
  ARRAY = 2,
  STRING = 4,
  INTEGER = 8,
  NUMBER = 16,
  BOOLEAN = 32,
  NULLS = 64,
  ANY_TYPE = 127 - INTEGER, /* NUMBER has the integers */
  MOST_WORK = 1 << 18       /* keywords looked at, merged ones again */
};

struct schema {
  struct builder *b;
  struct json_rules *rules;
  json_t *root, *made; /* merged schemas, kept to the end */
  char path[160];      /* JSON pointer of what is at work, as far as it fits */
  size_t path_length;
  int depth, work;
  struct reference {
    const json_t *target;
    int32_t rule;
  } * references;
  size_t n_references, reference_room;
};

/* ---- schema.c ---- */
/* NULL after an error. */
json_t *schema_resolve(struct schema *s, json_t *reference);
int schema_types_listed(struct schema *s, json_t *type); /* of the keyword's value */
int schema_types_of(struct schema *s, json_t *schema);   /* what it says, or what its keywords are about */
bool schema_has_type(json_t *value, int types);
int schema_count_restrictions(json_t *schema); /* how many keywords restrict */

/* ---- schema_exclude.c ---- */
/* Whether it can be seen that no value which the grammar of `a` gives is valid for `b`. False: it may be. */
bool schema_excludes(struct schema *s, json_t *a, json_t *b);

#endif
