/*
 * codec.c - a codec as an object: what a valid spec is, where its arrays live, and the map that kernels use.
 *
 * A codec is immutable once made and shared by reference, so every array is copied into one block and described from there with
 * no NULL left. The map is what lets one kernel serve every codec (quant/codec.h); it is made here once, in double, because its
 * rows carry factors of 64 (4^3) and sums over a group, whose rounding would otherwise show in every score.
 */
#include "quant/codec.h"

#include <float.h>
#include <math.h>
#include <string.h>

float codec_gaussian_step(int crumbs) {
  static const float step[] = {0, 0.995687f, 0.335201f, 0.104063f, 0.0307624f};
  return step[crumbs];
}

float codec_gaussian_error(int crumbs) {
  static const float error[] = {1, 0.118846f, 0.0115429f, 0.00104005f, 0.0000876862f};
  return error[crumbs];
}

const float log_gain_table[16] = {0.25f, 0.29730178f, 0.35355339f, 0.42044821f, 0.5f, 0.59460356f, 0.70710678f, 0.84089642f,
                                  1.0f,  1.18920712f, 1.41421356f, 1.68179283f, 2.0f, 2.37841423f, 2.82842712f, 3.36358566f};

const float inverse_log_gain_table[16] = {4.0f,        3.36358566f, 2.82842712f, 2.37841423f, 2.0f,        1.68179283f,
                                          1.41421356f, 1.18920712f, 1.0f,        0.84089642f, 0.70710678f, 0.59460356f,
                                          0.5f,        0.42044821f, 0.35355339f, 0.29730178f};

/* ---- validation ---- */

static oscar_status check_finite(oscar_context *context, const char *name, const float *values, size_t n) {
  if (!values) return OSCAR_OK;
  for (size_t i = 0; i < n; i++)
    if (!isfinite(values[i])) return set_error(context, OSCAR_NUMERIC, "codec spec: %s[%zu] is not finite", name, i);
  return OSCAR_OK;
}

static oscar_status check_scalars(oscar_context *context, const oscar_codec_spec *spec) {
  if (spec->head_dim < 16 || spec->head_dim > OSCAR_MAX_HEAD_DIM || spec->head_dim % 16)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: head_dim %d is not a multiple of 16 from 16 to %d",
                     spec->head_dim, OSCAR_MAX_HEAD_DIM);
  if (spec->channels < 1 || spec->channels > spec->head_dim)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: channels %d is not from 1 to head_dim (%d)", spec->channels,
                     spec->head_dim);
  if (spec->form != OSCAR_ROW_GAIN && spec->form != OSCAR_ROW_SCALE_ZERO && spec->form != OSCAR_ROW_LOG_GAINS)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: form %d is neither GAIN (0), SCALE_ZERO (1) nor LOG_GAINS (2)",
                     (int)spec->form);
  if (spec->form == OSCAR_ROW_LOG_GAINS && spec->groups > OSCAR_MAX_LOG_GAINS)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: %d groups of log gains; a row's word holds %d", spec->groups,
                     OSCAR_MAX_LOG_GAINS);
  if (spec->groups < 1) return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: groups %d is not positive", spec->groups);
  if (spec->form == OSCAR_ROW_SCALE_ZERO && !(spec->clip_ratio > 0 && spec->clip_ratio <= 1))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: clip_ratio %g is not above 0 and at most 1",
                     (double)spec->clip_ratio);
  if (!spec->encode && spec->channels != spec->head_dim)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: encode is NULL (identity), but channels %d is not head_dim %d",
                     spec->channels, spec->head_dim);
  return OSCAR_OK;
}

static int crumbs_of(const oscar_codec_spec *spec, int channel) { return spec->crumbs ? spec->crumbs[channel] : 1; }

static oscar_status check_crumbs(oscar_context *context, const oscar_codec_spec *spec, int *total) {
  int sum = 0;
  for (int i = 0; i < spec->channels; i++) {
    int n = crumbs_of(spec, i);
    if (n > OSCAR_MAX_CRUMBS_PER_CHANNEL)
      return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: crumbs[%d] = %d is above %d", i, n,
                       OSCAR_MAX_CRUMBS_PER_CHANNEL);
    if (spec->form == OSCAR_ROW_SCALE_ZERO && n != crumbs_of(spec, 0))
      return set_error(context, OSCAR_INVALID_ARGUMENT,
                       "codec spec: crumbs[%d] = %d, but form SCALE_ZERO needs the same in all channels (crumbs[0] = %d)", i, n,
                       crumbs_of(spec, 0));
    sum += n;
  }
  if (sum == 0 || sum % 16)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: %d crumbs a row are not a positive multiple of 16", sum);
  if (spec->groups > sum / 16)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: %d groups are more than the %d blocks of 16 crumbs",
                     spec->groups, sum / 16);
  *total = sum;
  return OSCAR_OK;
}

