/*
 * plain_sets.c - codec sets that need no calibration: plain or Hadamard-rotated codes, and those of published rotation files.
 *
 * All are of form SCALE_ZERO with groups of equal size. A codec is shared by all places that use the same matrix and clip.
 */
#include "rotation/hadamard.h"

#include <math.h>
#include <string.h>

/* Groups in a row of head_dim channels; `group` 0 stands for the whole head. */
static oscar_status count_groups(oscar_context *context, int group, int head_dim, int *groups) {
  bool power = group >= 16 && (group & (group - 1)) == 0;
  if (group == 0 || group == head_dim)
    *groups = 1;
  else if (power && head_dim % group == 0)
    *groups = head_dim / group;
  else
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "group %d: neither head_dim (%d, or 0) nor a power of two from 16 on that divides it", group, head_dim);
  return OSCAR_OK;
}

/* ---- plain ---- */

static oscar_status fill_side(oscar_context *context, oscar_codec_set *set, oscar_side side, const oscar_codec_spec *spec) {
  const oscar_codec_set_info *info = oscar_codec_set_describe(set);
  oscar_codec *codec = NULL;
  oscar_status status = oscar_codec_create(context, spec, &codec);
  for (int layer = 0; layer < info->layers; layer++)
    for (int head = 0; status == OSCAR_OK && head < info->kv_heads; head++)
      status = oscar_codec_set_assign(set, layer, head, side, codec);
  oscar_codec_release(codec);
  return status;
}

oscar_status oscar_codec_set_create_plain(oscar_context *context, const oscar_codec_set_info *info,
                                          const oscar_plain_options *options, oscar_codec_set **set) {
  *set = NULL;
  oscar_codec_set *s = NULL;
  float *rotation = NULL;
  uint8_t crumbs[OSCAR_MAX_HEAD_DIM];
  int n = options->crumbs_per_channel, groups = 0;
  if (n != 1 && n != 2 && n != 4)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "crumbs_per_channel %d is not 1, 2 or 4 (2, 4 or 8 bits)", n);
  memset(crumbs, n, sizeof crumbs);
  oscar_status status = oscar_codec_set_create(context, info, &s); /* checks head_dim */
  if (status == OSCAR_OK) status = count_groups(context, options->group, info->head_dim, &groups);
  if (status != OSCAR_OK) goto out;
  size_t d = (size_t)info->head_dim;
  if (options->rotate) {
    rotation = mem_alloc(context, d * d, sizeof *rotation);
    status = rotation ? oscar_hadamard(context, info->head_dim, rotation) : OSCAR_NO_MEMORY;
    if (status != OSCAR_OK) goto out;
  }
  oscar_codec_spec spec = {.head_dim = info->head_dim,
                           .channels = info->head_dim,
                           .form = OSCAR_ROW_SCALE_ZERO,
                           .groups = groups,
                           .crumbs = crumbs,
                           .encode = rotation};
  spec.clip_ratio = options->clip_keys;
  status = fill_side(context, s, OSCAR_KEYS, &spec);
  spec.clip_ratio = options->clip_values;
  if (status == OSCAR_OK) status = fill_side(context, s, OSCAR_VALUES, &spec);
out:
  mem_free(context, rotation);
  if (status != OSCAR_OK) {
    oscar_codec_set_free(s);
    s = NULL;
  }
  *set = s;
  return status;
}

/* ---- published files ---- */

static oscar_status check_file(oscar_context *context, const oscar_codec_set_info *info, const char *side,
                               const oscar_rotation_file *file) {
  if (file->head_dim != info->head_dim)
    return set_error(context, OSCAR_MISMATCH, "%s rotations: head_dim %d, but the model has %d", side, file->head_dim,
                     info->head_dim);
  if (file->layers != info->layers)
    return set_error(context, OSCAR_MISMATCH, "%s rotations: %d layers, but the model has %d", side, file->layers, info->layers);
  for (int l = 0; l < file->layers; l++) {
    const oscar_rotation_layer *layer = &file->layer[l];
    if (layer->layer_id != l)
      return set_error(context, OSCAR_MISMATCH, "%s rotations: layer id %d where %d is expected", side, layer->layer_id, l);
    if (layer->heads != 1 && layer->heads != info->kv_heads)
      return set_error(context, OSCAR_MISMATCH, "%s rotations: layer %d has %d heads, but the model has %d KV heads", side, l,
                       layer->heads, info->kv_heads);
  }
  return OSCAR_OK;
}

