/*
 * gguf.c - reading GGUF v2 and v3.
 *
 * One pass checks everything up to the tensor data and keeps pointers into the mapping; nothing of the file is copied but tensor
 * names. Sizes in the file are never trusted: a count is compared with the bytes that are left before anything is allocated for
 * it, and tables grow as entries are read, so that a hostile file costs no more memory than a small multiple of its own size.
 * String arrays (vocabularies of 150,000 tokens) get a table of offsets, names and keys a sorted index.
 *
 * Invariants after a successful parse: every gguf_string and array lies inside the mapping; keys and tensor names are unique and
 * hold no zero byte; a tensor of a known type lies inside the mapping with 64-bit sizes that do not overflow. Tensors of types
 * that this build does not know are kept with data NULL and bytes 0: whoever wants to use one refuses it by name. Tensors may
 * overlap; they are only read.
 */
#include "model/gguf.h"

#include <inttypes.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_ALIGNMENT = 32, MAX_KEY_BYTES = 65535 }; /* both from the format description */

struct entry {
  struct gguf_string key;
  int type, element;    /* element: of an array */
  uint64_t count;       /* elements of an array, bytes of a string */
  const uint8_t *value; /* the scalar, the text of a string, the first element of an array */
  uint64_t *offsets;    /* string arrays: from value to the length in front of each string */
};

struct gguf {
  oscar_context *context;
  char *path;
  struct file_map map; /* of gguf_open; empty after gguf_parse */
  const uint8_t *data;
  size_t bytes, data_at; /* data_at: where tensor data starts */
  struct entry *entries;
  struct gguf_tensor *tensors;
  size_t entry_count, entry_room, tensor_count, tensor_room;
  const struct entry **entry_index;        /* sorted by key */
  const struct gguf_tensor **tensor_index; /* sorted by name */
};

struct parser {
  oscar_context *context;
  struct gguf *file;
  size_t at;
};

/* ---- little-endian numbers at any address ---- */

static uint64_t load(const uint8_t *p, size_t bytes) {
  uint64_t x = 0;
  for (size_t i = 0; i < bytes; i++) x |= (uint64_t)p[i] << 8 * i;
  return x;
}

static const struct {
  const char *name;
  size_t bytes; /* 0: of variable size */
} value_types[] = {
    [GGUF_UINT8] = {"uint8", 1},     [GGUF_INT8] = {"int8", 1},   [GGUF_UINT16] = {"uint16", 2},   [GGUF_INT16] = {"int16", 2},
    [GGUF_UINT32] = {"uint32", 4},   [GGUF_INT32] = {"int32", 4}, [GGUF_FLOAT32] = {"float32", 4}, [GGUF_BOOL] = {"bool", 1},
    [GGUF_STRING] = {"string", 0},   [GGUF_ARRAY] = {"array", 0}, [GGUF_UINT64] = {"uint64", 8},   [GGUF_INT64] = {"int64", 8},
    [GGUF_FLOAT64] = {"float64", 8},
};

/* ---- reading with bounds ---- */

static size_t left(const struct parser *p) { return p->file->bytes - p->at; }

static const uint8_t *take(struct parser *p, uint64_t bytes) {
  if (bytes > left(p)) return NULL;
  const uint8_t *from = p->file->data + p->at;
  p->at += (size_t)bytes;
  return from;
}

static oscar_status cut_off(const struct parser *p, const char *what) {
  return set_error(p->context, OSCAR_FORMAT, "%s: the file ends inside %s (byte %zu of %zu)", p->file->path, what, p->at,
                   p->file->bytes);
}

/* Names from a file go into messages with everything but printable ASCII replaced, cut to a readable length. */
struct shown {
  char text[96];
};
static struct shown show(struct gguf_string s) {
  struct shown out;
  size_t n = s.bytes < sizeof out.text - 1 ? (size_t)s.bytes : sizeof out.text - 1;
  for (size_t i = 0; i < n; i++) out.text[i] = s.text[i] >= ' ' && s.text[i] <= '~' ? s.text[i] : '?';
  out.text[n] = '\0';
  return out;
}

