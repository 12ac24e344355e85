/*
 * set_file.c - our own rotation file: a codec set as one safetensors file. docs/formats.md describes it byte by byte.
 *
 * Every codec is stored once, under the name of the first place that uses it; `places` says which codec stands where. An array
 * that has its default value (identity, transpose, zero, one) is left out, and comes back the same bits because the codec is made
 * the same way. A reader refuses a tensor it does not know: an array that is silently ignored would change every code.
 */
#include "rotation/set_file.h"
#include "base/file.h"
#include "quant/codec.h"
#include "rotation/safetensors.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define FORMAT_NAME    "oscar-codec-set"
#define FORMAT_VERSION "2" /* files of version 1 have no ropes and no log gains, and are read as well */
#define NAME_BYTES     96
#define MAX_ROPES      64 /* distinct ones in a file: models have one or two */

static const char *const side_names[] = {"keys", "values"};

/* "layers.3.heads.1.keys.encode" */
static void name_array(char name[NAME_BYTES], int kv_heads, size_t place, const char *array) {
  size_t head = place / 2 % (size_t)kv_heads, layer = place / 2 / (size_t)kv_heads;
  snprintf(name, NAME_BYTES, "layers.%zu.heads.%zu.%s.%s", layer, head, side_names[place % 2], array);
}

static const oscar_codec *codec_at(const oscar_codec_set *set, size_t place) {
  size_t kv_heads = (size_t)oscar_codec_set_describe(set)->kv_heads;
  return oscar_codec_set_get(set, (int)(place / 2 / kv_heads), (int)(place / 2 % kv_heads), (oscar_side)(place % 2));
}

/* ---- saving ---- */

struct saver {
  oscar_context *context;
  const oscar_codec_set *set;
  size_t places, codecs;
  int32_t *place;             /* [places] index of the codec there */
  size_t *home;               /* [codecs] first place of each */
  uint8_t *form;              /* [codecs] */
  int32_t *groups, *channels; /* [codecs] */
  float *clip;                /* [codecs] */
  int32_t *rope;              /* [codecs] number of its rope, -1: none */
  int32_t *pairs;             /* [codecs][OSCAR_MAX_HEAD_DIM/2] rotating pairs; NULL while there is no rope */
  int ropes;
  const oscar_rope *distinct[MAX_ROPES];
  uint8_t layouts[MAX_ROPES];
  char rope_names[MAX_ROPES][NAME_BYTES];
  struct safetensor *tensors; /* [n] */
  char (*names)[NAME_BYTES];  /* of the codecs' arrays */
  size_t n, named;
};

struct use { /* a codec at a place, for finding those that are the same */
  const oscar_codec *codec;
  size_t place;
};

static int compare_uses(const void *a, const void *b) {
  const struct use *x = a, *y = b;
  if (x->codec != y->codec) return (uintptr_t)x->codec > (uintptr_t)y->codec ? 1 : -1;
  return (x->place > y->place) - (x->place < y->place);
}

/* Numbers the codecs in the order of their first places. */
static oscar_status number_codecs(struct saver *s) {
  struct use *uses = mem_alloc(s->context, s->places, sizeof *uses);
  s->place = uses ? mem_alloc(s->context, s->places, sizeof *s->place) : NULL;
  s->home = s->place ? mem_alloc(s->context, s->places, sizeof *s->home) : NULL;
  if (!s->home) {
    mem_free(s->context, uses);
    return OSCAR_NO_MEMORY;
  }
  for (size_t p = 0; p < s->places; p++) uses[p] = (struct use){codec_at(s->set, p), p};
  qsort(uses, s->places, sizeof *uses, compare_uses);
  size_t first = 0;
  for (size_t i = 0; i < s->places; i++) { /* home holds the first place of each place's codec for now */
    if (uses[i].codec != uses[first].codec) first = i;
    s->home[uses[i].place] = uses[first].place;
  }
  for (size_t p = 0; p < s->places; p++) { /* a home lies at or before its places, and numbers at or before theirs */
    size_t home = s->home[p];
    s->place[p] = home == p ? (int32_t)s->codecs : s->place[home];
    if (home == p) s->home[s->codecs++] = p;
  }
  mem_free(s->context, uses);
  return OSCAR_OK;
}

