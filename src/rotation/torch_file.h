/*
 * rotation/torch_file.h - a rotation file from memory, in two steps so that each can be tested and fuzzed alone. Private.
 */
#ifndef OSCAR_TORCH_FILE_H
#define OSCAR_TORCH_FILE_H

#include "base/base.h"
#include <oscar/rotation.h>

/* Where the bytes of storages come from. */
struct storage_source {
  /* Copies exactly `bytes` bytes, the whole storage `key` (n bytes of text, not terminated), to `to`. */
  oscar_status (*read)(void *user, const char *key, uint32_t n, void *to, size_t bytes);
  /* Whether there is such a storage of exactly that size: asked before memory is taken for it. */
  oscar_status (*check)(void *user, const char *key, uint32_t n, size_t bytes);
  void *user;
};

/* The rotation file a pickle describes. Errors: FORMAT, UNSUPPORTED, NUMERIC, NO_MEMORY, and what the source returns. */
oscar_status rotation_from_pickle(oscar_context *context, const uint8_t *pickle, size_t n, const struct storage_source *source,
                                  oscar_rotation_file **file);

/* A whole file (a zip archive). Errors as oscar_rotation_file_read, without the file's name. */
oscar_status rotation_from_memory(oscar_context *context, const uint8_t *bytes, size_t n, oscar_rotation_file **file);

#endif
