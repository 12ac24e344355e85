/* kv_types.c - the names a user gives to forms of the cache, in one table. How those for evaluation only quantize is known to
 * eval/baselines.c. */
#include "engine/engine.h"

#include <string.h>

static const struct kv_type types[] = {
    {"bf16", "exact: keys and values as the model made them, in BF16", KV_EXACT},
    {"int8", "8 bits, scale and zero per row, no rotation", KV_PLAIN},
    {"int4", "4 bits, fitted rotation per head, means removed", KV_FITTED},
    {"int2", "2 bits, the best codec there is: fitted rotation per head, means removed (default)", KV_FITTED},
    {"int2-oscar", "2 bits, the published recipe: one fitted rotation per layer, no means", KV_FITTED},
    {"int2-hadamard", "2 bits, Hadamard rotation, needs no data", KV_PLAIN},
    {"int2-plain", "2 bits, no rotation", KV_PLAIN},
    {"int2-kivi", "KIVI at 2 bits: keys in groups of 32 tokens per channel, values in groups of 32 channels", KV_EVALUATION},
    {"q4_0", "llama.cpp's q4_0: 4 bits, symmetric, blocks of 32 channels", KV_EVALUATION},
    {"q4_0-hadamard", "q4_0 after a Hadamard rotation of each head", KV_EVALUATION},
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

oscar_status kv_type_check(oscar_context *context, const char *name) {
  const struct kv_type *type = kv_type_find(name);
  if (!type) return set_error(context, OSCAR_INVALID_ARGUMENT, "unknown KV type \"%s\" (see --help for the list)", name);
  if (type->kind == KV_EVALUATION)
    return set_error(
        context, OSCAR_INVALID_ARGUMENT,
        "KV type %s is for comparison in 'oscar eval' only: here it is computed but not stored, so it saves no memory", name);
  return OSCAR_OK;
}
