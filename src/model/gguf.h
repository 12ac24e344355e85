/*
 * model/gguf.h - GGUF v2 and v3 files, mapped and validated before use. Private.
 * Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Little-endian only.
 */
#ifndef OSCAR_GGUF_H
#define OSCAR_GGUF_H

#include "backend/backend.h"
#include "base/file.h"

enum gguf_type {
  GGUF_UINT8 = 0,
  GGUF_INT8,
  GGUF_UINT16,
  GGUF_INT16,
  GGUF_UINT32,
  GGUF_INT32,
  GGUF_FLOAT32,
  GGUF_BOOL,
  GGUF_STRING,
  GGUF_ARRAY,
  GGUF_UINT64,
  GGUF_INT64,
  GGUF_FLOAT64
};

struct gguf_string {
  const char *text;
  uint64_t bytes;
}; /* in the mapping, not terminated */

struct gguf_tensor {
  char name[128];
  int type; /* as in the file; enum weight_type if known */
  int dims;
  int64_t shape[4]; /* shape[0] is the fastest */
  const uint8_t *data;
  size_t bytes; /* data is NULL and bytes 0 for a type that weight_block() does not know: refuse it when it is needed */
};

struct gguf;
/* Errors: IO, FORMAT (what is malformed and where), UNSUPPORTED (version, big-endian). The mapping lives until close. */
oscar_status gguf_open(oscar_context *context, const char *path, struct gguf **file);
/* The same over memory that the caller keeps (tests, fuzzing), 8-byte aligned. `name` is used in messages. */
oscar_status gguf_parse(oscar_context *context, const char *name, const uint8_t *data, size_t bytes, struct gguf **file);
void gguf_close(struct gguf *file);

const char *gguf_path(const struct gguf *file);
size_t gguf_bytes(const struct gguf *file);
int64_t gguf_tensor_count(const struct gguf *file);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *file, int64_t index);
const struct gguf_tensor *gguf_find_tensor(const struct gguf *file, const char *name); /* NULL if absent */

/* Takes a tensor's data out of the process until it is read again; does nothing after gguf_parse. */
void gguf_release(const struct gguf *file, const void *data, size_t bytes);

/* Metadata. _find-like getters return false when the key is absent or has another type (integers of any width convert if in
 * range). */
bool gguf_get_i64(const struct gguf *file, const char *key, int64_t *value);
bool gguf_get_f64(const struct gguf *file, const char *key, double *value);
bool gguf_get_bool(const struct gguf *file, const char *key, bool *value);
bool gguf_get_string(const struct gguf *file, const char *key, struct gguf_string *value);
/* Arrays: element count, or -1 if absent or of another element type. */
int64_t gguf_array_count(const struct gguf *file, const char *key, enum gguf_type element);
struct gguf_string gguf_array_string(const struct gguf *file, const char *key, int64_t index); /* O(1) after open */
/* Pointer to count elements in the mapping, possibly unaligned (use memcpy); NULL if absent or of another type. */
const void *gguf_array_data(const struct gguf *file, const char *key, enum gguf_type element, int64_t *count);

/* SHA-256 (hex, 64 digits) over metadata, tensor table and samples of every tensor's data: tells models apart without reading
 * the whole file. */
oscar_status gguf_fingerprint(const struct gguf *file, char hex[65]);

#endif
