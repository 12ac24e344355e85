/* Fuzz target: published rotation files. The first byte says what follows: 'p' a bare pickle, anything else a whole archive. */
#include "rotation/torch_file.h"

#include <string.h>

static oscar_status check(void *user, const char *key, uint32_t n, size_t bytes) {
  (void)key;
  (void)n;
  return bytes <= 1 << 20 ? OSCAR_OK : set_error(user, OSCAR_FORMAT, "a large storage");
}

static oscar_status read_ones(void *user, const char *key, uint32_t n, void *to, size_t bytes) {
  (void)user;
  (void)key;
  (void)n;
  memset(to, 1, bytes);
  return OSCAR_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
  static oscar_context *context;
  if (!context && oscar_context_create(NULL, &context) != OSCAR_OK) return 0;
  if (n < 2) return 0;
  oscar_rotation_file *file = NULL;
  const struct storage_source source = {read_ones, check, context};
  oscar_status status = *data == 'p' ? rotation_from_pickle(context, data + 1, n - 1, &source, &file)
                                     : rotation_from_memory(context, data + 1, n - 1, &file);
  if ((status == OSCAR_OK) != (file != NULL)) __builtin_trap();
  oscar_rotation_file_free(context, file);
  return 0;
}