static void add_tensor(struct saver *s, const char *name, enum safetensor_dtype dtype, int dims, const int64_t *shape,
                       const void *data) {
  struct safetensor *t = &s->tensors[s->n++];
  *t = (struct safetensor){.name = name, .dtype = dtype, .dims = dims, .data = data, .bytes = safetensor_dtype_bytes(dtype)};
  for (int i = 0; i < dims; i++) {
    t->shape[i] = shape[i];
    t->bytes *= (size_t)shape[i];
  }
}

static void add_array(struct saver *s, size_t home, const char *array, enum safetensor_dtype dtype, int64_t rows, int64_t columns,
                      const void *data) {
  const int64_t shape[] = {rows, columns};
  char *name = s->names[s->named++];
  name_array(name, oscar_codec_set_describe(s->set)->kv_heads, home, array);
  if (rows)
    add_tensor(s, name, dtype, 2, shape, data);
  else
    add_tensor(s, name, dtype, 1, shape + 1, data);
}

/* Bitwise, so that what is left out comes back exactly: -0 is not 0. */
static bool all_equal(const float *values, size_t n, float value) {
  for (size_t i = 0; i < n; i++)
    if (memcmp(&values[i], &value, sizeof value) != 0) return false;
  return true;
}

static bool is_identity(const oscar_codec_spec *spec) {
  static const float bits[] = {0, 1};
  size_t d = (size_t)spec->head_dim;
  if (spec->channels != spec->head_dim) return false;
  for (size_t i = 0; i < d * d; i++)
    if (memcmp(&spec->encode[i], &bits[i % (d + 1) == 0], sizeof(float)) != 0) return false;
  return true;
}

static bool is_transposed(const oscar_codec_spec *spec) {
  size_t d = (size_t)spec->head_dim, m = (size_t)spec->channels;
  for (size_t i = 0; i < m; i++)
    for (size_t k = 0; k < d; k++)
      if (memcmp(&spec->decode[i * d + k], &spec->encode[k * m + i], sizeof(float)) != 0) return false;
  return true;
}

static void add_floats_of(struct saver *s, size_t home) {
  const oscar_codec_spec *spec = oscar_codec_describe(codec_at(s->set, home));
  int64_t d = spec->head_dim, m = spec->channels;
  if (!is_identity(spec)) add_array(s, home, "encode", SAFETENSOR_F32, d, m, spec->encode);
  if (!is_transposed(spec)) add_array(s, home, "decode", SAFETENSOR_F32, m, d, spec->decode);
  if (!all_equal(spec->mean, (size_t)d, 0)) add_array(s, home, "mean", SAFETENSOR_F32, 0, d, spec->mean);
  if (!all_equal(spec->steps, (size_t)m, 1)) add_array(s, home, "steps", SAFETENSOR_F32, 0, m, spec->steps);
}

static void add_bytes_of(struct saver *s, size_t home) {
  const oscar_codec_spec *spec = oscar_codec_describe(codec_at(s->set, home));
  for (int i = 0; i < spec->channels; i++)
    if (spec->crumbs[i] != 1) {
      add_array(s, home, "crumbs", SAFETENSOR_U8, 0, spec->channels, spec->crumbs);
      return;
    }
}

/* ---- ropes ---- */