static oscar_status read_string(struct parser *p, const char *what, struct gguf_string *s) {
  const uint8_t *length = take(p, 8);
  if (!length) return cut_off(p, what);
  s->bytes = load(length, 8);
  s->text = (const char *)take(p, s->bytes);
  if (s->text) return OSCAR_OK;
  return set_error(p->context, OSCAR_FORMAT, "%s: %s at byte %zu claims %" PRIu64 " bytes, but only %zu are left", p->file->path,
                   what, p->at - 8, s->bytes, left(p));
}

/* A string that is looked up by a C string. */
static oscar_status read_name(struct parser *p, const char *what, uint64_t max_bytes, struct gguf_string *s) {
  size_t start = p->at;
  oscar_status status = read_string(p, what, s);
  if (status) return status;
  if (s->bytes == 0 || s->bytes > max_bytes)
    return set_error(p->context, OSCAR_FORMAT, "%s: %s at byte %zu has %" PRIu64 " bytes, expected 1 to %" PRIu64, p->file->path,
                     what, start, s->bytes, max_bytes);
  if (memchr(s->text, 0, (size_t)s->bytes))
    return set_error(p->context, OSCAR_FORMAT, "%s: %s '%s' holds a zero byte", p->file->path, what, show(*s).text);
  return OSCAR_OK;
}

/* Room for one more of a growing table. */
static oscar_status grow(oscar_context *context, void **table, size_t count, size_t *room, size_t size) {
  if (count < *room) return OSCAR_OK;
  size_t wanted = *room ? 2 * *room : 64;
  void *bigger = mem_resize(context, *table, count * size, wanted * size);
  if (!bigger) return OSCAR_NO_MEMORY;
  *table = bigger;
  *room = wanted;
  return OSCAR_OK;
}

/* ---- metadata ---- */

static oscar_status check_bools(const struct parser *p, const struct entry *e, const uint8_t *value, uint64_t count) {
  for (uint64_t i = 0; i < count; i++)
    if (value[i] > 1)
      return set_error(p->context, OSCAR_FORMAT, "%s: key '%s': a bool is %d, expected 0 or 1", p->file->path, show(e->key).text,
                       value[i]);
  return OSCAR_OK;
}

static oscar_status read_string_array(struct parser *p, struct entry *e) {
  if (e->count > left(p) / 8)
    return set_error(p->context, OSCAR_FORMAT, "%s: key '%s' claims %" PRIu64 " strings, but only %zu bytes are left",
                     p->file->path, show(e->key).text, e->count, left(p));
  e->value = p->file->data + p->at;
  e->offsets = mem_alloc(p->context, (size_t)e->count, sizeof *e->offsets);
  if (!e->offsets) return OSCAR_NO_MEMORY;
  char what[128];
  snprintf(what, sizeof what, "a string of key '%s'", show(e->key).text);
  size_t start = p->at;
  for (uint64_t i = 0; i < e->count; i++) {
    struct gguf_string s;
    e->offsets[i] = p->at - start;
    oscar_status status = read_string(p, what, &s);
    if (status) return status;
  }
  return OSCAR_OK;
}

static oscar_status read_array(struct parser *p, struct entry *e) {
  const uint8_t *head = take(p, 12);
  if (!head) return cut_off(p, "the head of an array");
  uint64_t element = load(head, 4);
  e->count = load(head + 4, 8);
  /* No key that any reader here knows holds arrays of arrays. */
  if (element == GGUF_ARRAY)
    return set_error(p->context, OSCAR_UNSUPPORTED, "%s: key '%s' is an array of arrays", p->file->path, show(e->key).text);
  if (element >= ARRAY_LENGTH(value_types))
    return set_error(p->context, OSCAR_FORMAT, "%s: key '%s': element type %" PRIu64 " does not exist (0 to 12 do)",
                     p->file->path, show(e->key).text, element);
  e->element = (int)element;
  if (element == GGUF_STRING) return read_string_array(p, e);
  size_t size = value_types[element].bytes;
  if (e->count > left(p) / size)
    return set_error(p->context, OSCAR_FORMAT, "%s: key '%s' claims %" PRIu64 " values of type %s, but only %zu bytes are left",
                     p->file->path, show(e->key).text, e->count, value_types[element].name, left(p));
  e->value = take(p, e->count * size);
  return element == GGUF_BOOL ? check_bools(p, e, e->value, e->count) : OSCAR_OK;
}

