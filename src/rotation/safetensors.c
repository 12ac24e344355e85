/*
 * safetensors.c - reading with every claim of the header checked, writing with the same bytes for the same input.
 *
 * JSON is left to jansson, which refuses duplicate keys and NUL characters here. Tensors must cover the data exactly, as the
 * format demands: then no two can overlap and nothing can hide between them.
 */
#include "rotation/safetensors.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define MAX_HEADER_BYTES ((uint64_t)16 << 20) /* 32,000 tensors take 3 MB */

static const struct {
  const char *name;
  size_t bytes;
} dtypes[SAFETENSOR_DTYPES] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
                               {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},
                               {"I32", 4},  {"F32", 4}, {"U64", 8}, {"I64", 8},     {"F64", 8}};

const char *safetensor_dtype_name(enum safetensor_dtype dtype) { return dtypes[dtype].name; }
size_t safetensor_dtype_bytes(enum safetensor_dtype dtype) { return dtypes[dtype].bytes; }

/* ---- reading ---- */

/* A number of the header: an integer, not negative. */
static bool read_size(const json_t *value, int64_t *size) {
  if (!json_is_integer(value) || json_integer_value(value) < 0) return false;
  *size = json_integer_value(value);
  return true;
}

static oscar_status read_shape(oscar_context *context, const json_t *entry, struct safetensor *t) {
  const json_t *shape = json_object_get(entry, "shape"), *dtype = json_object_get(entry, "dtype");
  int k = 0;
  while (json_is_string(dtype) && k < SAFETENSOR_DTYPES && strcmp(json_string_value(dtype), dtypes[k].name) != 0) k++;
  if (!json_is_string(dtype) || k == SAFETENSOR_DTYPES)
    return set_error(context, OSCAR_UNSUPPORTED, "tensor %s: its dtype is not known", t->name);
  t->dtype = (enum safetensor_dtype)k;
  if (!json_is_array(shape) || json_array_size(shape) > SAFETENSOR_MAX_DIMS)
    return set_error(context, OSCAR_FORMAT, "tensor %s: its shape is no list of at most %d numbers", t->name,
                     SAFETENSOR_MAX_DIMS);
  t->dims = (int)json_array_size(shape);
  size_t bytes = dtypes[k].bytes;
  for (int i = 0; i < t->dims; i++)
    if (!read_size(json_array_get(shape, (size_t)i), &t->shape[i]) || __builtin_mul_overflow(bytes, (size_t)t->shape[i], &bytes))
      return set_error(context, OSCAR_FORMAT, "tensor %s: its shape is not possible", t->name);
  t->bytes = bytes;
  return OSCAR_OK;
}

static oscar_status read_tensor(oscar_context *context, const json_t *entry, const uint8_t *data, size_t data_bytes,
                                struct safetensor *t) {
  if (!json_is_object(entry) || json_object_size(entry) != 3)
    return set_error(context, OSCAR_FORMAT, "tensor %s: its entry is not {dtype, shape, data_offsets}", t->name);
  oscar_status status = read_shape(context, entry, t);
  if (status != OSCAR_OK) return status;
  const json_t *offsets = json_object_get(entry, "data_offsets");
  int64_t begin, end;
  if (!json_is_array(offsets) || json_array_size(offsets) != 2 || !read_size(json_array_get(offsets, 0), &begin) ||
      !read_size(json_array_get(offsets, 1), &end))
    return set_error(context, OSCAR_FORMAT, "tensor %s: its data_offsets are not [begin, end]", t->name);
  if (begin > end || (uint64_t)end > data_bytes)
    return set_error(context, OSCAR_FORMAT, "tensor %s: bytes %" PRId64 " to %" PRId64 " of %zu", t->name, begin, end,
                     data_bytes);
  if ((size_t)(end - begin) != t->bytes)
    return set_error(context, OSCAR_FORMAT, "tensor %s: %" PRId64 " bytes where its shape needs %zu", t->name, end - begin,
                     t->bytes);
  t->data = data + begin;
  return OSCAR_OK;
}

