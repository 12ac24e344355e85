/*
 * statistics.c - sums over everything a model's attention saw, in double.
 *
 * The second moments are the work: n g d^2 multiply-adds per layer and KV head. Rows are converted to double a tile at a time
 * (they lie strided inside [n][heads][d] floats) and multiplied by BLAS (dsyrk), which needs a small part of the time the forward
 * pass of the same chunk takes. Input is checked before anything is added, so a failing call leaves the sums as they were.
 *
 * The order of additions depends on how the text was cut into chunks, so sums of different chunkings agree to rounding (1e-12),
 * not bit for bit; the same chunking gives the same bits.
 */
#include "calib/attended.h"

#include "base/team.h"

#include <cblas.h>
#include <math.h>
#include <string.h>

static size_t place_of(const oscar_calib *calib, int layer, int kv_head) {
  return (size_t)layer * (size_t)calib->geometry.kv_heads + (size_t)kv_head;
}
static size_t places(const oscar_calib *calib) { return (size_t)calib->geometry.layers * (size_t)calib->geometry.kv_heads; }
static size_t moment_size(const oscar_calib *calib) {
  return (size_t)calib->geometry.head_dim * (size_t)calib->geometry.head_dim;
}
static int group_of(const oscar_calib *calib) { return calib->geometry.query_heads / calib->geometry.kv_heads; }

static oscar_status check_geometry(oscar_context *context, const oscar_calib_geometry *g) {
  if (g->layers < 1 || g->kv_heads < 1 || g->query_heads < 1 || g->query_heads % g->kv_heads != 0)
    return set_error(context, OSCAR_INVALID_ARGUMENT,
                     "calibration of %d layers, %d query heads and %d KV heads: all must be at least 1, and the query heads a "
                     "multiple of the KV heads",
                     g->layers, g->query_heads, g->kv_heads);
  if (g->head_dim < 1 || g->head_dim > OSCAR_MAX_HEAD_DIM)
    return set_error(context, OSCAR_INVALID_ARGUMENT, "calibration with head_dim %d: expected 1 to %d", g->head_dim,
                     OSCAR_MAX_HEAD_DIM);
  return OSCAR_OK;
}

oscar_status oscar_calib_create(oscar_context *context, const oscar_calib_geometry *geometry, oscar_calib **calib) {
  *calib = NULL;
  oscar_status status = check_geometry(context, geometry);
  if (status != OSCAR_OK) return status;
  oscar_calib *c = mem_zalloc(context, 1, sizeof *c);
  if (!c) return OSCAR_NO_MEMORY;
  c->context = context;
  c->geometry = *geometry;
  size_t d = (size_t)geometry->head_dim, n = places(c);
  c->tokens = mem_zalloc(context, (size_t)geometry->layers, sizeof *c->tokens);
  c->query_moment = c->tokens ? mem_zalloc(context, n * d * d, sizeof(double)) : NULL;
  c->output_moment = c->query_moment ? mem_zalloc(context, n * d * d, sizeof(double)) : NULL;
  c->key_sum = c->output_moment ? mem_zalloc(context, n * d, sizeof(double)) : NULL;
  c->value_sum = c->key_sum ? mem_zalloc(context, n * d, sizeof(double)) : NULL;
  c->tile = c->value_sum ? mem_alloc(context, CALIB_TILE_ROWS * d, sizeof(double)) : NULL;
  c->product = c->tile ? mem_alloc(context, CALIB_TILE_ROWS * d, sizeof(double)) : NULL;
  if (!c->product) {
    oscar_calib_free(c);
    return OSCAR_NO_MEMORY;
  }
  *calib = c;
  return OSCAR_OK;
}

void oscar_calib_free(oscar_calib *calib) {
  if (!calib) return;
  oscar_context *context = calib->context;
  attended_free(calib);
  mem_free(context, calib->tokens);
  mem_free(context, calib->proxy_tokens);
  mem_free(context, calib->query_moment);
  mem_free(context, calib->output_moment);
  mem_free(context, calib->proxy_moment);
  mem_free(context, calib->proxy_weight);
  mem_free(context, calib->key_sum);
  mem_free(context, calib->value_sum);
  mem_free(context, calib->tile);
  mem_free(context, calib->product);
  mem_free(context, calib);
}

