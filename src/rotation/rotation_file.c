/*
 * rotation_file.c - what the pickle of a published rotation file says: layers of rotations, means and eigenvalues.
 *
 * Layout (versions 1, 2, 3 and "identity-v1" differ only in which entries are there): a dict with format_version, objective,
 * source_grouping and layers; a layer, under its id as int or str, has rotation [d][d] or [heads][d][d] and may have layer_id,
 * eigenvalues and k_mean ([d] or [heads][d]), q_rotation and o_rotation (like rotation). Unknown entries are left alone.
 * All geometry is checked before any tensor is read, and a tensor's storage is asked for before memory is taken for it.
 */
#include "rotation/torch_file.h"
#include "rotation/pickle.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LAYERS 4096
#define MAX_HEADS  256
#define MAX_FLOATS ((int64_t)1 << 28) /* 1 GiB: twice what 100 layers of 32 heads of 256 x 256 hold */

/* The tensors of a layer, as indices. */
enum { ROTATION, MEAN, Q_ROTATION, O_ROTATION, EIGENVALUES, TENSORS };
static const struct {
  const char *name;
  int dims; /* without the one for heads */
} tensors[TENSORS] = {{"rotation", 2}, {"k_mean", 1}, {"q_rotation", 2}, {"o_rotation", 2}, {"eigenvalues", 1}};

struct entry { /* one layer of the pickle */
  int id, heads;
  const struct pickle_tensor *tensor[TENSORS]; /* NULL: not there */
};

struct reader {
  oscar_context *context;
  const struct storage_source *source;
  oscar_rotation_file *file;
  struct entry *entries;
  const struct pickle_storage *held; /* the storage in `bytes`: several tensors may be views of one */
  uint8_t *bytes;
};

/* ---- scalars ---- */

static oscar_status copy_text(struct reader *r, const struct pickle_value *root, const char *name, char *to, size_t room) {
  const struct pickle_value *value = pickle_find(root, name);
  if (!value || value->kind == PICKLE_NONE) return OSCAR_OK;
  if (value->kind != PICKLE_TEXT || value->text.n >= room)
    return set_error(r->context, OSCAR_FORMAT, "%s is no text of less than %zu bytes", name, room);
  memcpy(to, value->text.bytes, value->text.n);
  return OSCAR_OK;
}

static oscar_status read_version(struct reader *r, const struct pickle_value *root) {
  const struct pickle_value *value = pickle_find(root, "format_version");
  char *version = r->file->format_version;
  if (value && value->kind == PICKLE_INT)
    snprintf(version, sizeof r->file->format_version, "%" PRId64, value->integer);
  else if (value && value->kind == PICKLE_TEXT && value->text.n < sizeof r->file->format_version)
    memcpy(version, value->text.bytes, value->text.n);
  else
    return set_error(r->context, OSCAR_FORMAT, "there is no format_version: not a rotation file");
  static const char *const known[] = {"1", "2", "3", "identity-v1"};
  for (size_t i = 0; i < ARRAY_LENGTH(known); i++)
    if (strcmp(version, known[i]) == 0) return OSCAR_OK;
  return set_error(r->context, OSCAR_UNSUPPORTED, "format_version %s; 1, 2, 3 and identity-v1 are known", version);
}

static bool read_id(const struct pickle_value *value, int *id) {
  int64_t number = -1;
  if (value->kind == PICKLE_INT) number = value->integer;
  if (value->kind == PICKLE_TEXT && value->text.n >= 1 && value->text.n <= 6) {
    number = 0;
    for (uint32_t i = 0; i < value->text.n && number >= 0; i++) {
      int digit = value->text.bytes[i] - '0';
      number = digit >= 0 && digit <= 9 ? 10 * number + digit : -1;
    }
  }
  *id = (int)number;
  return number >= 0 && number < 1000000;
}

/* ---- geometry ---- */