static oscar_status read_value(struct parser *p, struct entry *e) {
  const uint8_t *type = take(p, 4);
  if (!type) return cut_off(p, "the type of a value");
  uint64_t number = load(type, 4);
  if (number >= ARRAY_LENGTH(value_types))
    return set_error(p->context, OSCAR_FORMAT, "%s: key '%s': value type %" PRIu64 " does not exist (0 to 12 do)", p->file->path,
                     show(e->key).text, number);
  e->type = (int)number;
  if (number == GGUF_ARRAY) return read_array(p, e);
  if (number == GGUF_STRING) {
    struct gguf_string s;
    char what[128];
    snprintf(what, sizeof what, "the string of key '%s'", show(e->key).text);
    oscar_status status = read_string(p, what, &s);
    if (status) return status;
    e->value = (const uint8_t *)s.text;
    e->count = s.bytes;
    return OSCAR_OK;
  }
  e->value = take(p, value_types[number].bytes);
  if (!e->value) return cut_off(p, "a value");
  return number == GGUF_BOOL ? check_bools(p, e, e->value, 1) : OSCAR_OK;
}

static oscar_status read_entries(struct parser *p, uint64_t count) {
  struct gguf *file = p->file;
  for (uint64_t i = 0; i < count; i++) {
    oscar_status status = grow(p->context, (void **)&file->entries, file->entry_count, &file->entry_room, sizeof *file->entries);
    if (status) return status;
    struct entry *e = &file->entries[file->entry_count];
    *e = (struct entry){0};
    file->entry_count++; /* now: what it allocates is freed with the file */
    status = read_name(p, "a key", MAX_KEY_BYTES, &e->key);
    if (!status) status = read_value(p, e);
    if (status) return status;
  }
  return OSCAR_OK;
}

static int compare_strings(struct gguf_string a, struct gguf_string b) {
  size_t common = (size_t)(a.bytes < b.bytes ? a.bytes : b.bytes);
  int order = memcmp(a.text, b.text, common);
  return order ? order : (a.bytes > b.bytes) - (a.bytes < b.bytes);
}

static int compare_entries(const void *a, const void *b) {
  return compare_strings((*(const struct entry *const *)a)->key, (*(const struct entry *const *)b)->key);
}

static oscar_status index_entries(struct parser *p) {
  struct gguf *file = p->file;
  file->entry_index = mem_alloc(p->context, file->entry_count, sizeof *file->entry_index);
  if (!file->entry_index) return OSCAR_NO_MEMORY;
  for (size_t i = 0; i < file->entry_count; i++) file->entry_index[i] = &file->entries[i];
  qsort(file->entry_index, file->entry_count, sizeof *file->entry_index, compare_entries);
  for (size_t i = 1; i < file->entry_count; i++)
    if (compare_entries(&file->entry_index[i - 1], &file->entry_index[i]) == 0)
      return set_error(p->context, OSCAR_FORMAT, "%s: key '%s' appears twice", file->path, show(file->entry_index[i]->key).text);
  return OSCAR_OK;
}

static const struct entry *find_entry(const struct gguf *file, const char *key) {
  struct entry wanted = {.key = {key, strlen(key)}};
  const struct entry *pointer = &wanted;
  const struct entry **found =
      bsearch(&pointer, file->entry_index, file->entry_count, sizeof *file->entry_index, compare_entries);
  return found ? *found : NULL;
}

/* ---- tensors ---- */

static struct gguf_string tensor_name(const struct gguf_tensor *t) { return (struct gguf_string){t->name, strlen(t->name)}; }

