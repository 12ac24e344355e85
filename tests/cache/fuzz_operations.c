/* Bytes choose operations on a small cache with several sequences, with a prefix tree or without; the model must agree after each
 * (model.h, prefix_model.h). */
#include <stdio.h>
#include <stdlib.h>

#define REQUIRE(condition)                                                                                                       \
  do {                                                                                                                           \
    if (!(condition)) {                                                                                                          \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                                            \
      abort();                                                                                                                   \
    }                                                                                                                            \
  } while (0)
#include "model.h"

#include "prefix_model.h"

struct bytes {
  const uint8_t *next, *end;
};

static uint32_t choose_byte(void *user, uint32_t below) {
  struct bytes *b = user;
  uint32_t value = 0;
  for (uint32_t range = 1; range < below && b->next < b->end; range <<= 8) value = value << 8 | *b->next++;
  return value % below;
}

static void without_tree(oscar_context *context, const struct geometry *g, struct bytes *bytes) {
  struct world w;
  world_open(&w, context, g, 64 + 64 * (int64_t)choose_byte(bytes, 16), 1 + (int)choose_byte(bytes, 4), 100);
  for (int n = 0; n < 200 && bytes->next < bytes->end; n++) {
    operate(&w, choose_byte, bytes);
    REQUIRE(oscar_cache_check(w.cache) == OSCAR_OK);
  }
  compare_all(&w);
  world_close(&w);
}

static void with_tree(oscar_context *context, const struct geometry *g, struct bytes *bytes) {
  static struct texts x;
  const int64_t tokens = 64 + 64 * (int64_t)choose_byte(bytes, 16);
  const int sequences = 1 + (int)choose_byte(bytes, 4);
  texts_open(&x, context, g, tokens, sequences, 100, 2 + (int)choose_byte(bytes, 2));
  for (int n = 0; n < 200 && x.tree && bytes->next < bytes->end; n++) {
    operate_texts(&x, choose_byte, bytes);
    REQUIRE(oscar_cache_check(x.w.cache) == OSCAR_OK);
  }
  compare_all(&x.w);
  texts_close(&x);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  struct bytes bytes = {data, data + size};
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.threads = 1;
  oscar_context *context;
  REQUIRE(oscar_context_create(&options, &context) == OSCAR_OK);
  const uint32_t first = choose_byte(&bytes, 2 * ARRAY_LENGTH(geometries));
  const struct geometry *g = &geometries[first % ARRAY_LENGTH(geometries)];
  (first < ARRAY_LENGTH(geometries) ? without_tree : with_tree)(context, g, &bytes);
  oscar_context_free(context);
  return 0;
}
