/* Fuzz target: the safetensors container, and codec sets in it. */
#include "rotation/safetensors.h"
#include "rotation/set_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
  static oscar_context *context;
  if (!context && oscar_context_create(NULL, &context) != OSCAR_OK) return 0;
  struct safetensors file;
  uint8_t sum = 0;
  if (safetensors_open(context, data, n, &file) == OSCAR_OK)
    for (size_t i = 0; i < file.n; i++) {
      const struct safetensor *t = &file.tensor[i];
      if (safetensors_find(&file, t->name) != t) __builtin_trap();
      for (size_t b = 0; b < t->bytes; b++) sum = (uint8_t)(sum ^ ((const uint8_t *)t->data)[b]);
    }
  volatile uint8_t seen = sum; /* every byte a tensor claims can be read */
  (void)seen;
  safetensors_close(&file);

  oscar_codec_set *set = NULL;
  oscar_status status = codec_set_from_memory(context, data, n, &set);
  if ((status == OSCAR_OK) != (set != NULL)) __builtin_trap();
  if (set && oscar_codec_set_check(set) != OSCAR_OK) __builtin_trap();
  oscar_codec_set_free(set);
  return 0;
}