static oscar_status number_ropes(struct saver *s) {
  size_t room = s->codecs * OSCAR_MAX_HEAD_DIM / 2;
  s->rope = mem_alloc(s->context, s->codecs, sizeof *s->rope);
  if (!s->rope) return OSCAR_NO_MEMORY;
  for (size_t k = 0; k < s->codecs; k++) {
    const oscar_rope *rope = codec_at(s->set, s->home[k])->spec.rope;
    int r = 0;
    while (rope && r < s->ropes && !rope_equal(rope, s->distinct[r])) r++;
    if (r == MAX_ROPES)
      return set_error(s->context, OSCAR_UNSUPPORTED, "a codec set with more than %d ropes cannot be stored", MAX_ROPES);
    if (rope && r == s->ropes) {
      s->layouts[r] = (uint8_t)rope->spec.layout;
      s->distinct[s->ropes++] = rope;
    }
    s->rope[k] = rope ? r : -1;
  }
  s->pairs = s->ropes ? mem_alloc(s->context, room, sizeof *s->pairs) : NULL;
  return s->ropes && !s->pairs ? OSCAR_NO_MEMORY : OSCAR_OK;
}

static void add_ropes(struct saver *s) {
  const int64_t codecs[] = {(int64_t)s->codecs};
  if (!s->ropes) return;
  add_tensor(s, "codecs.rope", SAFETENSOR_I32, 1, codecs, s->rope);
  for (int r = 0; r < s->ropes; r++) {
    const int64_t pairs[] = {s->distinct[r]->spec.rotary_dim / 2};
    snprintf(s->rope_names[r], NAME_BYTES, "ropes.%d.frequencies", r);
    add_tensor(s, s->rope_names[r], SAFETENSOR_F32, 1, pairs, s->distinct[r]->spec.frequencies);
  }
}

static void add_rotating(struct saver *s, size_t k) {
  const oscar_codec_spec *spec = oscar_codec_describe(codec_at(s->set, s->home[k]));
  if (!spec->rope) return;
  int32_t *pairs = s->pairs + k * OSCAR_MAX_HEAD_DIM / 2;
  for (int i = 0; i < spec->rotating_pairs; i++) pairs[i] = spec->rotating_pair[i];
  add_array(s, s->home[k], "rotating_pairs", SAFETENSOR_I32, 0, spec->rotating_pairs, pairs);
  add_array(s, s->home[k], "rotating_mean", SAFETENSOR_F32, spec->rotating_pairs, 2, spec->rotating_mean);
}

static oscar_status collect(struct saver *s) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(s->set);
  enum { ARRAYS = 7, LISTS = 7 + MAX_ROPES };
  s->form = mem_alloc(s->context, s->codecs, sizeof *s->form);
  s->groups = s->form ? mem_alloc(s->context, s->codecs, sizeof *s->groups) : NULL;
  s->channels = s->groups ? mem_alloc(s->context, s->codecs, sizeof *s->channels) : NULL;
  s->clip = s->channels ? mem_alloc(s->context, s->codecs, sizeof *s->clip) : NULL;
  s->names = s->clip ? mem_alloc(s->context, s->codecs * ARRAYS, sizeof *s->names) : NULL;
  s->tensors = s->names ? mem_alloc(s->context, s->codecs * ARRAYS + LISTS, sizeof *s->tensors) : NULL;
  if (!s->tensors) return OSCAR_NO_MEMORY;
  oscar_status status = number_ropes(s);
  if (status != OSCAR_OK) return status;
  for (size_t k = 0; k < s->codecs; k++) {
    const oscar_codec_spec *spec = oscar_codec_describe(codec_at(s->set, s->home[k]));
    s->form[k] = (uint8_t)spec->form;
    s->groups[k] = spec->groups;
    s->channels[k] = spec->channels;
    s->clip[k] = spec->form == OSCAR_ROW_SCALE_ZERO ? spec->clip_ratio : 1;
  }
  const int64_t table[] = {info->layers, info->kv_heads, 2}, list[] = {(int64_t)s->codecs};
  add_tensor(s, "places", SAFETENSOR_I32, 3, table, s->place); /* wide elements first: every tensor is aligned to its own */
  add_tensor(s, "codecs.groups", SAFETENSOR_I32, 1, list, s->groups);
  add_tensor(s, "codecs.channels", SAFETENSOR_I32, 1, list, s->channels);
  add_tensor(s, "codecs.clip_ratio", SAFETENSOR_F32, 1, list, s->clip);
  add_ropes(s);
  for (size_t k = 0; k < s->codecs; k++) add_floats_of(s, s->home[k]);
  for (size_t k = 0; k < s->codecs; k++) add_rotating(s, k);
  add_tensor(s, "codecs.form", SAFETENSOR_U8, 1, list, s->form);
  for (size_t k = 0; k < s->codecs; k++) add_bytes_of(s, s->home[k]);
  const int64_t ropes[] = {s->ropes};
  if (s->ropes) add_tensor(s, "ropes.layout", SAFETENSOR_U8, 1, ropes, s->layouts);
  return OSCAR_OK;
}