static oscar_status check_steps(oscar_context *context, const oscar_codec_spec *spec) {
  oscar_status status = check_finite(context, "steps", spec->steps, (size_t)spec->channels);
  for (int i = 0; status == OSCAR_OK && spec->steps && i < spec->channels; i++)
    if (!(spec->steps[i] > 0))
      status =
          set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: steps[%d] = %g is not positive", i, (double)spec->steps[i]);
  return status;
}

static oscar_status check_rotating(oscar_context *context, const oscar_codec_spec *spec) {
  if (!spec->rope) {
    if (spec->rotating_pairs == 0) return OSCAR_OK;
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: %d rotating pairs without a rope", spec->rotating_pairs);
  }
  int pairs = spec->rope->spec.rotary_dim / 2;
  if (spec->rope->spec.rotary_dim > spec->head_dim || spec->rotating_pairs < 1 || spec->rotating_pairs > pairs)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: %d rotating pairs of a rope over %d channels in a head of %d",
                     spec->rotating_pairs, spec->rope->spec.rotary_dim, spec->head_dim);
  for (int k = 0; k < spec->rotating_pairs; k++)
    if (spec->rotating_pair[k] >= pairs || (k > 0 && spec->rotating_pair[k] <= spec->rotating_pair[k - 1]))
      return set_error(context, OSCAR_INVALID_ARGUMENT, "codec spec: rotating_pair[%d] = %d; expected ascending numbers below %d",
                       k, spec->rotating_pair[k], pairs);
  return check_finite(context, "rotating_mean", spec->rotating_mean, (size_t)spec->rotating_pairs * 2);
}

static oscar_status check_spec(oscar_context *context, const oscar_codec_spec *spec, int *total) {
  oscar_status status = check_scalars(context, spec);
  if (status == OSCAR_OK) status = check_crumbs(context, spec, total);
  if (status == OSCAR_OK) status = check_steps(context, spec);
  size_t d = (size_t)spec->head_dim, m = (size_t)spec->channels;
  if (status == OSCAR_OK) status = check_finite(context, "mean", spec->mean, d);
  if (status == OSCAR_OK) status = check_finite(context, "encode", spec->encode, d * m);
  if (status == OSCAR_OK) status = check_finite(context, "decode", spec->decode, d * m);
  return status == OSCAR_OK ? check_rotating(context, spec) : status;
}

/* ---- storage ---- */

/* Takes `bytes` of the block from *offset on; with no block it only counts. */
static void *take(void *block, size_t *offset, size_t bytes) {
  void *part = block ? (char *)block + *offset : NULL;
  *offset += round_up(bytes, 64);
  return part;
}

struct arrays {
  uint8_t *crumbs;
  float *steps, *mean, *encode, *decode, *map, *levels, *inverse_sigma, *rotating_mean;
  float *inverse_steps, *weights, *outer_levels, *unit_steps;
  int *group_channel, *rotating_channel;
  uint16_t *rotating_pair;
};

static size_t lay_out(const oscar_codec *codec, void *block, struct arrays *a) {
  size_t d = (size_t)codec->spec.head_dim, m = (size_t)codec->spec.channels, offset = 0;
  a->crumbs = take(block, &offset, m);
  a->steps = take(block, &offset, m * sizeof(float));
  a->mean = take(block, &offset, d * sizeof(float));
  a->encode = take(block, &offset, d * m * sizeof(float));
  a->decode = take(block, &offset, d * m * sizeof(float));
  a->map = take(block, &offset, (size_t)codec->map_rows * d * sizeof(float));
  a->levels = take(block, &offset, m * sizeof(float));
  a->inverse_sigma = take(block, &offset, m * sizeof(float));
  a->inverse_steps = take(block, &offset, m * sizeof(float));
  a->weights = take(block, &offset, m * sizeof(float));
  a->outer_levels = take(block, &offset, m * sizeof(float));
  a->unit_steps = take(block, &offset, m * sizeof(float));
  a->group_channel = take(block, &offset, ((size_t)codec->spec.groups + 1) * sizeof(int));
  size_t rotating = (size_t)codec->spec.rotating_pairs;
  a->rotating_pair = take(block, &offset, rotating * sizeof *a->rotating_pair);
  a->rotating_mean = take(block, &offset, rotating * 2 * sizeof(float));
  a->rotating_channel = take(block, &offset, rotating * 2 * sizeof(int));
  return offset;
}