static oscar_status read_shape(struct parser *p, struct gguf_tensor *t, int64_t *elements) {
  const uint8_t *dims = take(p, 4);
  if (!dims) return cut_off(p, "the shape of a tensor");
  uint64_t n = load(dims, 4);
  if (n < 1 || n > 4)
    return set_error(p->context, OSCAR_FORMAT, "%s: tensor '%s' has %" PRIu64 " dimensions, expected 1 to 4", p->file->path,
                     show(tensor_name(t)).text, n);
  const uint8_t *shape = take(p, 8 * n);
  if (!shape) return cut_off(p, "the shape of a tensor");
  t->dims = (int)n;
  *elements = 1;
  for (int i = 0; i < 4; i++) {
    uint64_t length = i < t->dims ? load(shape + 8 * i, 8) : 1;
    if (length < 1 || length > INT64_MAX || __builtin_mul_overflow(*elements, (int64_t)length, elements))
      return set_error(p->context, OSCAR_FORMAT,
                       "%s: tensor '%s': dimension %d is %" PRIu64 ", expected at least 1 and a number of elements below 2^63",
                       p->file->path, show(tensor_name(t)).text, i, length);
    t->shape[i] = (int64_t)length;
  }
  return OSCAR_OK;
}

static oscar_status measure(struct parser *p, struct gguf_tensor *t, int64_t elements) {
  int block;
  size_t block_bytes;
  if (!weight_block((enum weight_type)t->type, &block, &block_bytes)) return OSCAR_OK;
  if (t->shape[0] % block)
    return set_error(p->context, OSCAR_FORMAT,
                     "%s: tensor '%s' has rows of %" PRId64 " elements, expected a multiple of %d for %s", p->file->path,
                     show(tensor_name(t)).text, t->shape[0], block, weight_type_name(t->type));
  if (__builtin_mul_overflow((size_t)(elements / block), block_bytes, &t->bytes))
    return set_error(p->context, OSCAR_FORMAT, "%s: tensor '%s' has %" PRId64 " elements: its size in bytes overflows",
                     p->file->path, show(tensor_name(t)).text, elements);
  return OSCAR_OK;
}

/* The offset counts from the start of the tensor data, which is known only when all tensors have been read. */
static oscar_status read_tensor(struct parser *p, struct gguf_tensor *t, uint64_t *offset) {
  struct gguf_string name;
  oscar_status status = read_name(p, "a tensor name", sizeof t->name - 1, &name);
  if (status) return status;
  memcpy(t->name, name.text, (size_t)name.bytes);
  int64_t elements = 0;
  status = read_shape(p, t, &elements);
  if (status) return status;
  const uint8_t *rest = take(p, 12);
  if (!rest) return cut_off(p, "the description of a tensor");
  uint64_t type = load(rest, 4);
  if (type > INT32_MAX)
    return set_error(p->context, OSCAR_FORMAT, "%s: tensor '%s' has type %" PRIu64 ", which no version of the format defines",
                     p->file->path, show(name).text, type);
  t->type = (int)type;
  *offset = load(rest + 4, 8);
  return measure(p, t, elements);
}

static oscar_status read_tensors(struct parser *p, uint64_t count, uint64_t **offsets) {
  struct gguf *file = p->file;
  size_t offset_room = 0;
  for (uint64_t i = 0; i < count; i++) {
    size_t n = file->tensor_count;
    oscar_status status = grow(p->context, (void **)&file->tensors, n, &file->tensor_room, sizeof *file->tensors);
    if (!status) status = grow(p->context, (void **)offsets, n, &offset_room, sizeof **offsets);
    if (status) return status;
    file->tensors[n] = (struct gguf_tensor){0};
    status = read_tensor(p, &file->tensors[n], &(*offsets)[n]);
    if (status) return status;
    file->tensor_count++;
  }
  return OSCAR_OK;
}

static oscar_status read_alignment(const struct parser *p, size_t *alignment) {
  int64_t value = DEFAULT_ALIGNMENT;
  if (find_entry(p->file, "general.alignment") && !gguf_get_i64(p->file, "general.alignment", &value)) value = 0;
  /* At least 8 by the format, so that numbers in an aligned mapping can be read in place. */
  if (value < 8 || value > INT32_MAX || (value & (value - 1)))
    return set_error(p->context, OSCAR_FORMAT, "%s: key 'general.alignment' is not an integer power of two from 8 to 2^30",
                     p->file->path);
  *alignment = (size_t)value;
  return OSCAR_OK;
}