static oscar_status write_set(struct saver *s, FILE *stream) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(s->set);
  char layers[16], kv_heads[16], head_dim[16];
  snprintf(layers, sizeof layers, "%d", info->layers);
  snprintf(kv_heads, sizeof kv_heads, "%d", info->kv_heads);
  snprintf(head_dim, sizeof head_dim, "%d", info->head_dim);
  const struct safetensors_text metadata[] = {{"format", FORMAT_NAME},
                                              {"version", FORMAT_VERSION},
                                              {"layers", layers},
                                              {"kv_heads", kv_heads},
                                              {"head_dim", head_dim},
                                              {"recipe", info->recipe},
                                              {"fingerprint", info->fingerprint},
                                              {"provenance", info->provenance}};
  return safetensors_write(s->context, stream, s->tensors, s->n, metadata, ARRAY_LENGTH(metadata));
}

oscar_status oscar_codec_set_save(const oscar_codec_set *set, const char *path) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(set);
  oscar_context *context = codec_set_context(set);
  struct saver s = {.context = context, .set = set, .places = (size_t)info->layers * (size_t)info->kv_heads * 2};
  struct file_writer writer = {0};
  oscar_status status = oscar_codec_set_check(set);
  if (status == OSCAR_OK) status = number_codecs(&s);
  if (status == OSCAR_OK) status = collect(&s);
  if (status == OSCAR_OK) status = file_writer_open(context, path, &writer);
  if (status != OSCAR_OK) goto out;
  status = write_set(&s, writer.stream);
  if (status == OSCAR_OK)
    status = file_writer_commit(context, &writer);
  else
    file_writer_abort(context, &writer);
out:
  mem_free(context, s.pairs);
  mem_free(context, s.rope);
  mem_free(context, s.tensors);
  mem_free(context, s.names);
  mem_free(context, s.clip);
  mem_free(context, s.channels);
  mem_free(context, s.groups);
  mem_free(context, s.form);
  mem_free(context, s.home);
  mem_free(context, s.place);
  return status;
}

/* ---- loading ---- */

struct loader {
  oscar_context *context;
  struct safetensors file;
  oscar_codec_set_info info;
  size_t bytes; /* of the file */
  size_t places, codecs;
  const struct safetensor *place, *form, *groups, *channels, *clip; /* [places] and [codecs] */
  const struct safetensor *rope;                                    /* [codecs], or NULL: no ropes */
  int ropes;
  oscar_rope *made_ropes[MAX_ROPES];
  oscar_codec **made;   /* [codecs] */
  size_t used;          /* tensors that were looked at */
  uint64_t codec_bytes; /* that the codecs made so far take, about */
};

static oscar_status read_geometry(struct loader *l, const char *key, int limit, int *value) {
  const char *text = safetensors_metadata(&l->file, key);
  char *end = NULL;
  long number = text && *text >= '1' && *text <= '9' ? strtol(text, &end, 10) : 0;
  if (number < 1 || number > limit || *end)
    return set_error(l->context, OSCAR_FORMAT, "metadata %s is \"%.32s\"; a number from 1 to %d is expected", key,
                     text ? text : "", limit);
  *value = (int)number;
  return OSCAR_OK;
}

