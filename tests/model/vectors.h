/* tests/model/vectors.h - stored truth of tools/make_tokenizer_vectors.py: little-endian u32 and counted strings. */
#ifndef OSCAR_TEST_VECTORS_H
#define OSCAR_TEST_VECTORS_H

#include "support.h"

#include "base/file.h"
#include "model/tokenizer.h"

#define SAME_AS_BEFORE UINT32_MAX

struct vectors {
  struct file_map map;
  size_t at;
};

static inline const char *test_data(const char *name, const char *ending) {
  static char path[4096];
  snprintf(path, sizeof path, "%s/%s%s", OSCAR_TEST_DATA, name, ending);
  return path;
}
static inline struct vectors vectors_open(oscar_context *c, const char *name, const char *ending) {
  struct vectors v = {0};
  assert_ok(c, file_map_open(c, test_data(name, ending), &v.map));
  return v;
}
static inline void vectors_close(struct vectors *v) {
  assert_int_equal(v->at, v->map.bytes); /* all of it was compared */
  file_map_close(&v->map);
}
static inline uint32_t next_u32(struct vectors *v) {
  uint32_t x;
  assert_true(v->at + 4 <= v->map.bytes);
  memcpy(&x, v->map.data + v->at, 4);
  v->at += 4;
  return x;
}
static inline uint16_t next_u16(struct vectors *v) {
  uint16_t x;
  assert_true(v->at + 2 <= v->map.bytes);
  memcpy(&x, v->map.data + v->at, 2);
  v->at += 2;
  return x;
}
static inline const char *next_bytes(struct vectors *v, size_t *bytes) {
  *bytes = next_u32(v);
  assert_true(v->at + *bytes <= v->map.bytes);
  v->at += *bytes;
  return (const char *)v->map.data + v->at - *bytes;
}
/* A terminated copy, freed by the caller. */
static inline char *next_text(struct vectors *v) {
  size_t bytes;
  const char *text = next_bytes(v, &bytes);
  char *copy = strndup(text, bytes);
  assert_non_null(copy);
  return copy;
}
/* Ids in the file, unaligned; *count is SAME_AS_BEFORE where the file says so. */
static inline const uint8_t *next_ids(struct vectors *v, uint32_t *count) {
  *count = next_u32(v);
  const uint8_t *ids = v->map.data + v->at;
  if (*count != SAME_AS_BEFORE) v->at += 4 * (size_t)*count;
  assert_true(v->at <= v->map.bytes);
  return ids;
}
static inline void expect_ids(const char *what, const int32_t *ids, int count, const uint8_t *truth, uint32_t truth_count) {
  uint32_t same = 0;
  while (same < truth_count && same < (uint32_t)count && memcmp(ids + same, truth + 4 * same, 4) == 0) same++;
  if (same == truth_count && same == (uint32_t)count) return;
  int32_t expected = -1;
  if (same < truth_count) memcpy(&expected, truth + 4 * same, 4);
  fail_msg("%s: %d ids where %u were expected; the first that differs is number %u: %d, expected %d", what, count, truth_count,
           same, same < (uint32_t)count ? ids[same] : -1, expected);
}

/* The tokenizer of a small stored vocabulary, or of a fetched model if there is no such; NULL if the model is not there. */
static inline struct tokenizer *test_tokenizer(oscar_context *c, const char *name) {
  const char *path = test_data(name, ".tiny.gguf");
  if (access(path, R_OK) != 0) path = test_model(name);
  if (!path) return NULL;
  struct gguf *file;
  struct tokenizer *t;
  assert_ok(c, gguf_open(c, path, &file));
  assert_ok(c, tokenizer_create(c, file, &t));
  gguf_close(file); /* the tokenizer must not need it */
  return t;
}

/* Memory that runs out after `left` allocations; `live` counts the blocks not yet freed. */
struct scarce {
  int left, live;
};
static inline void *scarce_alloc(void *user, size_t bytes, size_t alignment) {
  struct scarce *s = user;
  if (s->left-- <= 0) return NULL;
  s->live++;
  return aligned_alloc(alignment, round_up(bytes, alignment));
}
static inline void scarce_free(void *user, void *pointer) {
  struct scarce *s = user;
  s->live--;
  free(pointer);
}

static inline oscar_context *scarce_context(struct scarce *memory) {
  oscar_context_options options;
  oscar_context_options_default(&options);
  options.alloc = scarce_alloc;
  options.free = scarce_free;
  options.alloc_user = memory;
  options.threads = 1;
  oscar_context *c = NULL;
  assert_int_equal(oscar_context_create(&options, &c), OSCAR_OK);
  return c;
}

#endif