static oscar_status place_tensors(struct parser *p, const uint64_t *offsets) {
  struct gguf *file = p->file;
  size_t alignment = DEFAULT_ALIGNMENT;
  oscar_status status = read_alignment(p, &alignment);
  if (status) return status;
  size_t start = round_up(p->at, alignment), room = start < file->bytes ? file->bytes - start : 0;
  file->data_at = start < file->bytes ? start : file->bytes;
  for (size_t i = 0; i < file->tensor_count; i++) {
    struct gguf_tensor *t = &file->tensors[i];
    if (offsets[i] % alignment)
      return set_error(p->context, OSCAR_FORMAT, "%s: tensor '%s' is at offset %" PRIu64 ", expected a multiple of %zu",
                       file->path, show(tensor_name(t)).text, offsets[i], alignment);
    if (offsets[i] > room || t->bytes > room - (size_t)offsets[i])
      return set_error(p->context, OSCAR_FORMAT,
                       "%s: tensor '%s' (%zu bytes at offset %" PRIu64
                       ") ends after the file, which has %zu bytes of tensor data",
                       file->path, show(tensor_name(t)).text, t->bytes, offsets[i], room);
    if (t->bytes) t->data = file->data + start + offsets[i];
  }
  return OSCAR_OK;
}

static int compare_tensors(const void *a, const void *b) {
  return strcmp((*(const struct gguf_tensor *const *)a)->name, (*(const struct gguf_tensor *const *)b)->name);
}

static oscar_status index_tensors(struct parser *p) {
  struct gguf *file = p->file;
  file->tensor_index = mem_alloc(p->context, file->tensor_count, sizeof *file->tensor_index);
  if (!file->tensor_index) return OSCAR_NO_MEMORY;
  for (size_t i = 0; i < file->tensor_count; i++) file->tensor_index[i] = &file->tensors[i];
  qsort(file->tensor_index, file->tensor_count, sizeof *file->tensor_index, compare_tensors);
  for (size_t i = 1; i < file->tensor_count; i++)
    if (compare_tensors(&file->tensor_index[i - 1], &file->tensor_index[i]) == 0)
      return set_error(p->context, OSCAR_FORMAT, "%s: tensor '%s' appears twice", file->path,
                       show(tensor_name(file->tensor_index[i])).text);
  return OSCAR_OK;
}

/* ---- the whole file ---- */

static oscar_status read_head(struct parser *p, uint64_t *tensors, uint64_t *entries) {
  const char *path = p->file->path;
  const uint8_t *magic = take(p, 4);
  if (!magic || memcmp(magic, "GGUF", 4) != 0)
    return set_error(p->context, OSCAR_FORMAT, "%s: not a GGUF file (it does not start with the bytes GGUF)", path);
  const uint8_t *numbers = take(p, 4);
  if (!numbers) return cut_off(p, "the version");
  uint64_t version = load(numbers, 4);
  /* Small numbers in the wrong byte order are multiples of 2^16. */
  if (version && (version & 0xFFFF) == 0)
    return set_error(p->context, OSCAR_UNSUPPORTED, "%s: a big-endian GGUF file; only little-endian ones can be read", path);
  if (version != 2 && version != 3)
    return set_error(p->context, OSCAR_UNSUPPORTED, "%s: GGUF version %" PRIu64 "; versions 2 and 3 can be read", path, version);
  numbers = take(p, 16);
  if (!numbers) return cut_off(p, "the head");
  *tensors = load(numbers, 8);
  *entries = load(numbers + 8, 8);
  /* The least a tensor takes: name of one byte, one dimension, type, offset; a key: name of one byte, type, one byte. */
  const uint64_t least_tensor = 8 + 1 + 4 + 8 + 4 + 8, least_entry = 8 + 1 + 4 + 1;
  if (*tensors > left(p) / least_tensor || *entries > left(p) / least_entry)
    return set_error(p->context, OSCAR_FORMAT,
                     "%s: the head claims %" PRIu64 " tensors and %" PRIu64 " keys, more than fit into the %zu bytes left", path,
                     *tensors, *entries, left(p));
  return OSCAR_OK;
}

