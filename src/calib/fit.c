/*
 * fit.c - from averaged statistics to codecs: R = U H P per layer or per KV head, keys and values.
 *
 * U are the eigenvectors of the query moment (keys) or of the output or proxy moment (values), ascending, from LAPACK's dsyevd.
 * An eigenvector is defined up to its sign only; here its component of largest magnitude is positive, so that a fit does not
 * depend on LAPACK's mood. A moment without information (zero, a multiple of the identity) gives some orthogonal U all the same:
 * the codec is then a Hadamard codec, which is what one would choose knowing nothing.
 *
 * The range of a codec's crumbs needs no fit: scale and zero are found per row when it is written.
 */
#include "calib/calib.h"

#include "base/team.h"

#include <lapacke.h>
#include <math.h>
#include <oscar/rotation.h>
#include <string.h>

/* What one fit needs besides its input; d x d unless said. */
struct fit {
  const oscar_calib *calib;
  const oscar_fit_options *options;
  double *moment;       /* averaged; dsyevd leaves the eigenvectors here */
  double *other;        /* one head's moment on its way into an average; then U row-major */
  double *eigenvalues;  /* [d] */
  double *work;         /* [work_size] */
  lapack_int *integers; /* [integers_size] */
  lapack_int work_size, integers_size;
  double *mean;    /* [d] */
  float *mean_f32; /* [d] */
  float *rotation; /* R */
  uint8_t *crumbs; /* [d] */
};

void oscar_fit_options_default(oscar_fit_options *options) {
  *options = (oscar_fit_options){.per_head = true,
                                 .remove_means = true,
                                 .objective = OSCAR_VALUES_OUTPUT_MOMENT,
                                 .crumbs_per_channel = 1,
                                 .group = 0,
                                 .clip_keys = 0.96f, /* the reference's ratios (arXiv 2605.17757) */
                                 .clip_values = 0.92f};
}

static bool is_ratio(float clip) { return clip > 0 && clip <= 1; }

static oscar_status check_options(oscar_context *context, int d, const oscar_fit_options *o) {
  if (o->crumbs_per_channel != 1 && o->crumbs_per_channel != 2 && o->crumbs_per_channel != 4)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "fit: crumbs_per_channel is %d, expected 1, 2 or 4", o->crumbs_per_channel);
  if (o->group != 0 && (o->group < 16 || o->group > d || d % o->group != 0))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "fit: group is %d, expected 0 or a divisor of head_dim %d from 16 on",
                     o->group, d);
  if (!is_ratio(o->clip_keys) || !is_ratio(o->clip_values))
    return set_error(context, OSCAR_INVALID_ARGUMENT, "fit: clip ratios are %g (keys) and %g (values), expected 0 < ratio <= 1",
                     (double)o->clip_keys, (double)o->clip_values);
  if (o->objective != OSCAR_VALUES_OUTPUT_MOMENT && o->objective != OSCAR_VALUES_PROXY)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "fit: value objective %d does not exist", (int)o->objective);
  return OSCAR_OK;
}

oscar_status calib_check_info(const oscar_calib *calib, const oscar_codec_set_info *info) {
  oscar_context *context = calib->context;
  const oscar_calib_geometry *g = &calib->geometry;
  if (info->layers == g->layers && info->kv_heads == g->kv_heads && info->head_dim == g->head_dim) return OSCAR_OK;
  return set_error(context, OSCAR_INVALID_ARGUMENT,
                   "fit: the set is to have %d layers, %d KV heads, head_dim %d; the statistics are of %d, %d, %d", info->layers,
                   info->kv_heads, info->head_dim, g->layers, g->kv_heads, g->head_dim);
}

static void fit_close(struct fit *fit) {
  oscar_context *context = fit->calib->context;
  mem_free(context, fit->moment);
  mem_free(context, fit->other);
  mem_free(context, fit->eigenvalues);
  mem_free(context, fit->work);
  mem_free(context, fit->integers);
  mem_free(context, fit->mean);
  mem_free(context, fit->mean_f32);
  mem_free(context, fit->rotation);
  mem_free(context, fit->crumbs);
}

