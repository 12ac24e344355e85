/*
 * graded.c - graded codes: more crumbs for the directions of a row in which an error does more harm.
 *
 * Keys. Their basis (graded_keys.c) makes errors of all channels count alike, so crumbs go where they save most: reverse
 * water-filling on the variances. Channels of equal crumbs are mixed by small Hadamards, which spreads the tails of each over all
 * of them.
 *
 * Values. All directions matter about alike, and the codes of a Hadamard-rotated row are nearly Gaussian. Only where there is
 * more than one crumb per channel does the order matter: the principal directions get them.
 *
 * Everything follows from the sums of attended.c; no second pass over the text is needed.
 */
#include "calib/graded.h"

#include "calib/crumbs.h"

#include <math.h>
#include <oscar/rotation.h>
#include <string.h>

void oscar_graded_options_default(oscar_graded_options *o) {
  *o = (oscar_graded_options){.bits = 2,
                              .key_form = OSCAR_ROW_LOG_GAINS,
                              .value_form = OSCAR_ROW_LOG_GAINS,
                              .rotating_mean = true,
                              .rotating_share = 0.5f,
                              .positions = 0,
                              .ridge = 0.05f,
                              .unbiased_values = true,
                              .mixing = 8};
}

/* ---- from a basis to a codec ---- */

/* Mixes rows first .. first + count - 1 of the dual and columns of the basis: H, symmetric and orthogonal, of order `count`. */
static void mix(int d, int first, int count, double *basis, double *dual) {
  double column[OSCAR_MAX_HEAD_DIM] = {0};
  double factor = 1 / sqrt(count);
  for (int k = 0; k < d; k++)
    for (int side = 0; side < 2; side++) {
      double *x = side ? dual + (size_t)first * (size_t)d + k : basis + (size_t)k * (size_t)d + first;
      size_t stride = side ? (size_t)d : 1;
      for (int i = 0; i < count; i++) {
        column[i] = 0;
        for (int j = 0; j < count; j++) column[i] += (__builtin_popcount((unsigned)(i & j)) & 1 ? -1 : 1) * x[(size_t)j * stride];
      }
      for (int i = 0; i < count; i++) x[(size_t)i * stride] = factor * column[i];
    }
}

/* Runs of equal crumbs are mixed in blocks of powers of two, and share a variance: that of the block. */
static void mix_runs(struct work *w, int most, double *variance) {
  for (int first = 0; first < w->d;) {
    int count = 1;
    while (2 * count <= most && first + 2 * count <= w->d && w->crumbs[first] == w->crumbs[first + 2 * count - 1]) count *= 2;
    double sum = 0;
    for (int i = first; i < first + count; i++) sum += variance[i];
    if (w->crumbs[first] > 0 && count > 1) mix(w->d, first, count, w->basis, w->dual);
    for (int i = first; i < first + count; i++) variance[i] = sum / count;
    first += count;
  }
}

struct side_plan {
  int layer, kv_head;
  oscar_side side;
  int crumbs, least, groups, mixing;
  oscar_row_form form;
  bool unbiased;
};

/* w->encode, w->decode and w->steps (of unit scale) from w->basis (columns), w->dual (rows) and variances w->values, descending;
 * returns the channels that have crumbs, in the order of groups. */
static oscar_status lay_out(struct work *w, const struct side_plan *plan, uint8_t *crumbs, int *channels) {
  int d = w->d, order[OSCAR_MAX_HEAD_DIM] = {0};
  size_t n = (size_t)d;
  crumbs_allocate(d, w->values, plan->crumbs, plan->least, w->crumbs);
  oscar_status status = crumbs_arrange(w->context, d, w->crumbs, plan->crumbs, plan->groups, order);
  if (status != OSCAR_OK) return status;
  mix_runs(w, plan->mixing, w->values);
  *channels = 0;
  for (int i = 0; i < d; i++) *channels += w->crumbs[i] > 0;
  size_t m = (size_t)*channels;
  double least = 1e-12 * w->values[0] + 1e-30;
  for (size_t k = 0; k < m; k++) {
    size_t i = (size_t)order[k];
    double sigma = sqrt(w->values[i] > least ? w->values[i] : least);
    double unbias = plan->unbiased ? 1 / (1 - (double)codec_gaussian_error(w->crumbs[i])) : 1;
    crumbs[k] = w->crumbs[i];
    w->steps[k] = (float)(sigma * (double)codec_gaussian_step(w->crumbs[i]));
    for (size_t j = 0; j < n; j++) {
      w->encode[j * m + k] = (float)w->basis[j * n + i];
      w->decode[k * n + j] = (float)(unbias * w->dual[i * n + j]);
    }
  }
  return OSCAR_OK;
}

