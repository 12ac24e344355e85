/* kv_types.c - the names a user gives to forms of the cache, in one table. */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

enum { GRADED = 3 }; /* the place in the table of the type that comes in bits */
static const struct kv_type types[] = {
    {"bf16", "exact: keys and values as the model made them, in BF16", false, false},
    {"int8", "8 bits, scale and zero per row, no rotation", true, false},
    {"int4", "4 bits, fitted rotation per head, means removed", true, true},
    {"int2", "2 bits, graded: more for the directions that matter, fitted to what attention reads (default)", true, true},
    {"int2-centred", "2 bits, fitted rotation per head, means removed", true, true},
    {"int2-oscar", "2 bits, the published recipe: one fitted rotation per layer, no means", true, true},
    {"int2-hadamard", "2 bits, Hadamard rotation, needs no data", true, false},
    {"int2-plain", "2 bits, no rotation", true, false},
};

const struct kv_type *kv_type_list(int *count) {
  *count = (int)ARRAY_LENGTH(types);
  return types;
}

float kv_type_bits(const char *name) {
  const char *at = strchr(name, '@');
  if (!at) return 2;
  char *end;
  float bits = strtof(at + 1, &end);
  return end > at + 1 && *end == '\0' && bits >= KV_LEAST_BITS && bits <= KV_MOST_BITS ? bits : 0;
}

const struct kv_type *kv_type_find(const char *name) {
  size_t length = strcspn(name, "@");
  for (size_t i = 0; i < ARRAY_LENGTH(types); i++) {
    if (strlen(types[i].name) != length || strncmp(types[i].name, name, length) != 0) continue;
    return name[length] == '\0' || (i == GRADED && kv_type_bits(name) > 0) ? &types[i] : NULL;
  }
  return NULL;
}
