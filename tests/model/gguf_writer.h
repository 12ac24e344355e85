/* tests/model/gguf_writer.h - writes GGUF files into memory, byte by byte as the format description says, also wrong ones. */
#ifndef OSCAR_TEST_GGUF_WRITER_H
#define OSCAR_TEST_GGUF_WRITER_H

#include "support.h"

#include "model/gguf.h"

struct gguf_writer {
  uint8_t *data;
  size_t bytes, room;
};

static inline void put(struct gguf_writer *w, const void *from, size_t bytes) {
  while (w->bytes + bytes > w->room) {
    w->room = w->room ? 2 * w->room : 1024;
    w->data = realloc(w->data, w->room);
    assert_non_null(w->data);
  }
  memcpy(w->data + w->bytes, from, bytes);
  w->bytes += bytes;
}
static inline void put_number(struct gguf_writer *w, uint64_t x, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) {
    uint8_t byte = (uint8_t)(x >> 8 * i);
    put(w, &byte, 1);
  }
}
static inline void put_u32(struct gguf_writer *w, uint32_t x) { put_number(w, x, 4); }
static inline void put_u64(struct gguf_writer *w, uint64_t x) { put_number(w, x, 8); }
static inline void put_text(struct gguf_writer *w, const char *text) {
  put_u64(w, strlen(text));
  put(w, text, strlen(text));
}
static inline void put_head(struct gguf_writer *w, uint32_t version, uint64_t tensors, uint64_t keys) {
  put(w, "GGUF", 4);
  put_u32(w, version);
  put_u64(w, tensors);
  put_u64(w, keys);
}
static inline void put_key(struct gguf_writer *w, const char *key, uint32_t type) {
  put_text(w, key);
  put_u32(w, type);
}
static inline void put_integer(struct gguf_writer *w, const char *key, uint32_t type, uint64_t x, size_t bytes) {
  put_key(w, key, type);
  put_number(w, x, bytes);
}
static inline void put_string(struct gguf_writer *w, const char *key, const char *text) {
  put_key(w, key, GGUF_STRING);
  put_text(w, text);
}
static inline void put_array(struct gguf_writer *w, const char *key, uint32_t element, uint64_t count) {
  put_key(w, key, GGUF_ARRAY);
  put_u32(w, element);
  put_u64(w, count);
}
static inline void put_tensor(struct gguf_writer *w, const char *name, int dims, const uint64_t *shape, uint32_t type,
                              uint64_t offset) {
  put_text(w, name);
  put_u32(w, (uint32_t)dims);
  for (int i = 0; i < dims; i++) put_u64(w, shape[i]);
  put_u32(w, type);
  put_u64(w, offset);
}
static inline void put_padding(struct gguf_writer *w, size_t alignment) {
  while (w->bytes % alignment) put_number(w, 0, 1);
}
static inline void writer_free(struct gguf_writer *w) {
  free(w->data);
  *w = (struct gguf_writer){0};
}

#endif