/* Heads of a tensor (1 without that dimension), 0 if its shape is not [d][d] or [d], with or without heads in front. */
static int64_t heads_of(const struct pickle_tensor *t, int dims, int64_t d) {
  if (t->dims != dims && t->dims != dims + 1) return 0;
  for (int i = t->dims - dims; i < t->dims; i++)
    if (t->size[i] != d) return 0;
  return t->dims == dims ? 1 : t->size[0] <= MAX_HEADS ? t->size[0] : 0;
}

static oscar_status find_tensors(struct reader *r, const struct pickle_value *layer, struct entry *e) {
  for (int k = 0; k < TENSORS; k++) {
    const struct pickle_value *value = pickle_find(layer, tensors[k].name);
    if (!value || value->kind == PICKLE_NONE) continue;
    if (value->kind != PICKLE_TENSOR)
      return set_error(r->context, OSCAR_FORMAT, "layer %d: %s is a %s, not a tensor", e->id, tensors[k].name,
                       pickle_kind_name(value->kind));
    const struct pickle_tensor *t = &value->tensor;
    if (t->storage->dtype == PICKLE_INT64 || t->storage->dtype == PICKLE_INT32)
      return set_error(r->context, OSCAR_FORMAT, "layer %d: %s holds integers", e->id, tensors[k].name);
    e->tensor[k] = t;
  }
  return OSCAR_OK;
}

/* Shapes of a layer against head_dim, which the first layer sets; heads = the largest number any of its tensors has. */
static oscar_status check_shapes(struct reader *r, struct entry *e) {
  const struct pickle_tensor *rotation = e->tensor[ROTATION];
  if (!rotation) return set_error(r->context, OSCAR_FORMAT, "layer %d has no rotation", e->id);
  int64_t d = rotation->dims ? rotation->size[rotation->dims - 1] : 0;
  if (d < 1 || d > OSCAR_MAX_HEAD_DIM)
    return set_error(r->context, OSCAR_FORMAT, "layer %d: a rotation of %" PRId64 " columns; 1 to %d are possible", e->id, d,
                     OSCAR_MAX_HEAD_DIM);
  if (r->file->head_dim == 0) r->file->head_dim = (int)d;
  if (d != r->file->head_dim)
    return set_error(r->context, OSCAR_UNSUPPORTED, "layer %d has head_dim %" PRId64 ", others %d", e->id, d, r->file->head_dim);
  e->heads = 1;
  for (int pass = 0; pass < 2; pass++) /* largest first, then that every tensor has one head or as many */
    for (int k = 0; k < TENSORS; k++) {
      if (!e->tensor[k]) continue;
      int64_t heads = heads_of(e->tensor[k], tensors[k].dims, d);
      if (heads > e->heads && pass == 0) e->heads = (int)heads;
      if (heads != 1 && heads != e->heads)
        return set_error(r->context, OSCAR_FORMAT, "layer %d: the shape of %s does not fit %d heads of head_dim %" PRId64, e->id,
                         tensors[k].name, e->heads, d);
    }
  return OSCAR_OK;
}

static oscar_status read_entry(struct reader *r, const struct pickle_value *key, const struct pickle_value *layer,
                               struct entry *e) {
  int inner;
  if (!read_id(key, &e->id)) return set_error(r->context, OSCAR_FORMAT, "a key of layers is no layer id");
  if (layer->kind != PICKLE_DICT)
    return set_error(r->context, OSCAR_FORMAT, "layer %d is a %s, not a dict", e->id, pickle_kind_name(layer->kind));
  const struct pickle_value *again = pickle_find(layer, "layer_id");
  if (again && (!read_id(again, &inner) || inner != e->id))
    return set_error(r->context, OSCAR_FORMAT, "layer %d has another layer_id inside", e->id);
  oscar_status status = find_tensors(r, layer, e);
  return status == OSCAR_OK ? check_shapes(r, e) : status;
}

static int compare_ids(const void *a, const void *b) {
  int x = ((const struct entry *)a)->id, y = ((const struct entry *)b)->id;
  return (x > y) - (x < y);
}

static int64_t floats_of(const struct reader *r, const struct entry *e, int k) {
  int64_t d = r->file->head_dim;
  return e->heads * (tensors[k].dims == 2 ? d * d : d);
}