static int compare_places(const void *a, const void *b) {
  const struct safetensor *x = a, *y = b;
  uintptr_t p = (uintptr_t)x->data, q = (uintptr_t)y->data;
  return p != q ? (p > q) - (p < q) : (x->bytes > y->bytes) - (x->bytes < y->bytes); /* empty ones first */
}

static int compare_names(const void *a, const void *b) {
  return strcmp(((const struct safetensor *)a)->name, ((const struct safetensor *)b)->name);
}

static oscar_status check_coverage(struct safetensors *file, const uint8_t *data, size_t data_bytes) {
  const uint8_t *at = data;
  qsort(file->tensor, file->n, sizeof *file->tensor, compare_places);
  for (size_t i = 0; i < file->n; i++) {
    const struct safetensor *t = &file->tensor[i];
    if (t->data != at)
      return set_error(file->context, OSCAR_FORMAT, "tensor %s: its bytes %s those of the tensor before it", t->name,
                       (const uint8_t *)t->data < at ? "overlap" : "leave a gap to");
    at += t->bytes;
  }
  if ((size_t)(at - data) != data_bytes)
    return set_error(file->context, OSCAR_FORMAT, "%zu bytes after the last tensor belong to none",
                     data_bytes - (size_t)(at - data));
  qsort(file->tensor, file->n, sizeof *file->tensor, compare_names);
  return OSCAR_OK;
}

static oscar_status check_metadata(oscar_context *context, const json_t *metadata) {
  const char *key;
  json_t *value;
  if (!json_is_object(metadata)) return set_error(context, OSCAR_FORMAT, "__metadata__ is not a map of texts");
  json_object_foreach((json_t *)(uintptr_t)metadata, key, value) {
    if (!json_is_string(value)) return set_error(context, OSCAR_FORMAT, "__metadata__: %s is not a text", key);
  }
  return OSCAR_OK;
}

static oscar_status read_entries(struct safetensors *file, const uint8_t *data, size_t data_bytes) {
  const char *name;
  json_t *entry, *header = file->header;
  file->tensor = mem_zalloc(file->context, json_object_size(header), sizeof *file->tensor);
  if (!file->tensor) return OSCAR_NO_MEMORY;
  json_object_foreach(header, name, entry) {
    oscar_status status;
    if (strcmp(name, "__metadata__") == 0) {
      status = check_metadata(file->context, entry);
    } else {
      struct safetensor *t = &file->tensor[file->n++];
      t->name = name;
      status = read_tensor(file->context, entry, data, data_bytes, t);
    }
    if (status != OSCAR_OK) return status;
  }
  return check_coverage(file, data, data_bytes);
}

oscar_status safetensors_open(oscar_context *context, const uint8_t *bytes, size_t n, struct safetensors *file) {
  *file = (struct safetensors){.context = context};
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0 && n >= 8; i--) header_bytes = header_bytes << 8 | bytes[i];
  if (n < 8 || header_bytes > n - 8)
    return set_error(context, OSCAR_FORMAT, "not a safetensors file: a header of %" PRIu64 " bytes in a file of %zu",
                     header_bytes, n);
  if (header_bytes > MAX_HEADER_BYTES)
    return set_error(context, OSCAR_FORMAT, "a header of %" PRIu64 " bytes; at most %" PRIu64 " are read", header_bytes,
                     MAX_HEADER_BYTES);
  json_error_t error;
  json_t *header = header_bytes && bytes[8] == '{'
                       ? json_loadb((const char *)bytes + 8, (size_t)header_bytes, JSON_REJECT_DUPLICATES, &error)
                       : NULL;
  if (!header) {
    bool parsed = header_bytes && bytes[8] == '{';
    if (parsed && json_error_code(&error) == json_error_out_of_memory)
      return set_error(context, OSCAR_NO_MEMORY, "out of memory reading a header of %" PRIu64 " bytes", header_bytes);
    return set_error(context, OSCAR_FORMAT, "not a safetensors file: its header is no JSON object%s%s", parsed ? ": " : "",
                     parsed ? error.text : "");
  }
  file->header = header;
  return read_entries(file, bytes + 8 + header_bytes, n - 8 - (size_t)header_bytes);
}