static oscar_status parse(struct parser *p) {
  uint64_t tensors = 0, entries = 0, *offsets = NULL;
  oscar_status status = read_head(p, &tensors, &entries);
  if (!status) status = read_entries(p, entries);
  if (!status) status = index_entries(p);
  if (!status) status = read_tensors(p, tensors, &offsets);
  if (!status) status = index_tensors(p);
  if (!status) status = place_tensors(p, offsets);
  mem_free(p->context, offsets);
  return status;
}

oscar_status gguf_parse(oscar_context *context, const char *name, const uint8_t *data, size_t bytes, struct gguf **result) {
  *result = NULL;
  struct gguf *file = mem_zalloc(context, 1, sizeof *file);
  if (!file) return OSCAR_NO_MEMORY;
  file->context = context;
  file->data = data;
  file->bytes = bytes;
  file->path = mem_strdup(context, name);
  struct parser parser = {context, file, 0};
  oscar_status status = file->path ? parse(&parser) : OSCAR_NO_MEMORY;
  if (status)
    gguf_close(file);
  else
    *result = file;
  return status;
}

oscar_status gguf_open(oscar_context *context, const char *path, struct gguf **file) {
  *file = NULL;
  struct file_map map;
  oscar_status status = file_map_open(context, path, &map);
  if (status) return status;
  status = gguf_parse(context, path, map.data, map.bytes, file);
  if (status)
    file_map_close(&map);
  else
    (*file)->map = map;
  return status;
}

void gguf_close(struct gguf *file) {
  if (!file) return;
  for (size_t i = 0; i < file->entry_count; i++) mem_free(file->context, file->entries[i].offsets);
  mem_free(file->context, file->entries);
  mem_free(file->context, file->tensors);
  mem_free(file->context, file->entry_index);
  mem_free(file->context, file->tensor_index);
  mem_free(file->context, file->path);
  file_map_close(&file->map);
  mem_free(file->context, file);
}

/* ---- access ---- */

const char *gguf_path(const struct gguf *file) { return file->path; }
size_t gguf_bytes(const struct gguf *file) { return file->bytes; }
int64_t gguf_tensor_count(const struct gguf *file) { return (int64_t)file->tensor_count; }

const struct gguf_tensor *gguf_tensor_at(const struct gguf *file, int64_t index) {
  return index >= 0 && (uint64_t)index < file->tensor_count ? &file->tensors[index] : NULL;
}

void gguf_release(const struct gguf *file, const void *data, size_t bytes) {
  if (file->map.data) file_map_release(&file->map, data, bytes);
}

static int compare_name(const void *name, const void *tensor) {
  return strcmp(name, (*(const struct gguf_tensor *const *)tensor)->name);
}

const struct gguf_tensor *gguf_find_tensor(const struct gguf *file, const char *name) {
  const struct gguf_tensor **found =
      bsearch(name, file->tensor_index, file->tensor_count, sizeof *file->tensor_index, compare_name);
  return found ? *found : NULL;
}

bool gguf_get_i64(const struct gguf *file, const char *key, int64_t *value) {
  const struct entry *e = find_entry(file, key);
  if (!e) return false;
  switch (e->type) {
  case GGUF_UINT8:
  case GGUF_UINT16:
  case GGUF_UINT32:
  case GGUF_UINT64: {
    uint64_t x = load(e->value, value_types[e->type].bytes);
    if (x > INT64_MAX) return false;
    *value = (int64_t)x;
    return true;
  }
  case GGUF_INT8:
    *value = (int8_t)load(e->value, 1);
    return true;
  case GGUF_INT16:
    *value = (int16_t)load(e->value, 2);
    return true;
  case GGUF_INT32:
    *value = (int32_t)load(e->value, 4);
    return true;
  case GGUF_INT64:
    *value = (int64_t)load(e->value, 8);
    return true;
  default:
    return false;
  }
}