static oscar_status read_metadata(struct loader *l) {
  const char *format = safetensors_metadata(&l->file, "format"), *version = safetensors_metadata(&l->file, "version");
  if (!format || strcmp(format, FORMAT_NAME) != 0)
    return set_error(l->context, OSCAR_FORMAT, "not a rotation file: its metadata has no format \"%s\"", FORMAT_NAME);
  if (!version || (strcmp(version, FORMAT_VERSION) != 0 && strcmp(version, "1") != 0))
    return set_error(l->context, OSCAR_UNSUPPORTED, "version \"%.32s\" of the format; this program reads versions 1 and %s",
                     version ? version : "", FORMAT_VERSION);
  oscar_status status = read_geometry(l, "layers", 1 << 20, &l->info.layers);
  if (status == OSCAR_OK) status = read_geometry(l, "kv_heads", 1 << 20, &l->info.kv_heads);
  if (status == OSCAR_OK) status = read_geometry(l, "head_dim", OSCAR_MAX_HEAD_DIM, &l->info.head_dim);
  l->info.recipe = safetensors_metadata(&l->file, "recipe");
  l->info.fingerprint = safetensors_metadata(&l->file, "fingerprint");
  l->info.provenance = safetensors_metadata(&l->file, "provenance");
  if (status == OSCAR_OK && (!l->info.recipe || !l->info.fingerprint || !l->info.provenance))
    status = set_error(l->context, OSCAR_FORMAT, "metadata lacks recipe, fingerprint or provenance");
  return status;
}

static oscar_status check_tensor(struct loader *l, const struct safetensor *t, enum safetensor_dtype dtype, int dims,
                                 const int64_t *shape) {
  bool same = t->dtype == dtype && t->dims == dims;
  for (int i = 0; same && i < dims; i++) same = t->shape[i] == shape[i];
  if (same) return OSCAR_OK;
  char wanted[128] = "";
  for (int i = 0, n = 0; i < dims; i++)
    n += snprintf(wanted + n, sizeof wanted - (size_t)n, "%s%" PRId64, i ? ", " : "", shape[i]);
  return set_error(l->context, OSCAR_FORMAT, "tensor %s is not %s [%s]", t->name, safetensor_dtype_name(dtype), wanted);
}

/* A tensor that must be there. */
static oscar_status find_list(struct loader *l, const char *name, enum safetensor_dtype dtype, int dims, const int64_t *shape,
                              const struct safetensor **tensor) {
  *tensor = safetensors_find(&l->file, name);
  if (!*tensor) return set_error(l->context, OSCAR_FORMAT, "tensor %s is missing", name);
  l->used++;
  return check_tensor(l, *tensor, dtype, dims, shape);
}

static int32_t integer_at(const struct safetensor *t, size_t i) {
  int32_t value;
  memcpy(&value, (const uint8_t *)t->data + 4 * i, sizeof value);
  return value;
}

static float float_at(const struct safetensor *t, size_t i) {
  float value;
  memcpy(&value, (const uint8_t *)t->data + 4 * i, sizeof value);
  return value;
}

/* Codecs are numbered in the order of their first places, so that counting them is checking them. */
static oscar_status read_lists(struct loader *l) {
  const int64_t table[] = {l->info.layers, l->info.kv_heads, 2};
  l->places = (size_t)l->info.layers * (size_t)l->info.kv_heads * 2;
  oscar_status status = find_list(l, "places", SAFETENSOR_I32, 3, table, &l->place);
  for (size_t p = 0; status == OSCAR_OK && p < l->places; p++) {
    int32_t k = integer_at(l->place, p);
    if (k < 0 || (size_t)k > l->codecs)
      status = set_error(l->context, OSCAR_FORMAT, "places[%zu] is codec %d, but %zu is the next new one", p, k, l->codecs);
    else if ((size_t)k == l->codecs)
      l->codecs++;
  }
  const int64_t list[] = {(int64_t)l->codecs};
  if (status == OSCAR_OK) status = find_list(l, "codecs.form", SAFETENSOR_U8, 1, list, &l->form);
  if (status == OSCAR_OK) status = find_list(l, "codecs.groups", SAFETENSOR_I32, 1, list, &l->groups);
  if (status == OSCAR_OK) status = find_list(l, "codecs.channels", SAFETENSOR_I32, 1, list, &l->channels);
  if (status == OSCAR_OK) status = find_list(l, "codecs.clip_ratio", SAFETENSOR_F32, 1, list, &l->clip);
  return status;
}