static void fill_arrays(const oscar_codec_spec *from, struct arrays *a) {
  size_t d = (size_t)from->head_dim, m = (size_t)from->channels;
  for (size_t i = 0; i < m; i++) a->crumbs[i] = (uint8_t)crumbs_of(from, (int)i);
  for (size_t i = 0; i < m; i++) a->steps[i] = from->steps ? from->steps[i] : 1.0f;
  for (size_t i = 0; i < m; i++) a->levels[i] = (float)(1 << 2 * a->crumbs[i]);
  for (size_t i = 0; i < m; i++) a->inverse_sigma[i] = codec_gaussian_step(a->crumbs[i]) / a->steps[i];
  for (size_t i = 0; i < m; i++) {
    a->inverse_steps[i] = fminf(1 / a->steps[i], FLT_MAX);
    a->outer_levels[i] = a->crumbs[i] ? a->levels[i] / 2 - 1 : 0;
    a->unit_steps[i] = codec_gaussian_step(a->crumbs[i]);
  }
  for (size_t k = 0; k < d; k++) a->mean[k] = from->mean ? from->mean[k] : 0.0f;
  for (size_t k = 0; k < d; k++)
    for (size_t i = 0; i < m; i++) a->encode[k * m + i] = from->encode ? from->encode[k * m + i] : k == i ? 1.0f : 0.0f;
  for (size_t i = 0; i < m; i++)
    for (size_t k = 0; k < d; k++) a->decode[i * d + k] = from->decode ? from->decode[i * d + k] : a->encode[k * m + i];
  for (int k = 0; k < from->rotating_pairs; k++) {
    a->rotating_pair[k] = from->rotating_pair[k];
    memcpy(a->rotating_mean + 2 * k, from->rotating_mean + 2 * k, 2 * sizeof(float));
    a->rotating_channel[2 * k] = rope_first(&from->rope->spec, from->rotating_pair[k]);
    a->rotating_channel[2 * k + 1] = rope_second(&from->rope->spec, from->rotating_pair[k]);
  }
}

/* false if a channel would be split. A channel without crumbs belongs to the group of the channel before it. */
static bool find_groups(const oscar_codec_spec *spec, int total, int *group_channel) {
  int crumbs = 0, opened = 0;
  for (int i = 0; i < spec->channels; i++) {
    int n = crumbs_of(spec, i);
    if (n > 0 && crumbs == group_begin(total, spec->groups, opened)) group_channel[opened++] = i;
    crumbs += n;
    if (crumbs > group_begin(total, spec->groups, opened)) return false;
  }
  group_channel[0] = 0;
  group_channel[spec->groups] = spec->channels;
  return true;
}

/* The steps of each group's coded channels over the same power of two, so that squares of errors stay in the range of floats. */
static void fill_weights(const oscar_codec *codec, const struct arrays *a) {
  for (int p = 0; p < codec->spec.groups; p++) {
    int first = a->group_channel[p], last = a->group_channel[p + 1], exponent;
    float largest = 0;
    for (int i = first; i < last; i++) largest = a->crumbs[i] ? fmaxf(largest, a->steps[i]) : largest;
    frexpf(largest, &exponent);
    for (int i = first; i < last; i++) a->weights[i] = a->crumbs[i] ? ldexpf(a->steps[i], 1 - exponent) : 0;
  }
}

/* ---- the map ---- */

static void add_scaled(double *to, const float *row, double factor, int d) {
  for (int k = 0; k < d; k++) to[k] += factor * (double)row[k];
}

static void store_row(float *to, const double *from, int d) {
  for (int k = 0; k < d; k++) to[k] = (float)from[k];
}