/* x [n][heads][d] */
static oscar_status check_finite(const oscar_calib *calib, int layer, const char *what, int n, int heads, const float *x) {
  size_t d = (size_t)calib->geometry.head_dim, count = (size_t)n * (size_t)heads * d;
  for (size_t i = 0; i < count; i++)
    if (!isfinite(x[i]))
      return set_error(calib->context, OSCAR_NUMERIC,
                       "calibration, layer %d: %s of head %zu, token %zu of the chunk, channel %zu is %g, expected a finite "
                       "number",
                       layer, what, i / d % (size_t)heads, i / d / (size_t)heads, i % d, (double)x[i]);
  return OSCAR_OK;
}

/* moment += tile' tile over the first `rows` rows of the tile. */
static void add_tile(oscar_calib *calib, int rows, double *moment) {
  int d = calib->geometry.head_dim;
  if (rows > 0) cblas_dsyrk(CblasRowMajor, CblasLower, CblasTrans, d, rows, 1, calib->tile, d, 1, moment, d);
}

/* moment += sum of x'x over n tokens with `heads` consecutive rows each; tokens lie `stride` floats apart. */
static void add_moment(oscar_calib *calib, int n, int heads, const float *x, size_t stride, double *moment) {
  size_t d = (size_t)calib->geometry.head_dim;
  int rows = 0;
  for (int t = 0; t < n; t++)
    for (int h = 0; h < heads; h++) {
      const float *row = x + (size_t)t * stride + (size_t)h * d;
      double *to = calib->tile + (size_t)rows * d;
      for (size_t i = 0; i < d; i++) to[i] = (double)row[i];
      if (++rows < CALIB_TILE_ROWS) continue;
      add_tile(calib, rows, moment);
      rows = 0;
    }
  add_tile(calib, rows, moment);
}

static void add_sum(const oscar_calib *calib, int n, const float *x, size_t stride, double *sum) {
  size_t d = (size_t)calib->geometry.head_dim;
  for (int t = 0; t < n; t++)
    for (size_t i = 0; i < d; i++) sum[i] += (double)x[(size_t)t * stride + i];
}

/* One tile of the proxy: weights w_t = k_t S k_t' / scale of S, then sum of w and of w v'v, by scaling each v with sqrt(w). S is
 * the lower triangle of the query moment's sum; its constant factor cancels in the normalisation. */
static void add_proxy_tile(oscar_calib *calib, size_t place, int rows, const float *k, const float *v, size_t stride) {
  int d = calib->geometry.head_dim;
  size_t ds = (size_t)d;
  for (int r = 0; r < rows; r++)
    for (size_t i = 0; i < ds; i++) calib->tile[(size_t)r * ds + i] = (double)k[(size_t)r * stride + i];
  cblas_dsymm(CblasRowMajor, CblasRight, CblasLower, rows, d, 1, calib->query_moment + place * ds * ds, d, calib->tile, d, 0,
              calib->product, d);
  for (int r = 0; r < rows; r++) {
    double *row = calib->tile + (size_t)r * ds;
    double weight = cblas_ddot(d, row, 1, calib->product + (size_t)r * ds, 1);
    if (!(weight > 0)) weight = 0; /* S is positive semidefinite; below zero is rounding */
    calib->proxy_weight[place] += weight;
    double root = sqrt(weight);
    for (size_t i = 0; i < ds; i++) row[i] = root * (double)v[(size_t)r * stride + i];
  }
  add_tile(calib, rows, calib->proxy_moment + place * ds * ds);
}