/* Rows as attention weighs them, projected, to try codecs on. Codecs that differ in their steps alone share the projection. */
struct sample {
  int count, channels;
  float *rows, *y; /* [count][d] as they are, [count][channels] projected */
  float *decoded;  /* [channels] */
  int64_t *positions;
};

static void sample_close(oscar_context *context, struct sample *s) {
  mem_free(context, s->rows);
  mem_free(context, s->positions);
}

static oscar_status sample_open(const oscar_calib *calib, const struct side_plan *plan, const oscar_codec *codec,
                                struct sample *s) {
  enum { MOST = 96 };
  size_t d = (size_t)calib->geometry.head_dim;
  *s = (struct sample){.channels = codec->spec.channels};
  s->rows = mem_alloc(calib->context, (2 * MOST + 1) * d, sizeof *s->rows);
  s->positions = s->rows ? mem_alloc(calib->context, MOST, sizeof *s->positions) : NULL;
  if (!s->positions) {
    sample_close(calib->context, s);
    return OSCAR_NO_MEMORY;
  }
  s->y = s->rows + MOST * d;
  s->decoded = s->y + MOST * d;
  attended_sample(calib, plan->layer, plan->kv_head, plan->side, MOST, &s->count, s->rows, s->positions);
  for (int r = 0; r < s->count; r++)
    codec_project(codec, s->positions[r], 1, s->rows + (size_t)r * d, d, s->y + (size_t)r * (size_t)s->channels);
  return OSCAR_OK;
}

/* Mean squared error of the sample's rows in the codec's channels; in the basis of keys that is what errors cost. */
static double sample_error(const oscar_codec *codec, const struct sample *s) {
  uint8_t row[OSCAR_MAX_HEAD_DIM * MOST_CRUMBS / 4 + 64];
  double sum = 0;
  for (int r = 0; r < s->count; r++) {
    const float *y = s->y + (size_t)r * (size_t)s->channels;
    memcpy(s->decoded, y, (size_t)s->channels * sizeof *y); /* quantizing clobbers */
    if (!codec_quantize_row(codec, s->decoded, row)) return INFINITY;
    codec_decode_row(codec, row, s->decoded);
    for (int i = 0; i < s->channels; i++) {
      double e = (double)y[i] - (double)s->decoded[i];
      sum += e * e;
    }
  }
  return sum / s->count;
}

/* The codec with its steps times `scale`, a quarter of an octave each way as long as that helps on the sample. Gains of a few
 * bits have a range, and the mean square that steps come from says little where a few rows are many times larger than the rest.
 * *error_left: of the sample's rows, per row; 0 without a sample. */
static oscar_status find_scale(const oscar_calib *calib, struct work *w, const struct side_plan *plan, oscar_codec_spec *spec,
                               oscar_codec **codec, double *error_left) {
  enum { MOST_STEPS = 24 };
  struct sample sample;
  oscar_codec *tried = NULL;
  oscar_status status = oscar_codec_create(w->context, spec, codec);
  if (status == OSCAR_OK && (status = sample_open(calib, plan, *codec, &sample)) != OSCAR_OK) {
    oscar_codec_release(*codec);
    *codec = NULL;
  }
  if (status != OSCAR_OK) return status;
  double least = sample.count ? sample_error(*codec, &sample) : 0;
  bool scaled = sample.count && plan->form == OSCAR_ROW_LOG_GAINS;
  float factor = 0.840896415f; /* down first: large rows are what makes the mean square too large */
  for (int turns = 0; scaled && status == OSCAR_OK && turns < 2; turns++, factor = 1 / factor)
    for (int k = 0; k < MOST_STEPS; k++) {
      for (int i = 0; i < spec->channels; i++) w->steps[i] *= factor;
      if ((status = oscar_codec_create(w->context, spec, &tried)) != OSCAR_OK) break;
      double error = sample_error(tried, &sample);
      if (!(error < least)) {
        oscar_codec_release(tried);
        for (int i = 0; i < spec->channels; i++) w->steps[i] /= factor;
        break;
      }
      turns = 2; /* what helps one way does not help the other */
      least = error;
      oscar_codec_release(*codec);
      *codec = tried;
    }
  sample_close(w->context, &sample);
  *error_left = least;
  if (status != OSCAR_OK) {
    oscar_codec_release(*codec);
    *codec = NULL;
  }
  return status;
}

