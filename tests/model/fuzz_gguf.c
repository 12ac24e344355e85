/* Any bytes: the reader refuses them or gives pointers inside them, which are all touched here. */
#include "model/gguf.h"

#include <stdlib.h>
#include <string.h>

static void ignore_log(void *user, oscar_log_level level, const char *text) { (void)user, (void)level, (void)text; }

static unsigned touch(const void *data, size_t bytes) {
  unsigned sum = 0;
  for (size_t i = 0; i < bytes; i++) sum += ((const unsigned char *)data)[i];
  return sum;
}

/* Keys that the corpus has, with every getter. */
static unsigned touch_keys(const struct gguf *file) {
  static const char *const keys[] = {"general.architecture",
                                     "general.alignment",
                                     "t.uint8",
                                     "t.int8",
                                     "t.uint16",
                                     "t.int16",
                                     "t.uint32",
                                     "t.int32",
                                     "t.uint64",
                                     "t.int64",
                                     "t.float32",
                                     "t.float64",
                                     "t.true",
                                     "t.string",
                                     "t.strings",
                                     "t.integers",
                                     "t.floats",
                                     "t.bools",
                                     "absent",
                                     "tokenizer.ggml.tokens",
                                     "tokenizer.ggml.scores"};
  unsigned sum = 0;
  for (size_t k = 0; k < ARRAY_LENGTH(keys); k++) {
    int64_t integer, count;
    double real;
    bool truth;
    struct gguf_string text;
    sum += gguf_get_i64(file, keys[k], &integer);
    sum += gguf_get_f64(file, keys[k], &real);
    sum += gguf_get_bool(file, keys[k], &truth);
    if (gguf_get_string(file, keys[k], &text)) sum += touch(text.text, (size_t)text.bytes);
    count = gguf_array_count(file, keys[k], GGUF_STRING);
    for (int64_t i = 0; i < count; i++) {
      text = gguf_array_string(file, keys[k], i);
      sum += touch(text.text, (size_t)text.bytes);
    }
    static const size_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    for (int type = GGUF_UINT8; type <= GGUF_FLOAT64; type++) {
      const void *data = gguf_array_data(file, keys[k], (enum gguf_type)type, &count);
      if (data) sum += touch(data, (size_t)count * bytes[type]);
    }
  }
  return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.threads = 1;
  options.log = ignore_log;
  oscar_context *context;
  if (oscar_context_create(&options, &context) != OSCAR_OK) abort();
  uint8_t *copy = malloc(bytes ? bytes : 1); /* aligned as promised, and nothing behind the last byte */
  if (!copy) abort();
  if (bytes) memcpy(copy, data, bytes);
  struct gguf *file;
  unsigned sum = 0;
  if (gguf_parse(context, "fuzz", copy, bytes, &file) == OSCAR_OK) {
    for (int64_t i = 0; i < gguf_tensor_count(file); i++) {
      const struct gguf_tensor *t = gguf_tensor_at(file, i);
      sum += touch(t->data, t->bytes);
      if (gguf_find_tensor(file, t->name) != t) abort();
    }
    sum += touch_keys(file);
    char hex[65];
    if (gguf_fingerprint(file, hex) != OSCAR_OK || strlen(hex) != 64) abort();
    gguf_close(file);
  } else if (!*oscar_last_error(context)) {
    abort(); /* refused without a reason */
  }
  static volatile unsigned sink; /* keeps the reads */
  sink = sum;
  (void)sink;
  free(copy);
  oscar_context_free(context);
  return 0;
}