static oscar_status read_entries(struct reader *r, const struct pickle_value *layers) {
  if (!layers || layers->kind != PICKLE_DICT || layers->items.n == 0)
    return set_error(r->context, OSCAR_FORMAT, "there are no layers: not a rotation file");
  size_t n = layers->items.n / 2;
  if (n > MAX_LAYERS) return set_error(r->context, OSCAR_FORMAT, "%zu layers; at most %d are possible", n, MAX_LAYERS);
  r->entries = mem_zalloc(r->context, n, sizeof *r->entries);
  oscar_rotation_layer *made = r->entries ? mem_zalloc(r->context, n, sizeof *made) : NULL;
  if (!made) return OSCAR_NO_MEMORY;
  r->file->layer = made;
  oscar_status status = OSCAR_OK;
  for (size_t i = 0; status == OSCAR_OK && i < n; i++)
    status = read_entry(r, layers->items.item[2 * i], layers->items.item[2 * i + 1], &r->entries[i]);
  if (status != OSCAR_OK) return status;
  qsort(r->entries, n, sizeof *r->entries, compare_ids);
  int64_t floats = 0;
  for (size_t i = 0; i < n; i++) {
    if (i > 0 && r->entries[i].id == r->entries[i - 1].id)
      return set_error(r->context, OSCAR_FORMAT, "layer %d is there twice", r->entries[i].id);
    for (int k = 0; k < TENSORS; k++) floats += r->entries[i].tensor[k] ? floats_of(r, &r->entries[i], k) : 0;
  }
  if (floats > MAX_FLOATS)
    return set_error(r->context, OSCAR_UNSUPPORTED, "its tensors have %" PRId64 " numbers; %" PRId64 " are read at most", floats,
                     MAX_FLOATS);
  r->file->layers = (int)n;
  return OSCAR_OK;
}

/* ---- tensors ---- */

static oscar_status hold_storage(struct reader *r, const struct pickle_storage *s) {
  const struct pickle_storage *held = r->held;
  if (held && held->key.n == s->key.n && memcmp(held->key.bytes, s->key.bytes, s->key.n) == 0 && held->dtype == s->dtype &&
      held->elements == s->elements)
    return OSCAR_OK;
  mem_free(r->context, r->bytes);
  r->bytes = NULL;
  r->held = NULL;
  size_t bytes;
  if (__builtin_mul_overflow((size_t)s->elements, pickle_dtype_bytes(s->dtype), &bytes))
    return set_error(r->context, OSCAR_FORMAT, "a storage of %" PRId64 " elements", s->elements);
  oscar_status status = r->source->check(r->source->user, s->key.bytes, s->key.n, bytes);
  if (status != OSCAR_OK) return status;
  r->bytes = mem_alloc(r->context, bytes, 1);
  if (!r->bytes) return OSCAR_NO_MEMORY;
  status = r->source->read(r->source->user, s->key.bytes, s->key.n, r->bytes, bytes);
  if (status == OSCAR_OK) r->held = s;
  return status;
}

static float element(const uint8_t *bytes, enum pickle_dtype dtype, int64_t index) {
  uint16_t half;
  double number;
  float x;
  switch (dtype) {
  case PICKLE_FLOAT64:
    memcpy(&number, bytes + 8 * index, 8);
    return (float)number;
  case PICKLE_FLOAT16:
    memcpy(&half, bytes + 2 * index, 2);
    return f16_to_f32(half);
  case PICKLE_BFLOAT16:
    memcpy(&half, bytes + 2 * index, 2);
    return bf16_to_f32(half);
  case PICKLE_FLOAT32:
  default:
    memcpy(&x, bytes + 4 * index, 4);
    return x;
  }
}