static oscar_status make_codec(const oscar_calib *calib, struct work *w, const struct side_plan *plan, int pairs,
                               oscar_codec **codec, double *error_left) {
  uint8_t crumbs[OSCAR_MAX_HEAD_DIM];
  int channels;
  oscar_status status = lay_out(w, plan, crumbs, &channels);
  if (status != OSCAR_OK) return status;
  oscar_codec_spec spec = {.head_dim = w->d,
                           .channels = channels,
                           .form = plan->form,
                           .groups = plan->groups,
                           .clip_ratio = 1,
                           .crumbs = crumbs,
                           .steps = w->steps,
                           .mean = w->mean_f32,
                           .encode = w->encode,
                           .decode = w->decode,
                           .rope = pairs ? calib->attended->layers[plan->layer].rope : NULL,
                           .rotating_pairs = pairs,
                           .rotating_pair = w->pairs,
                           .rotating_mean = w->rotating};
  return find_scale(calib, w, plan, &spec, codec, error_left);
}

/* ---- keys ---- */

/* The rotating mean as the codec wants it. */
static void store_rotating_mean(struct work *w) {
  for (int k = 0; k < w->kept; k++) {
    w->rotating[2 * k] = (float)w->wave_mean[w->pairs[k]];
    w->rotating[2 * k + 1] = (float)w->wave_mean[w->rotary_dim / 2 + w->pairs[k]];
  }
}

static int log_gain_groups(oscar_row_form form, int crumbs) {
  int blocks = crumbs / 16;
  return form != OSCAR_ROW_LOG_GAINS ? 1 : blocks < OSCAR_MAX_LOG_GAINS ? blocks : OSCAR_MAX_LOG_GAINS;
}

/* The codec of what find_keys has found. */
static oscar_status fit_keys(const oscar_calib *calib, int layer, int kv_head, const oscar_graded_options *o, int crumbs,
                             struct work *w, oscar_codec **codec, double *error_left) {
  for (int i = 0; i < w->d; i++) w->mean_f32[i] = (float)w->mean[i];
  const struct side_plan plan = {.layer = layer,
                                 .kv_head = kv_head,
                                 .side = OSCAR_KEYS,
                                 .crumbs = crumbs,
                                 .groups = log_gain_groups(o->key_form, crumbs),
                                 .mixing = o->mixing,
                                 .form = o->key_form};
  store_rotating_mean(w);
  return make_codec(calib, w, &plan, w->kept, codec, error_left);
}

/* ---- values ---- */

/* basis = dual' = Hadamards along the diagonal, as large as there are; w->values: they make all variances of w->covariance equal.
 */
static oscar_status hadamard_basis(struct work *w) {
  int d = w->d, order = d;
  while (order > 1 && (!oscar_hadamard_exists(order) || d % order)) order--;
  oscar_status status = oscar_hadamard(w->context, order, w->encode);
  if (status != OSCAR_OK) return status;
  size_t n = (size_t)d, m = (size_t)order;
  for (size_t i = 0; i < n; i++) w->values[i] = graded_trace(d, w->covariance) / d;
  memset(w->basis, 0, n * n * sizeof *w->basis);
  for (size_t i = 0; i < n; i++)
    for (size_t j = 0; j < m; j++) w->basis[i * n + i / m * m + j] = (double)w->encode[i % m * m + j];
  for (size_t i = 0; i < n; i++)
    for (size_t j = 0; j < n; j++) w->dual[i * n + j] = w->basis[j * n + i];
  return OSCAR_OK;
}