bool gguf_get_f64(const struct gguf *file, const char *key, double *value) {
  const struct entry *e = find_entry(file, key);
  int64_t integer;
  if (e && e->type == GGUF_FLOAT32) {
    uint32_t bits = (uint32_t)load(e->value, 4);
    float x;
    memcpy(&x, &bits, sizeof x);
    *value = (double)x;
    return true;
  }
  if (e && e->type == GGUF_FLOAT64) {
    uint64_t bits = load(e->value, 8);
    memcpy(value, &bits, sizeof bits);
    return true;
  }
  /* "in range" for a double: below 2^53, where every integer is exact */
  if (!gguf_get_i64(file, key, &integer) || integer > (int64_t)1 << 53 || integer < -((int64_t)1 << 53)) return false;
  *value = (double)integer;
  return true;
}

bool gguf_get_bool(const struct gguf *file, const char *key, bool *value) {
  const struct entry *e = find_entry(file, key);
  if (!e || e->type != GGUF_BOOL) return false;
  *value = e->value[0] != 0;
  return true;
}

bool gguf_get_string(const struct gguf *file, const char *key, struct gguf_string *value) {
  const struct entry *e = find_entry(file, key);
  if (!e || e->type != GGUF_STRING) return false;
  *value = (struct gguf_string){(const char *)e->value, e->count};
  return true;
}

static const struct entry *find_array(const struct gguf *file, const char *key, enum gguf_type element) {
  const struct entry *e = find_entry(file, key);
  return e && e->type == GGUF_ARRAY && e->element == (int)element ? e : NULL;
}

int64_t gguf_array_count(const struct gguf *file, const char *key, enum gguf_type element) {
  const struct entry *e = find_array(file, key, element);
  return e ? (int64_t)e->count : -1;
}

struct gguf_string gguf_array_string(const struct gguf *file, const char *key, int64_t index) {
  const struct entry *e = find_array(file, key, GGUF_STRING);
  if (!e || index < 0 || (uint64_t)index >= e->count) return (struct gguf_string){"", 0};
  const uint8_t *length = e->value + e->offsets[index];
  return (struct gguf_string){(const char *)length + 8, load(length, 8)};
}

const void *gguf_array_data(const struct gguf *file, const char *key, enum gguf_type element, int64_t *count) {
  const struct entry *e = element == GGUF_STRING ? NULL : find_array(file, key, element);
  *count = e ? (int64_t)e->count : 0;
  return e ? e->value : NULL;
}

/* ---- fingerprint ---- */

enum { SAMPLE_BYTES = 4096 }; /* one page of a mapping */

/* Start, middle and end of the data; all of it if three samples would cover it. */
static bool hash_tensor(EVP_MD_CTX *hash, const struct gguf_tensor *t) {
  if (t->bytes <= (size_t)3 * SAMPLE_BYTES) return EVP_DigestUpdate(hash, t->data, t->bytes) == 1;
  size_t middle = t->bytes / 2 / SAMPLE_BYTES * SAMPLE_BYTES;
  return EVP_DigestUpdate(hash, t->data, SAMPLE_BYTES) == 1 && EVP_DigestUpdate(hash, t->data + middle, SAMPLE_BYTES) == 1 &&
         EVP_DigestUpdate(hash, t->data + t->bytes - SAMPLE_BYTES, SAMPLE_BYTES) == 1;
}

oscar_status gguf_fingerprint(const struct gguf *file, char hex[65]) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned digest_bytes = 0;
  EVP_MD_CTX *hash = EVP_MD_CTX_new();
  bool ok = hash && EVP_DigestInit_ex(hash, EVP_sha256(), NULL) == 1 && EVP_DigestUpdate(hash, file->data, file->data_at) == 1;
  for (size_t i = 0; ok && i < file->tensor_count; i++)
    if (file->tensors[i].data) ok = hash_tensor(hash, &file->tensors[i]);
  ok = ok && EVP_DigestFinal_ex(hash, digest, &digest_bytes) == 1 && digest_bytes == 32;
  EVP_MD_CTX_free(hash);
  hex[0] = '\0';
  if (!ok) return set_error(file->context, OSCAR_NO_MEMORY, "%s: libcrypto could not compute SHA-256", file->path);
  for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
  return OSCAR_OK;
}
