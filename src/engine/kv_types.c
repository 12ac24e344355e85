/* kv_types.c - the names a user gives to forms of the cache, in one table. How those for evaluation only quantize is known to
 * eval/baselines.c. */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

static const struct kv_type types[] = {
    {"bf16", "exact: keys and values as the model made them, in BF16", KV_EXACT, false},
    {"int8", "8 bits, scale and zero per row, no rotation", KV_PLAIN, false},
    {"int4", "4 bits, fitted rotation per head, means removed", KV_FITTED, false},
    {"int2", "2 bits (or int2@BITS), graded: more for the directions that matter, fitted to attention (default)", KV_FITTED,
     true},
    {"int2-centred", "2 bits, fitted rotation per head, means removed", KV_FITTED, false},
    {"int2-oscar", "2 bits, the published recipe: one fitted rotation per layer, no means", KV_FITTED, false},
    {"int2-hadamard", "2 bits, Hadamard rotation, needs no data", KV_PLAIN, false},
    {"int2-plain", "2 bits, no rotation", KV_PLAIN, false},
    {"int2-kivi", "KIVI at 2 bits: keys in groups of 32 tokens per channel, values in groups of 32 channels", KV_EVALUATION,
     false},
    {"q4_0", "llama.cpp's q4_0: 4 bits, symmetric, blocks of 32 channels", KV_EVALUATION, false},
    {"q4_0-hadamard", "q4_0 after a Hadamard rotation of each head", KV_EVALUATION, false},
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
    return name[length] == '\0' || (types[i].in_bits && kv_type_bits(name) > 0) ? &types[i] : NULL;
  }
  return NULL;
}

oscar_status kv_type_with_bits(oscar_context *context, const char *kv, float bits, char *name, size_t room) {
  if (bits == 0 || (bits == 2 && kv_type_find(kv) && kv_type_find(kv)->in_bits))
    snprintf(name, room, "%s", kv);
  else
    snprintf(name, room, "%s@%g", kv, (double)bits);
  if (bits == 0 || kv_type_find(name)) return OSCAR_OK;
  return set_error(context, OSCAR_INVALID_ARGUMENT, "%g bits of KV type %s: only int2 comes in bits, %g to %g", (double)bits, kv,
                   (double)KV_LEAST_BITS, (double)KV_MOST_BITS);
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