/* basis = dual' = the principal directions of w->covariance, w->values their variances. */
static oscar_status principal_basis(struct work *w) {
  size_t n = (size_t)w->d;
  oscar_status status = graded_eigen(w, w->covariance);
  if (status != OSCAR_OK) return status;
  for (size_t i = 0; i < n; i++)
    if (!(w->values[i] > 0)) w->values[i] = 0;
  memcpy(w->dual, w->vectors, n * n * sizeof *w->dual);
  for (size_t i = 0; i < n; i++)
    for (size_t j = 0; j < n; j++) w->basis[i * n + j] = w->dual[j * n + i];
  return OSCAR_OK;
}

/* w->mean and w->covariance of the values. */
static void find_values(const oscar_calib *calib, int layer, int kv_head, struct work *w) {
  const struct attended_layer *l = &calib->attended->layers[layer];
  const struct attended_head *h = &l->heads[kv_head];
  size_t n = (size_t)w->d;
  double inverse = 1 / (double)l->tokens;
  for (size_t i = 0; i < n; i++) w->mean[i] = h->value_sum[i] * inverse;
  graded_mirror(w->d, h->value_moment, inverse, w->covariance);
  for (size_t i = 0; i < n; i++)
    for (size_t j = 0; j < n; j++) w->covariance[i * n + j] -= w->mean[i] * w->mean[j];
  graded_regularize(w->d, inverse * graded_trace(w->d, h->value_moment), w->covariance);
}

static oscar_status fit_values(const oscar_calib *calib, int layer, int kv_head, const oscar_graded_options *o, int crumbs,
                               struct work *w, oscar_codec **codec, double *error_left) {
  int d = w->d;
  bool flat = crumbs % d == 0; /* where all channels get the same crumbs, Hadamards over all of them are best */
  find_values(calib, layer, kv_head, w);
  for (int i = 0; i < d; i++) w->mean_f32[i] = (float)w->mean[i];
  oscar_status status = flat ? hadamard_basis(w) : principal_basis(w);
  if (status != OSCAR_OK) return status;
  const struct side_plan plan = {.layer = layer,
                                 .kv_head = kv_head,
                                 .side = OSCAR_VALUES,
                                 .crumbs = crumbs,
                                 .least = crumbs / d,
                                 .groups = log_gain_groups(o->value_form, crumbs),
                                 .mixing = flat ? 1 : d,
                                 .form = o->value_form,
                                 .unbiased = o->unbiased_values};
  return make_codec(calib, w, &plan, 0, codec, error_left);
}

/* ---- the budget ---- */

/*
 * Values get 2 bits, and more only when the average is above 2 1/4: then half of all. What errors of the two sides cost cannot be
 * read off first-order formulas, which count the errors of keys too low (an error of a score acts through its exponential); what
 * errors of keys cost in one layer and in another can, up to a factor. So the keys' share is what is spread over layers.
 */
struct budget {
  int layers, heads, d, blocks; /* blocks: of 16 crumbs in a row with all crumbs there can be */
  double *error;                /* [layers][blocks] of keys, what is left of it with 1, 2, ... blocks */
  int *keys;                    /* [layers] blocks given */
  int values;                   /* blocks of every layer */
};

/* Adds what a head's keys cost: errors expected of Gaussian rows of these variances, times `scale`. */
static void add_errors(const struct budget *b, double scale, const double *variance, double *error) {
  uint8_t n[OSCAR_MAX_HEAD_DIM] = {0};
  for (int block = 0; block < b->blocks; block++) {
    crumbs_allocate(b->d, variance, 16 * (block + 1), 0, n);
    for (int i = 0; i < b->d; i++) error[block] += scale * variance[i] * (double)codec_gaussian_error(n[i]);
  }
}

/* Codes as they come out on rows of the text, over what Gaussian rows would lead to expect; 1 where nothing is known. */
static double misfit(const struct budget *b, int crumbs, const double *variance, double error_left) {
  double expected[OSCAR_MAX_HEAD_DIM * MOST_CRUMBS / 16] = {0};
  add_errors(b, 1, variance, expected);
  double gaussian = expected[crumbs / 16 - 1];
  return error_left > 0 && gaussian > 0 ? error_left / gaussian : 1;
}