void safetensors_close(struct safetensors *file) {
  json_decref(file->header);
  if (file->context) mem_free(file->context, file->tensor);
  *file = (struct safetensors){0};
}

const struct safetensor *safetensors_find(const struct safetensors *file, const char *name) {
  const struct safetensor key = {.name = name};
  return file->n ? bsearch(&key, file->tensor, file->n, sizeof key, compare_names) : NULL;
}

const char *safetensors_metadata(const struct safetensors *file, const char *key) {
  return json_string_value(json_object_get(json_object_get(file->header, "__metadata__"), key));
}

/* ---- writing ---- */

/* Puts `value` (whose reference is taken, also on failure) under a new key. */
static oscar_status put(oscar_context *context, json_t *object, const char *key, json_t *value) {
  if (json_object_get(object, key)) {
    json_decref(value);
    return set_error(context, OSCAR_INVALID_ARGUMENT, "%s is there twice", key);
  }
  if (json_object_set_new(object, key, value) != 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "%s: a name or text that is not UTF-8, or no memory for it", key);
  return OSCAR_OK;
}

static json_t *shape_of(const struct safetensor *t) {
  json_t *shape = json_array();
  for (int i = 0; i < t->dims; i++)
    if (json_array_append_new(shape, json_integer(t->shape[i])) != 0) {
      json_decref(shape);
      return NULL; /* the entry that takes it fails in turn */
    }
  return shape;
}

static json_t *make_entry(const struct safetensor *t, size_t begin) {
  return json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtypes[t->dtype].name, "shape", shape_of(t), "data_offsets",
                   (json_int_t)begin, (json_int_t)(begin + t->bytes));
}

static oscar_status fill_header(oscar_context *context, json_t *header, const struct safetensor *tensors, size_t n,
                                const struct safetensors_text *metadata, size_t n_metadata) {
  json_t *texts = json_object();
  oscar_status status = OSCAR_OK;
  for (size_t i = 0; status == OSCAR_OK && i < n_metadata; i++)
    status = put(context, texts, metadata[i].key, json_string(metadata[i].value));
  if (status == OSCAR_OK && n_metadata) status = put(context, header, "__metadata__", json_incref(texts));
  json_decref(texts);
  size_t begin = 0;
  for (size_t i = 0; status == OSCAR_OK && i < n; begin += tensors[i++].bytes)
    status = put(context, header, tensors[i].name, make_entry(&tensors[i], begin));
  return status;
}

oscar_status safetensors_write(oscar_context *context, FILE *stream, const struct safetensor *tensors, size_t n,
                               const struct safetensors_text *metadata, size_t n_metadata) {
  json_t *header = json_object();
  char *text = NULL;
  oscar_status status = fill_header(context, header, tensors, n, metadata, n_metadata);
  if (status != OSCAR_OK) goto out;
  text = json_dumps(header, JSON_COMPACT | JSON_SORT_KEYS);
  if (!text) {
    status = set_error(context, OSCAR_NO_MEMORY, "out of memory writing a header for %zu tensors", n);
    goto out;
  }
  size_t length = strlen(text), padded = round_up(8 + length, 64) - 8;
  for (int i = 0; i < 8; i++) fputc((int)(padded >> 8 * i & 0xFF), stream);
  fwrite(text, 1, length, stream);
  for (size_t i = length; i < padded; i++) fputc(' ', stream);
  for (size_t i = 0; i < n; i++) fwrite(tensors[i].data, 1, tensors[i].bytes, stream);
out:
  free(text);
  json_decref(header);
  return status;
}
