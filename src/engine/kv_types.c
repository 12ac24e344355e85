/* kv_types.c - the names a user gives to forms of the cache, in one table. */
#include "engine/engine.h"

#include <string.h>

static const struct kv_type types[] = {
    {"bf16", "exact: keys and values as the model made them, in BF16", false, false},
    {"int8", "8 bits, scale and zero per row, no rotation", true, false},
    {"int4", "4 bits, fitted rotation per head, means removed", true, true},
    {"int2", "2 bits, the best codec there is: fitted rotation per head, means removed (default)", true, true},
    {"int2-oscar", "2 bits, the published recipe: one fitted rotation per layer, no means", true, true},
    {"int2-hadamard", "2 bits, Hadamard rotation, needs no data", true, false},
    {"int2-plain", "2 bits, no rotation", true, false},
};

const struct kv_type *kv_type_list(int *count) {
  *count = (int)ARRAY_LENGTH(types);
  return types;
}

const struct kv_type *kv_type_find(const char *name) {
  for (size_t i = 0; i < ARRAY_LENGTH(types); i++)
    if (strcmp(types[i].name, name) == 0) return &types[i];
  return NULL;
}