static oscar_status fit_open(const oscar_calib *calib, const oscar_fit_options *options, struct fit *fit) {
  oscar_context *context = calib->context;
  size_t d = (size_t)calib->geometry.head_dim;
  *fit = (struct fit){.calib = calib, .options = options};
  /* dsyevd's documented minimum with eigenvectors. Its own workspace keeps memory with the context's allocator. */
  fit->work_size = (lapack_int)(1 + 6 * d + 2 * d * d);
  fit->integers_size = (lapack_int)(3 + 5 * d);
  fit->moment = mem_alloc(context, d * d, sizeof(double));
  fit->other = fit->moment ? mem_alloc(context, d * d, sizeof(double)) : NULL;
  fit->eigenvalues = fit->other ? mem_alloc(context, d, sizeof(double)) : NULL;
  fit->work = fit->eigenvalues ? mem_alloc(context, (size_t)fit->work_size, sizeof(double)) : NULL;
  fit->integers = fit->work ? mem_alloc(context, (size_t)fit->integers_size, sizeof(lapack_int)) : NULL;
  fit->mean = fit->integers ? mem_alloc(context, d, sizeof(double)) : NULL;
  fit->mean_f32 = fit->mean ? mem_alloc(context, d, sizeof(float)) : NULL;
  fit->rotation = fit->mean_f32 ? mem_alloc(context, d * d, sizeof(float)) : NULL;
  fit->crumbs = fit->rotation ? mem_alloc(context, d, 1) : NULL;
  if (!fit->crumbs) {
    fit_close(fit);
    return OSCAR_NO_MEMORY;
  }
  memset(fit->crumbs, options->crumbs_per_channel, d);
  return OSCAR_OK;
}

static oscar_calib_statistic moment_of(const struct fit *fit, oscar_side side) {
  if (side == OSCAR_KEYS) return OSCAR_CALIB_QUERY_MOMENT;
  return fit->options->objective == OSCAR_VALUES_PROXY ? OSCAR_CALIB_PROXY_MOMENT : OSCAR_CALIB_OUTPUT_MOMENT;
}

/* fit->moment = the average over heads first .. first + count - 1. */
static oscar_status gather_moment(struct fit *fit, int layer, int first, int count, oscar_side side) {
  size_t size = (size_t)fit->calib->geometry.head_dim * (size_t)fit->calib->geometry.head_dim;
  memset(fit->moment, 0, size * sizeof(double));
  for (int h = first; h < first + count; h++) {
    oscar_status status = oscar_calib_get(fit->calib, moment_of(fit, side), layer, h, fit->other);
    if (status != OSCAR_OK) return status;
    for (size_t i = 0; i < size; i++) fit->moment[i] += fit->other[i] / count;
  }
  return OSCAR_OK;
}

/* Column j of the eigenvectors as LAPACK returns them is contiguous; U is wanted row-major, one eigenvector per column. */
static void orient(struct fit *fit) {
  size_t d = (size_t)fit->calib->geometry.head_dim;
  for (size_t j = 0; j < d; j++) {
    const double *vector = fit->moment + j * d;
    size_t largest = 0;
    for (size_t i = 1; i < d; i++)
      if (fabs(vector[i]) > fabs(vector[largest])) largest = i;
    double sign = vector[largest] < 0 ? -1 : 1;
    for (size_t i = 0; i < d; i++) fit->other[i * d + j] = sign * vector[i];
  }
}

/* fit->rotation = R of the heads first .. first + count - 1 together. */
static oscar_status fit_rotation(struct fit *fit, int layer, int first, int count, oscar_side side) {
  oscar_context *context = fit->calib->context;
  int d = fit->calib->geometry.head_dim;
  oscar_status status = gather_moment(fit, layer, first, count, side);
  if (status != OSCAR_OK) return status;
  lapack_int info = LAPACKE_dsyevd_work(LAPACK_COL_MAJOR, 'V', 'L', d, fit->moment, d, fit->eigenvalues, fit->work,
                                        fit->work_size, fit->integers, fit->integers_size);
  if (info != 0)
    return set_error(context, OSCAR_NUMERIC, "fit: the eigenvectors of layer %d, %s, did not converge (dsyevd returned %d)",
                     layer, side == OSCAR_KEYS ? "keys" : "values", (int)info);
  orient(fit);
  return oscar_rotation_compose(context, d, fit->other, fit->rotation);
}