static oscar_status add_proxy(oscar_calib *calib, int layer, int n, const float *k, const float *v) {
  int heads = calib->geometry.kv_heads;
  size_t d = (size_t)calib->geometry.head_dim, stride = (size_t)heads * d;
  if (!k || !v) return set_error(calib->context, OSCAR_INVALID_ARGUMENT, "calibration, layer %d: k or v is NULL", layer);
  oscar_status status = check_finite(calib, layer, "the key", n, heads, k);
  if (status == OSCAR_OK) status = check_finite(calib, layer, "the value", n, heads, v);
  if (status != OSCAR_OK) return status;
  for (int h = 0; h < heads; h++)
    for (int t = 0; t < n; t += CALIB_TILE_ROWS) {
      size_t first = (size_t)t * stride + (size_t)h * d;
      int rows = n - t < CALIB_TILE_ROWS ? n - t : CALIB_TILE_ROWS;
      add_proxy_tile(calib, place_of(calib, layer, h), rows, k + first, v + first, stride);
    }
  calib->proxy_tokens[layer] += n;
  return OSCAR_OK;
}

oscar_status oscar_calib_add(oscar_calib *calib, int layer, int n, const float *q, const float *k, const float *v,
                             const float *o) {
  const oscar_calib_geometry *g = &calib->geometry;
  if (layer < 0 || layer >= g->layers || n < 1)
    return set_error(calib->context, OSCAR_INVALID_ARGUMENT,
                     "calibration: layer %d, %d tokens: expected layer 0 to %d, tokens >= 1", layer, n, g->layers - 1);
  team_before_openmp(calib->context);
  if (calib->proxy_moment) return add_proxy(calib, layer, n, k, v);
  if (!q || !k || !v || !o)
    return set_error(calib->context, OSCAR_INVALID_ARGUMENT, "calibration, layer %d: q, k, v or o is NULL", layer);
  oscar_status status = check_finite(calib, layer, "the query", n, g->query_heads, q);
  if (status == OSCAR_OK) status = check_finite(calib, layer, "the key", n, g->kv_heads, k);
  if (status == OSCAR_OK) status = check_finite(calib, layer, "the value", n, g->kv_heads, v);
  if (status == OSCAR_OK) status = check_finite(calib, layer, "the attention output", n, g->query_heads, o);
  if (status != OSCAR_OK) return status;

  if (calib->attended && (status = attended_add(calib, layer, n, q, k, v, o)) != OSCAR_OK) return status;
  int group = group_of(calib);
  size_t d = (size_t)g->head_dim, q_stride = (size_t)g->query_heads * d, k_stride = (size_t)g->kv_heads * d;
  for (int h = 0; h < g->kv_heads; h++) {
    size_t place = place_of(calib, layer, h), q_first = (size_t)h * (size_t)group * d, k_first = (size_t)h * d;
    add_moment(calib, n, group, q + q_first, q_stride, calib->query_moment + place * d * d);
    add_moment(calib, n, group, o + q_first, q_stride, calib->output_moment + place * d * d);
    add_sum(calib, n, k + k_first, k_stride, calib->key_sum + place * d);
    add_sum(calib, n, v + k_first, k_stride, calib->value_sum + place * d);
  }
  calib->tokens[layer] += n;
  return OSCAR_OK;
}

oscar_status calib_check_complete(const oscar_calib *calib, bool proxy) {
  int64_t want = calib->tokens[0];
  if (want == 0) return set_error(calib->context, OSCAR_INVALID_ARGUMENT, "calibration: layer 0 has seen no tokens yet");
  for (int layer = 0; layer < calib->geometry.layers; layer++)
    if (calib->tokens[layer] != want)
      return set_error(calib->context, OSCAR_INVALID_ARGUMENT, "calibration: layer %d has seen %lld tokens, layer 0 %lld", layer,
                       (long long)calib->tokens[layer], (long long)want);
  if (!proxy) return OSCAR_OK;
  if (!calib->proxy_moment)
    return set_error(calib->context, OSCAR_INVALID_ARGUMENT,
                     "calibration: the proxy statistic needs a second pass over the text (oscar_calib_begin_proxy)");
  for (int layer = 0; layer < calib->geometry.layers; layer++)
    if (calib->proxy_tokens[layer] != want)
      return set_error(calib->context, OSCAR_INVALID_ARGUMENT,
                       "calibration: layer %d has seen %lld tokens in the second pass, %lld in the first", layer,
                       (long long)calib->proxy_tokens[layer], (long long)want);
  return OSCAR_OK;
}