/* An array of the codec at home `place`: NULL in *copy if it is not there, else an aligned copy. rows 0: a vector. */
static oscar_status copy_array(struct loader *l, size_t place, const char *array, enum safetensor_dtype dtype, int64_t rows,
                               int64_t columns, void **copy) {
  char name[NAME_BYTES];
  const int64_t shape[] = {rows, columns};
  name_array(name, l->info.kv_heads, place, array);
  const struct safetensor *t = safetensors_find(&l->file, name);
  if (!t) return OSCAR_OK;
  l->used++;
  oscar_status status = rows ? check_tensor(l, t, dtype, 2, shape) : check_tensor(l, t, dtype, 1, shape + 1);
  if (status != OSCAR_OK) return status;
  *copy = mem_alloc(l->context, t->bytes, 1);
  if (!*copy) return OSCAR_NO_MEMORY;
  memcpy(*copy, t->data, t->bytes);
  return OSCAR_OK;
}

static oscar_status make_rope(struct loader *l, int r, uint8_t layout) {
  char name[NAME_BYTES];
  snprintf(name, sizeof name, "ropes.%d.frequencies", r);
  const struct safetensor *t = safetensors_find(&l->file, name);
  if (!t) return set_error(l->context, OSCAR_FORMAT, "tensor %s is missing", name);
  l->used++;
  if (t->dtype != SAFETENSOR_F32 || t->dims != 1 || t->shape[0] < 1 || t->shape[0] > OSCAR_MAX_HEAD_DIM / 2)
    return set_error(l->context, OSCAR_FORMAT, "tensor %s is not F32 [1 to %d]", name, OSCAR_MAX_HEAD_DIM / 2);
  float frequencies[OSCAR_MAX_HEAD_DIM / 2];
  memcpy(frequencies, t->data, t->bytes);
  const oscar_rope_spec spec = {(oscar_rope_layout)layout, 2 * (int)t->shape[0], frequencies};
  oscar_status status = oscar_rope_create(l->context, &spec, &l->made_ropes[r]);
  if (status == OSCAR_INVALID_ARGUMENT) status = OSCAR_FORMAT;
  return status == OSCAR_OK || status == OSCAR_NO_MEMORY ? status : prefix_error(l->context, status, "%s", name);
}

static oscar_status make_ropes(struct loader *l) {
  const struct safetensor *layout = safetensors_find(&l->file, "ropes.layout");
  if (!layout) return OSCAR_OK;
  l->used++;
  if (layout->dtype != SAFETENSOR_U8 || layout->dims != 1 || layout->shape[0] < 1 || layout->shape[0] > MAX_ROPES)
    return set_error(l->context, OSCAR_FORMAT, "tensor ropes.layout is not U8 [1 to %d]", MAX_ROPES);
  const int64_t list[] = {(int64_t)l->codecs};
  oscar_status status = find_list(l, "codecs.rope", SAFETENSOR_I32, 1, list, &l->rope);
  l->ropes = (int)layout->shape[0];
  for (int r = 0; status == OSCAR_OK && r < l->ropes; r++) status = make_rope(l, r, ((const uint8_t *)layout->data)[r]);
  return status;
}