/* The codec of one head with the rotation at hand, assigned to heads first .. first + count - 1. */
static oscar_status assign_codec(struct fit *fit, int layer, int first, int count, oscar_side side, oscar_codec_set *set) {
  const oscar_fit_options *o = fit->options;
  int d = fit->calib->geometry.head_dim;
  if (o->remove_means) {
    oscar_calib_statistic which = side == OSCAR_KEYS ? OSCAR_CALIB_KEY_MEAN : OSCAR_CALIB_VALUE_MEAN;
    oscar_status status = oscar_calib_get(fit->calib, which, layer, first, fit->mean);
    if (status != OSCAR_OK) return status;
    for (int i = 0; i < d; i++) fit->mean_f32[i] = (float)fit->mean[i];
  }
  oscar_codec_spec spec = {.head_dim = d,
                           .channels = d,
                           .form = OSCAR_ROW_SCALE_ZERO,
                           .groups = o->group ? d / o->group : 1,
                           .clip_ratio = side == OSCAR_KEYS ? o->clip_keys : o->clip_values,
                           .crumbs = fit->crumbs,
                           .mean = o->remove_means ? fit->mean_f32 : NULL,
                           .encode = fit->rotation};
  oscar_codec *codec = NULL;
  oscar_status status = oscar_codec_create(fit->calib->context, &spec, &codec);
  if (status != OSCAR_OK) return status;
  for (int h = first; status == OSCAR_OK && h < first + count; h++) status = oscar_codec_set_assign(set, layer, h, side, codec);
  oscar_codec_release(codec);
  return status;
}

static oscar_status fit_side(struct fit *fit, int layer, oscar_side side, oscar_codec_set *set) {
  int heads = fit->calib->geometry.kv_heads;
  int share_rotation = fit->options->per_head ? 1 : heads;
  /* One codec can serve all heads of a rotation only while they have no means of their own. */
  int share_codec = fit->options->remove_means ? 1 : share_rotation;
  oscar_status status = OSCAR_OK;
  for (int h = 0; status == OSCAR_OK && h < heads; h += share_codec) {
    if (h % share_rotation == 0) status = fit_rotation(fit, layer, h, share_rotation, side);
    if (status == OSCAR_OK) status = assign_codec(fit, layer, h, share_codec, side, set);
  }
  return status;
}

oscar_status oscar_calib_fit(const oscar_calib *calib, const oscar_codec_set_info *info, const oscar_fit_options *options,
                             oscar_codec_set **set) {
  *set = NULL;
  oscar_context *context = calib->context;
  int d = calib->geometry.head_dim;
  oscar_status status = check_options(context, d, options);
  if (status == OSCAR_OK) status = calib_check_info(calib, info);
  if (status == OSCAR_OK) status = calib_check_complete(calib, options->objective == OSCAR_VALUES_PROXY);
  if (status != OSCAR_OK) return status;
  if (!oscar_hadamard_exists(d))
    return set_error(context, OSCAR_UNSUPPORTED,
                     "fit: there is no Hadamard matrix of order %d here (2^k and 2^k times 12, 20 or 28 are built)", d);
  team_before_openmp(context); /* which BLAS may use */

  struct fit fit;
  oscar_codec_set *made = NULL;
  status = fit_open(calib, options, &fit);
  if (status != OSCAR_OK) return status;
  status = oscar_codec_set_create(context, info, &made);
  for (int layer = 0; status == OSCAR_OK && layer < calib->geometry.layers; layer++) {
    status = fit_side(&fit, layer, OSCAR_KEYS, made);
    if (status == OSCAR_OK) status = fit_side(&fit, layer, OSCAR_VALUES, made);
  }
  if (status == OSCAR_OK) status = oscar_codec_set_check(made);
  fit_close(&fit);
  if (status == OSCAR_OK)
    *set = made;
  else
    oscar_codec_set_free(made);
  return status;
}
