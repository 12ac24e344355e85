/*
 * rotation/safetensors.h - the safetensors container: named tensors behind a JSON header. Private.
 *
 * 8 bytes little-endian N, N bytes of JSON, then the tensors' bytes without gaps. The header maps a name to {dtype, shape,
 * data_offsets [begin, end)}, offsets counted from the end of the header; "__metadata__" maps text to text.
 */
#ifndef OSCAR_SAFETENSORS_H
#define OSCAR_SAFETENSORS_H

#include "base/base.h"
#include <stdio.h>

enum safetensor_dtype {
  SAFETENSOR_BOOL,
  SAFETENSOR_U8,
  SAFETENSOR_I8,
  SAFETENSOR_F8_E4M3,
  SAFETENSOR_F8_E5M2,
  SAFETENSOR_U16,
  SAFETENSOR_I16,
  SAFETENSOR_F16,
  SAFETENSOR_BF16,
  SAFETENSOR_U32,
  SAFETENSOR_I32,
  SAFETENSOR_F32,
  SAFETENSOR_U64,
  SAFETENSOR_I64,
  SAFETENSOR_F64,
  SAFETENSOR_DTYPES
};

const char *safetensor_dtype_name(enum safetensor_dtype dtype); /* as in the header: "F32" */
size_t safetensor_dtype_bytes(enum safetensor_dtype dtype);

#define SAFETENSOR_MAX_DIMS 8

struct safetensor {
  const char *name;
  enum safetensor_dtype dtype;
  int dims;
  int64_t shape[SAFETENSOR_MAX_DIMS];
  const void *data; /* when read: into the file's bytes, of no particular alignment */
  size_t bytes;
};

struct safetensors_text { /* an entry of __metadata__ */
  const char *key, *value;
};

struct safetensors {
  oscar_context *context;
  struct safetensor *tensor; /* ascending by name */
  size_t n;
  void *header; /* the parsed JSON, which owns the names */
};

/* `bytes` must outlive the object. Everything the header says is checked against the bytes that are there: ranges, sizes, gaps,
 * overlaps, duplicates. Errors: FORMAT, UNSUPPORTED (a dtype), NO_MEMORY. Close in every case. */
oscar_status safetensors_open(oscar_context *context, const uint8_t *bytes, size_t n, struct safetensors *file);
void safetensors_close(struct safetensors *file);

/* NULL if there is none. */
const struct safetensor *safetensors_find(const struct safetensors *file, const char *name);
const char *safetensors_metadata(const struct safetensors *file, const char *key);

/* Writes a whole file: header (keys sorted, padded with spaces so that the data starts on a multiple of 64), then the tensors in
 * the order given. The same input gives the same bytes. Errors of the stream stay with the stream.
 * Errors: INVALID_ARGUMENT (text that is not UTF-8, a name twice), NO_MEMORY. */
oscar_status safetensors_write(oscar_context *context, FILE *stream, const struct safetensor *tensors, size_t n,
                               const struct safetensors_text *metadata, size_t n_metadata);

#endif