/* The rotating mean of codec k, whose home is `place`. `pair` has room for the pairs of a head. */
static oscar_status read_rotating(struct loader *l, size_t k, size_t place, oscar_codec_spec *spec, uint16_t *pair, void **mean) {
  int32_t r = l->rope ? integer_at(l->rope, k) : -1;
  char name[NAME_BYTES];
  if (r == -1) return OSCAR_OK;
  if (r < 0 || r >= l->ropes) return set_error(l->context, OSCAR_FORMAT, "codecs.rope[%zu] is %d of %d", k, r, l->ropes);
  name_array(name, l->info.kv_heads, place, "rotating_pairs");
  const struct safetensor *t = safetensors_find(&l->file, name);
  if (!t) return set_error(l->context, OSCAR_FORMAT, "tensor %s is missing", name);
  l->used++;
  if (t->dtype != SAFETENSOR_I32 || t->dims != 1 || t->shape[0] < 1 || t->shape[0] > OSCAR_MAX_HEAD_DIM / 2)
    return set_error(l->context, OSCAR_FORMAT, "tensor %s is not I32 [1 to %d]", name, OSCAR_MAX_HEAD_DIM / 2);
  for (int64_t i = 0; i < t->shape[0]; i++) {
    int32_t value = integer_at(t, (size_t)i);
    if (value < 0 || value >= OSCAR_MAX_HEAD_DIM / 2)
      return set_error(l->context, OSCAR_FORMAT, "%s[%" PRId64 "] is %d", name, i, value);
    pair[i] = (uint16_t)value;
  }
  spec->rope = l->made_ropes[r];
  spec->rotating_pairs = (int)t->shape[0];
  spec->rotating_pair = pair;
  oscar_status status = copy_array(l, place, "rotating_mean", SAFETENSOR_F32, spec->rotating_pairs, 2, mean);
  if (status == OSCAR_OK && !*mean)
    status = set_error(l->context, OSCAR_FORMAT, "codec %zu has rotating pairs without rotating_mean", k);
  spec->rotating_mean = *mean;
  return status;
}

/* Defaults take no bytes in a file, but a codec made of them does: a small file may not ask for all memory there is. */
static oscar_status check_budget(struct loader *l, int64_t d, int64_t m) {
  enum { PER_BYTE = 16 }; /* a stored encode matrix makes up to 6 times its size */
  l->codec_bytes += (uint64_t)(d * m) * 4 * 4;
  if (l->codec_bytes / PER_BYTE <= l->bytes + ((size_t)512 << 20) / PER_BYTE) return OSCAR_OK;
  return set_error(l->context, OSCAR_UNSUPPORTED, "a file of %zu bytes describes codecs of more than %" PRIu64, l->bytes,
                   l->codec_bytes);
}

static oscar_status make_codec(struct loader *l, size_t k, size_t place) {
  int64_t d = l->info.head_dim, m = integer_at(l->channels, k);
  void *encode = NULL, *decode = NULL, *mean = NULL, *steps = NULL, *crumbs = NULL, *rotating = NULL;
  uint16_t pair[OSCAR_MAX_HEAD_DIM / 2];
  oscar_codec_spec spec = {.head_dim = (int)d, .channels = (int)m};
  if (m < 1 || m > d) return set_error(l->context, OSCAR_FORMAT, "codecs.channels[%zu] is %" PRId64, k, m);
  oscar_status status = check_budget(l, d, m);
  if (status == OSCAR_OK) status = copy_array(l, place, "encode", SAFETENSOR_F32, d, m, &encode);
  if (status == OSCAR_OK) status = copy_array(l, place, "decode", SAFETENSOR_F32, m, d, &decode);
  if (status == OSCAR_OK) status = copy_array(l, place, "mean", SAFETENSOR_F32, 0, d, &mean);
  if (status == OSCAR_OK) status = copy_array(l, place, "steps", SAFETENSOR_F32, 0, m, &steps);
  if (status == OSCAR_OK) status = copy_array(l, place, "crumbs", SAFETENSOR_U8, 0, m, &crumbs);
  if (status == OSCAR_OK) status = read_rotating(l, k, place, &spec, pair, &rotating);
  if (status == OSCAR_OK) {
    spec.form = (oscar_row_form)((const uint8_t *)l->form->data)[k];
    spec.groups = integer_at(l->groups, k);
    spec.clip_ratio = float_at(l->clip, k);
    spec.crumbs = crumbs;
    spec.steps = steps;
    spec.mean = mean;
    spec.encode = encode;
    spec.decode = decode;
    char name[NAME_BYTES];
    name_array(name, l->info.kv_heads, place, "");
    status = oscar_codec_create(l->context, &spec, &l->made[k]);
    if (status == OSCAR_INVALID_ARGUMENT) status = OSCAR_FORMAT; /* the file broke the rules, not the caller */
    if (status == OSCAR_FORMAT || status == OSCAR_NUMERIC) prefix_error(l->context, status, "%.*s", (int)strlen(name) - 1, name);
  }
  mem_free(l->context, rotating);
  mem_free(l->context, encode);
  mem_free(l->context, decode);
  mem_free(l->context, mean);
  mem_free(l->context, steps);
  mem_free(l->context, crumbs);
  return status;
}