oscar_status oscar_calib_begin_proxy(oscar_calib *calib) {
  oscar_context *context = calib->context;
  if (calib->proxy_moment) return set_error(context, OSCAR_INVALID_ARGUMENT, "calibration: the second pass has already begun");
  oscar_status status = calib_check_complete(calib, false);
  if (status != OSCAR_OK) return status;
  int64_t *tokens = mem_zalloc(context, (size_t)calib->geometry.layers, sizeof *tokens);
  double *weight = tokens ? mem_zalloc(context, places(calib), sizeof *weight) : NULL;
  double *moment = weight ? mem_zalloc(context, places(calib) * moment_size(calib), sizeof *moment) : NULL;
  if (!moment) {
    mem_free(context, weight);
    mem_free(context, tokens);
    return OSCAR_NO_MEMORY;
  }
  calib->proxy_tokens = tokens;
  calib->proxy_weight = weight;
  calib->proxy_moment = moment;
  return OSCAR_OK;
}

int64_t oscar_calib_tokens(const oscar_calib *calib) { return calib->tokens[0]; }

/* out = sum / divisor, both triangles filled from the lower one. */
static void read_moment(size_t d, const double *sum, double divisor, double *out) {
  for (size_t i = 0; i < d; i++)
    for (size_t j = 0; j <= i; j++) out[i * d + j] = out[j * d + i] = divisor > 0 ? sum[i * d + j] / divisor : 0;
}

static void read_mean(size_t d, const double *sum, double divisor, double *out) {
  for (size_t i = 0; i < d; i++) out[i] = sum[i] / divisor;
}

oscar_status oscar_calib_get(const oscar_calib *calib, oscar_calib_statistic which, int layer, int kv_head, double *out) {
  const oscar_calib_geometry *g = &calib->geometry;
  if (layer < 0 || layer >= g->layers || kv_head < 0 || kv_head >= g->kv_heads)
    return set_error(calib->context, OSCAR_INVALID_ARGUMENT,
                     "calibration: layer %d, KV head %d: expected layers 0 to %d, heads 0 to %d", layer, kv_head, g->layers - 1,
                     g->kv_heads - 1);
  oscar_status status = calib_check_complete(calib, which == OSCAR_CALIB_PROXY_MOMENT);
  if (status != OSCAR_OK) return status;
  size_t d = (size_t)g->head_dim, place = place_of(calib, layer, kv_head);
  double tokens = (double)calib->tokens[layer], rows = tokens * group_of(calib);
  switch (which) {
  case OSCAR_CALIB_QUERY_MOMENT:
    read_moment(d, calib->query_moment + place * d * d, rows, out);
    return OSCAR_OK;
  case OSCAR_CALIB_OUTPUT_MOMENT:
    read_moment(d, calib->output_moment + place * d * d, rows, out);
    return OSCAR_OK;
  case OSCAR_CALIB_PROXY_MOMENT:
    read_moment(d, calib->proxy_moment + place * d * d, calib->proxy_weight[place], out);
    return OSCAR_OK;
  case OSCAR_CALIB_KEY_MEAN:
    read_mean(d, calib->key_sum + place * d, tokens, out);
    return OSCAR_OK;
  case OSCAR_CALIB_VALUE_MEAN:
    read_mean(d, calib->value_sum + place * d, tokens, out);
    return OSCAR_OK;
  case OSCAR_CALIB_KEY_METRIC:
  case OSCAR_CALIB_ATTENDED_KEY_MEAN:
    return attended_get(calib, which, layer, kv_head, out);
  }
  return set_error(calib->context, OSCAR_INVALID_ARGUMENT, "calibration: statistic %d does not exist", (int)which);
}