static oscar_status gather_head(const oscar_calib *calib, const oscar_graded_options *o, int layer, int h, struct work *w,
                                struct budget *b) {
  double variance[OSCAR_MAX_HEAD_DIM] = {0}, left;
  oscar_codec *codec = NULL;
  oscar_status status = graded_find_keys(calib, layer, h, o, w);
  if (status != OSCAR_OK) return status;
  memcpy(variance, w->values, sizeof *variance * (size_t)b->d);
  status = fit_keys(calib, layer, h, o, b->d, w, &codec, &left);
  oscar_codec_release(codec);
  if (status != OSCAR_OK) return status;
  /* what an error of 1 in the basis costs, all queries together */
  double scale = graded_trace(b->d, calib->attended->layers[layer].heads[h].metric) / b->d;
  scale *= o->layer_costs[layer] * misfit(b, b->d, variance, left);
  add_errors(b, scale, variance, b->error + (size_t)layer * (size_t)b->blocks);
  return OSCAR_OK;
}

/* Blocks a layer must keep so that an exact page (4 bytes per channel and token) takes no more units than with `total` blocks:
 * a block is 4 bytes of codes per token, metadata two words. */
static int least_blocks(int d, int total) {
  int meta = 4, run = (4 * d + 4 * total + meta - 1) / (4 * total + meta), least = total;
  while (least > d / 16 + 1 && (4 * d + 4 * (least - 1) + meta - 1) / (4 * (least - 1) + meta) <= run) least--;
  return least;
}

static double saved(const struct budget *b, int layer) {
  const double *error = b->error + (size_t)layer * (size_t)b->blocks;
  int given = b->keys[layer];
  return given < b->blocks ? error[given - 1] - error[given] : -1;
}

/* Every layer begins with the least it may have; the other blocks go one by one to where they save most. */
static void spread(const struct budget *b, int keys) {
  int least = least_blocks(b->d, keys + b->values) - b->values, left = b->layers * (keys - least);
  for (int layer = 0; layer < b->layers; layer++) b->keys[layer] = least;
  for (; left > 0; left--) {
    int best = 0;
    for (int layer = 1; layer < b->layers; layer++)
      if (saved(b, layer) > saved(b, best)) best = layer;
    b->keys[best]++;
  }
}

static oscar_status spend(const oscar_calib *calib, const oscar_graded_options *o, struct work *w, struct budget *b) {
  int least = b->d / 16, total = (int)lround((double)o->bits * b->d / 16);
  if (total <= least) total = least + 1;
  b->values = o->bits > 2.25f ? total / 2 : least;
  for (int layer = 0; layer < b->layers; layer++) b->keys[layer] = total - b->values;
  if (!o->layer_costs) return OSCAR_OK;
  oscar_status status = OSCAR_OK;
  for (int layer = 0; layer < b->layers; layer++)
    for (int h = 0; status == OSCAR_OK && h < b->heads; h++) status = gather_head(calib, o, layer, h, w, b);
  if (status == OSCAR_OK) spread(b, total - b->values);
  return status;
}

/* ---- a set ---- */

static bool is_gain_form(oscar_row_form form) { return form == OSCAR_ROW_LOG_GAINS || form == OSCAR_ROW_GAIN; }

static oscar_status check_options(const oscar_calib *calib, const oscar_graded_options *o) {
  oscar_context *context = calib->context;
  int d = calib->geometry.head_dim;
  if (d < 16 || d % 16) return set_error(context, OSCAR_INVALID_ARGUMENT, "fit: head_dim %d is not a multiple of 16", d);
  if (!(o->bits >= 1.25f && o->bits <= 6))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "fit: %g bits on average; expected 1.25 to 6", (double)o->bits);
  if (o->positions < 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "fit: positions %lld; expected 0 or more", (long long)o->positions);
  for (int layer = 0; o->layer_costs && layer < calib->geometry.layers; layer++)
    if (!(o->layer_costs[layer] >= 0 && isfinite(o->layer_costs[layer])))
      return set_error(context, OSCAR_INVALID_ARGUMENT, "fit: layer_costs[%d] is %g", layer, o->layer_costs[layer]);
  if (!is_gain_form(o->key_form) || !is_gain_form(o->value_form) || !(o->ridge > 0 && isfinite(o->ridge)) ||
      !(o->rotating_share >= 0 && o->rotating_share <= 1) || o->mixing < 1 || o->mixing > d || (o->mixing & (o->mixing - 1)))
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "fit: forms %d and %d, ridge %g, mixing %d, rotating_share %g; expected GAIN or LOG_GAINS, a positive "
                     "ridge, a power of two up to head_dim, 0 to 1",
                     (int)o->key_form, (int)o->value_form, (double)o->ridge, o->mixing, (double)o->rotating_share);
  return OSCAR_OK;
}