static oscar_status fill_set(struct loader *l, oscar_codec_set *set) {
  oscar_status status = OSCAR_OK;
  size_t seen = 0, kv_heads = (size_t)l->info.kv_heads;
  for (size_t p = 0; status == OSCAR_OK && p < l->places; p++) {
    size_t k = (size_t)integer_at(l->place, p);
    if (k == seen) status = make_codec(l, seen++, p);
    if (status == OSCAR_OK)
      status = oscar_codec_set_assign(set, (int)(p / 2 / kv_heads), (int)(p / 2 % kv_heads), (oscar_side)(p % 2), l->made[k]);
  }
  if (status == OSCAR_OK && l->used != l->file.n)
    status =
        set_error(l->context, OSCAR_FORMAT, "%zu of its %zu tensors are no part of the format", l->file.n - l->used, l->file.n);
  if (status == OSCAR_OK && (status = oscar_codec_set_check(set)) == OSCAR_INVALID_ARGUMENT) status = OSCAR_FORMAT;
  return status;
}

oscar_status codec_set_from_memory(oscar_context *context, const uint8_t *bytes, size_t n, oscar_codec_set **set) {
  *set = NULL;
  struct loader l = {.context = context, .bytes = n};
  oscar_codec_set *s = NULL;
  oscar_status status = safetensors_open(context, bytes, n, &l.file);
  if (status == OSCAR_OK) status = read_metadata(&l);
  if (status == OSCAR_OK) status = read_lists(&l);
  if (status == OSCAR_OK) status = make_ropes(&l);
  if (status == OSCAR_OK && !(l.made = mem_zalloc(context, l.codecs, sizeof *l.made))) status = OSCAR_NO_MEMORY;
  if (status == OSCAR_OK && (status = oscar_codec_set_create(context, &l.info, &s)) == OSCAR_INVALID_ARGUMENT)
    status = OSCAR_FORMAT;
  if (status == OSCAR_OK) status = fill_set(&l, s);
  for (size_t k = 0; l.made && k < l.codecs; k++) oscar_codec_release(l.made[k]);
  for (int r = 0; r < l.ropes; r++) oscar_rope_release(l.made_ropes[r]);
  mem_free(context, l.made);
  safetensors_close(&l.file);
  if (status != OSCAR_OK) {
    oscar_codec_set_free(s);
    s = NULL;
  }
  *set = s;
  return status;
}

oscar_status oscar_codec_set_load(oscar_context *context, const char *path, oscar_codec_set **set) {
  *set = NULL;
  struct file_map map;
  oscar_status status = file_map_open(context, path, &map);
  if (status != OSCAR_OK) return status;
  status = codec_set_from_memory(context, map.data, map.bytes, set);
  file_map_close(&map);
  return status == OSCAR_OK ? status : prefix_error(context, status, "%s", path);
}