/* max |R D - I|, in double. */
static double inverse_error(int d, const float *r, const float *decode) {
  double worst = 0, sums[OSCAR_MAX_HEAD_DIM];
  for (int i = 0; i < d; i++) {
    for (int j = 0; j < d; j++) sums[j] = 0;
    for (int k = 0; k < d; k++)
      for (int j = 0; j < d; j++)
        sums[j] += (double)r[(size_t)i * (size_t)d + (size_t)k] * (double)decode[(size_t)k * (size_t)d + (size_t)j];
    for (int j = 0; j < d; j++) worst = fmax(worst, fabs(sums[j] - (i == j)));
  }
  return worst;
}

/* The decode matrix undoes the rotation R. It is the transpose of R itself, or, where R is not orthogonal, of the companion that
 * the file brings along (R inverse transposed: q_rotation of keys, o_rotation of values). */
static oscar_status make_head(oscar_context *context, const oscar_rotation_layer *layer, int head, const oscar_codec_spec *common,
                              oscar_codec **codec) {
  enum { TOLERANCE_PERCENT = 1 }; /* far above rounding, far below a matrix that does not belong */
  size_t d = (size_t)common->head_dim, at = (size_t)head * d * d;
  const float *companion = layer->q_rotation ? layer->q_rotation : layer->o_rotation ? layer->o_rotation : layer->rotation;
  float *decode = mem_alloc(context, d * d, sizeof *decode);
  if (!decode) return OSCAR_NO_MEMORY;
  for (size_t i = 0; i < d; i++)
    for (size_t k = 0; k < d; k++) decode[i * d + k] = companion[at + k * d + i];
  oscar_codec_spec spec = *common;
  spec.encode = layer->rotation + at;
  spec.decode = decode;
  if (layer->mean) spec.mean = layer->mean + (size_t)head * d;
  double error = inverse_error((int)d, spec.encode, decode);
  oscar_status status = OSCAR_OK;
  if (!(error * 100 <= TOLERANCE_PERCENT))
    status = set_error(context, OSCAR_FORMAT, "head %d: the rotation is not undone by its %s (off by %g)", head,
                       companion == layer->rotation ? "transpose" : "companion", error);
  if (status == OSCAR_OK) status = oscar_codec_create(context, &spec, codec);
  mem_free(context, decode);
  return status;
}

static oscar_status import_layer(oscar_context *context, oscar_codec_set *set, oscar_side side, const oscar_rotation_layer *layer,
                                 const oscar_codec_spec *common) {
  oscar_codec *codec = NULL;
  oscar_status status = OSCAR_OK;
  for (int head = 0; status == OSCAR_OK && head < oscar_codec_set_describe(set)->kv_heads; head++) {
    if (head < layer->heads) { /* else the one codec serves all heads */
      oscar_codec_release(codec);
      codec = NULL;
      status = make_head(context, layer, head, common, &codec);
    }
    if (status == OSCAR_OK) status = oscar_codec_set_assign(set, layer->layer_id, head, side, codec);
  }
  oscar_codec_release(codec);
  return status;
}

static oscar_status import_side(oscar_context *context, oscar_codec_set *set, oscar_side side, const oscar_rotation_file *file,
                                const oscar_codec_spec *common) {
  oscar_status status = OSCAR_OK;
  for (int l = 0; status == OSCAR_OK && l < file->layers; l++) {
    status = import_layer(context, set, side, &file->layer[l], common);
    if (status != OSCAR_OK) prefix_error(context, status, "%s rotations, layer %d", side == OSCAR_KEYS ? "key" : "value", l);
  }
  return status;
}

oscar_status oscar_codec_set_import(oscar_context *context, const oscar_codec_set_info *info, const oscar_rotation_file *keys,
                                    const oscar_rotation_file *values, int group, float clip_keys, float clip_values,
                                    oscar_codec_set **set) {
  *set = NULL;
  oscar_codec_set *s = NULL;
  int groups = 0;
  oscar_status status = oscar_codec_set_create(context, info, &s);
  if (status == OSCAR_OK) status = count_groups(context, group, info->head_dim, &groups);
  if (status == OSCAR_OK) status = check_file(context, info, "key", keys);
  if (status == OSCAR_OK) status = check_file(context, info, "value", values);
  oscar_codec_spec spec = {.head_dim = info->head_dim,
                           .channels = info->head_dim,
                           .form = OSCAR_ROW_SCALE_ZERO,
                           .groups = groups,
                           .clip_ratio = clip_keys};
  if (status == OSCAR_OK) status = import_side(context, s, OSCAR_KEYS, keys, &spec);
  spec.clip_ratio = clip_values;
  if (status == OSCAR_OK) status = import_side(context, s, OSCAR_VALUES, values, &spec);
  if (status != OSCAR_OK) {
    oscar_codec_set_free(s);
    s = NULL;
  }
  *set = s;
  return status;
}