static oscar_status fit_head(const oscar_calib *calib, int layer, int kv_head, const oscar_graded_options *o,
                             const struct budget *b, struct work *w, oscar_codec_set *set) {
  for (int side = 0; side < 2; side++) {
    oscar_codec *codec = NULL;
    double left;
    oscar_status status = OSCAR_OK;
    if (side == OSCAR_VALUES)
      status = fit_values(calib, layer, kv_head, o, 16 * b->values, w, &codec, &left);
    else if ((status = graded_find_keys(calib, layer, kv_head, o, w)) == OSCAR_OK)
      status = fit_keys(calib, layer, kv_head, o, 16 * b->keys[layer], w, &codec, &left);
    if (status == OSCAR_OK) status = oscar_codec_set_assign(set, layer, kv_head, (oscar_side)side, codec);
    oscar_codec_release(codec);
    if (status != OSCAR_OK) return prefix_error(w->context, status, "layer %d, KV head %d", layer, kv_head);
  }
  return OSCAR_OK;
}

static oscar_status fit_set(const oscar_calib *calib, const oscar_graded_options *o, struct work *w, oscar_codec_set *set) {
  const oscar_calib_geometry *g = &calib->geometry;
  oscar_context *context = calib->context;
  size_t layers = (size_t)g->layers;
  struct budget b = {g->layers, g->kv_heads, g->head_dim, MOST_CRUMBS * g->head_dim / 16, NULL, NULL, 0};
  b.keys = mem_zalloc(context, layers, sizeof *b.keys);
  b.error = b.keys ? mem_zalloc(context, layers * (size_t)b.blocks, sizeof *b.error) : NULL;
  oscar_status status = b.error ? OSCAR_OK : OSCAR_NO_MEMORY;
  if (status == OSCAR_OK) status = spend(calib, o, w, &b);
  for (int layer = 0; status == OSCAR_OK && layer < g->layers; layer++)
    for (int h = 0; status == OSCAR_OK && h < g->kv_heads; h++) status = fit_head(calib, layer, h, o, &b, w, set);
  mem_free(context, b.error);
  mem_free(context, b.keys);
  return status == OSCAR_OK ? oscar_codec_set_check(set) : status;
}

oscar_status oscar_calib_fit_graded(const oscar_calib *calib, const oscar_codec_set_info *info,
                                    const oscar_graded_options *options, oscar_codec_set **set) {
  *set = NULL;
  oscar_context *context = calib->context;
  if (!calib->attended) return set_error(context, OSCAR_INVALID_ARGUMENT, "fit: graded codes need oscar_calib_attend");
  oscar_status status = check_options(calib, options);
  if (status == OSCAR_OK) status = calib_check_info(calib, info);
  if (status == OSCAR_OK) status = calib_check_complete(calib, false);
  if (status != OSCAR_OK) return status;
  if (calib->attended->layers[0].tokens == 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "fit: the text has no tokens after the %d of the sink",
                     calib->attended->options.sink_pages * PAGE_TOKENS);
  attended_close_sequences(calib);
  struct work w;
  oscar_codec_set *made = NULL;
  if ((status = graded_work_open(context, calib->geometry.head_dim, &w)) != OSCAR_OK) return status;
  status = oscar_codec_set_create(context, info, &made);
  if (status == OSCAR_OK) status = fit_set(calib, options, &w, made);
  graded_work_close(&w);
  if (status == OSCAR_OK)
    *set = made;
  else
    oscar_codec_set_free(made);
  return status;
}