/* One head of a tensor, rows x columns; a vector is one row. */
static void gather(const struct pickle_tensor *t, const uint8_t *bytes, int64_t head, int64_t rows, int64_t columns, float *to) {
  int inner = t->dims - 1, outer = t->dims - (rows > 1 ? 2 : 1);
  bool has_heads = outer > 0;
  int64_t start = t->offset + (has_heads && t->size[0] > 1 ? head * t->stride[0] : 0);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++)
      *to++ = element(bytes, t->storage->dtype, start + (rows > 1 ? i * t->stride[outer] : 0) + j * t->stride[inner]);
}

static oscar_status read_tensor(struct reader *r, const struct entry *e, int k, const float **made) {
  const struct pickle_tensor *t = e->tensor[k];
  if (!t) return OSCAR_OK;
  oscar_status status = hold_storage(r, t->storage);
  if (status != OSCAR_OK) return prefix_error(r->context, status, "layer %d, %s", e->id, tensors[k].name);
  int64_t n = floats_of(r, e, k), per_head = n / e->heads, d = r->file->head_dim;
  float *values = mem_alloc(r->context, (size_t)n, sizeof *values);
  if (!values) return OSCAR_NO_MEMORY;
  *made = values;
  for (int h = 0; h < e->heads; h++) gather(t, r->bytes, h, per_head / d, d, values + h * per_head);
  for (int64_t i = 0; i < n; i++)
    if (!isfinite(values[i]))
      return set_error(r->context, OSCAR_NUMERIC, "layer %d: %s holds a number that is not finite", e->id, tensors[k].name);
  return OSCAR_OK;
}

static oscar_status read_layers(struct reader *r) {
  oscar_status status = OSCAR_OK;
  for (int l = 0; status == OSCAR_OK && l < r->file->layers; l++) {
    const struct entry *e = &r->entries[l];
    oscar_rotation_layer *layer = (oscar_rotation_layer *)(uintptr_t)&r->file->layer[l];
    layer->layer_id = e->id;
    layer->heads = e->heads;
    const float **made[TENSORS] = {&layer->rotation, &layer->mean, &layer->q_rotation, &layer->o_rotation, &layer->eigenvalues};
    for (int k = 0; status == OSCAR_OK && k < TENSORS; k++) status = read_tensor(r, e, k, made[k]);
  }
  return status;
}

oscar_status rotation_from_pickle(oscar_context *context, const uint8_t *bytes, size_t n, const struct storage_source *source,
                                  oscar_rotation_file **file) {
  *file = NULL;
  struct reader r = {.context = context, .source = source};
  struct pickle pickle;
  oscar_status status = pickle_open(context, bytes, n, &pickle);
  if (status != OSCAR_OK) goto out;
  r.file = mem_zalloc(context, 1, sizeof *r.file);
  if (!r.file) status = OSCAR_NO_MEMORY;
  if (status == OSCAR_OK) status = read_version(&r, pickle.root);
  if (status == OSCAR_OK) status = copy_text(&r, pickle.root, "objective", r.file->objective, sizeof r.file->objective);
  if (status == OSCAR_OK)
    status = copy_text(&r, pickle.root, "source_grouping", r.file->source_grouping, sizeof r.file->source_grouping);
  if (status == OSCAR_OK) status = read_entries(&r, pickle_find(pickle.root, "layers"));
  if (status == OSCAR_OK) status = read_layers(&r);
out:
  mem_free(context, r.bytes);
  mem_free(context, r.entries);
  pickle_close(&pickle);
  if (status != OSCAR_OK) {
    oscar_rotation_file_free(context, r.file);
    r.file = NULL;
  }
  *file = r.file;
  return status;
}

static void free_floats(oscar_context *context, const float *values) { mem_free(context, (void *)(uintptr_t)values); }

void oscar_rotation_file_free(oscar_context *context, oscar_rotation_file *file) {
  if (!file) return;
  for (int l = 0; l < file->layers; l++) {
    const oscar_rotation_layer *layer = &file->layer[l];
    free_floats(context, layer->rotation);
    free_floats(context, layer->mean);
    free_floats(context, layer->q_rotation);
    free_floats(context, layer->o_rotation);
    free_floats(context, layer->eigenvalues);
  }
  mem_free(context, (void *)(uintptr_t)file->layer);
  mem_free(context, file);
}