static void fill_map(const oscar_codec *codec, float *map) {
  const oscar_codec_spec *spec = &codec->spec;
  int d = spec->head_dim;
  size_t stride = (size_t)d;
  double row[OSCAR_MAX_HEAD_DIM], offset[OSCAR_MAX_HEAD_DIM];
  memset(map, 0, (size_t)codec->map_rows * stride * sizeof(float));
  float *crumb_row = map, *group_row = map + (size_t)codec->crumbs * stride;
  for (int p = 0; p < spec->groups; p++, group_row += stride) {
    memset(offset, 0, sizeof offset);
    for (int i = codec->group_channel[p]; i < codec->group_channel[p + 1]; i++) {
      const float *decode = spec->decode + (size_t)i * stride;
      double step = (double)spec->steps[i], levels = ldexp(1, 2 * spec->crumbs[i]);
      for (int j = 0; j < spec->crumbs[i]; j++, crumb_row += stride) {
        memset(row, 0, sizeof row);
        add_scaled(row, decode, ldexp(step, 2 * j), d);
        store_row(crumb_row, row, d);
      }
      if (spec->crumbs[i] > 0) add_scaled(offset, decode, spec->form == OSCAR_ROW_SCALE_ZERO ? step : step * (levels - 1) / 2, d);
    }
    store_row(group_row, offset, d);
  }
  memcpy(group_row, spec->mean, stride * sizeof(float));
  group_row += stride;
  for (int k = 0; k < spec->rotating_pairs; k++, group_row += stride) {
    const int *channel = codec->rotating_channel + 2 * k;
    const float *b = spec->rotating_mean + 2 * k;
    float *turned = group_row + (size_t)spec->rotating_pairs * stride;
    group_row[channel[0]] = turned[channel[1]] = b[0];
    group_row[channel[1]] = b[1];
    turned[channel[0]] = -b[1];
  }
}

/* ---- the object ---- */

oscar_status oscar_codec_create(oscar_context *context, const oscar_codec_spec *spec, oscar_codec **codec) {
  *codec = NULL;
  int total = 0;
  oscar_status status = check_spec(context, spec, &total);
  if (status != OSCAR_OK) return status;
  oscar_codec *c = mem_zalloc(context, 1, sizeof *c);
  if (!c) return OSCAR_NO_MEMORY;
  c->context = context;
  c->kernels = row_kernels_for(&context->cpu);
  c->references = 1;
  c->spec = *spec;
  c->crumbs = total;
  c->map_rows = (int)round_up((size_t)(total + spec->groups + 1 + 2 * spec->rotating_pairs), 16);
  c->row_bytes = (size_t)total / 4 + (size_t)2 * (size_t)meta_words(spec->groups, codec_meta_values(c));
  oscar_rope_retain(c->spec.rope);

  struct arrays a;
  size_t bytes = lay_out(c, NULL, &a);
  c->storage = mem_alloc(context, bytes, 1);
  if (!c->storage) {
    status = OSCAR_NO_MEMORY;
    goto failed;
  }
  lay_out(c, c->storage, &a);
  fill_arrays(spec, &a);
  if (!find_groups(spec, total, a.group_channel)) {
    status = set_error(context, OSCAR_INVALID_ARGUMENT,
                       "codec spec: a border of the %d groups (about every %d crumbs) splits a channel", spec->groups,
                       total / spec->groups);
    goto failed;
  }
  fill_weights(c, &a);
  c->spec.crumbs = a.crumbs;
  c->spec.steps = a.steps;
  c->spec.mean = a.mean;
  c->spec.encode = a.encode;
  c->spec.decode = a.decode;
  c->map = a.map;
  c->levels = a.levels;
  c->inverse_sigma = a.inverse_sigma;
  c->inverse_steps = a.inverse_steps;
  c->weights = a.weights;
  c->outer_levels = a.outer_levels;
  c->unit_steps = a.unit_steps;
  c->group_channel = a.group_channel;
  c->spec.rotating_pair = a.rotating_pair;
  c->spec.rotating_mean = a.rotating_mean;
  c->rotating_channel = a.rotating_channel;
  fill_map(c, a.map);
  status = check_finite(context, "map (decode x steps x 4^digit)", c->map, (size_t)c->map_rows * (size_t)c->spec.head_dim);
  if (status != OSCAR_OK) goto failed;
  *codec = c;
  return OSCAR_OK;
failed:
  oscar_codec_release(c);
  return status;
}

oscar_codec *oscar_codec_retain(oscar_codec *codec) {
  if (codec) codec->references++;
  return codec;
}

void oscar_codec_release(oscar_codec *codec) {
  if (!codec || --codec->references > 0) return;
  oscar_context *context = codec->context;
  oscar_rope_release(codec->spec.rope);
  mem_free(context, codec->storage);
  mem_free(context, codec);
}

const oscar_codec_spec *oscar_codec_describe(const oscar_codec *codec) { return &codec->spec; }
int oscar_codec_crumbs(const oscar_codec *codec) { return codec->crumbs; }
size_t oscar_codec_row_bytes(const oscar_codec *codec) { return codec->row_bytes; }
