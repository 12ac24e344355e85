/*
 * graded_keys.c - the keys of a head: what turns with the position and is taken off, and the basis in which errors count alike.
 *
 * Keys. The metric M of key errors and the covariance C of what is coded (the keys less their mean, rotating and fixed) are
 * brought to one basis in which M is the identity and C diagonal: with B = M^(1/2) and B C B = V L V', E = B V and D = V' B^-1.
 * An error of a channel then counts the same whichever it is, so crumbs go where they save most: reverse water-filling on L.
 * Channels of equal crumbs are mixed by small Hadamards, which spreads the tails of each over all of them.
 *
 * The keys of RoPE models carry a vector that turns with the position (the bias of the key projection, if nothing else): its
 * estimate is the mean of the keys turned back to position 0. What remains is centred where the attended keys are.
 */
#include "calib/crumbs.h"
#include "calib/graded.h"

#include <math.h>
#include <string.h>

/* ---- the rotating mean ---- */

/* The mean of the keys turned back to position 0: pair (x1, x2) at angle a is (x1 cos a + x2 sin a, x2 cos a - x1 sin a). */
static void find_rotating_mean(const struct attended_layer *l, const struct attended_head *h, struct work *w) {
  int pairs = w->rotary_dim / 2;
  for (int i = 0; i < pairs; i++) {
    const oscar_rope_spec *rope = &l->rope->spec;
    const double *first = h->key_wave + (size_t)rope_first(rope, i) * (size_t)w->rotary_dim;
    const double *second = h->key_wave + (size_t)rope_second(rope, i) * (size_t)w->rotary_dim;
    w->wave_mean[i] = (first[i] + second[pairs + i]) / (double)l->tokens;
    w->wave_mean[pairs + i] = (second[i] - first[pairs + i]) / (double)l->tokens;
    w->pairs[i] = (uint16_t)i;
  }
  w->kept = pairs;
}

/* out [d] -= RoPE of the mean, given the (weighted) mean wave: B wave. */
static void subtract_wave(const struct attended_layer *l, const struct work *w, const double *wave, double factor, double *out) {
  int pairs = w->rotary_dim / 2;
  for (int i = 0; i < pairs; i++) {
    double b1 = w->wave_mean[i], b2 = w->wave_mean[pairs + i], c = factor * wave[i], s = factor * wave[pairs + i];
    out[rope_first(&l->rope->spec, i)] -= b1 * c - b2 * s;
    out[rope_second(&l->rope->spec, i)] -= b1 * s + b2 * c;
  }
}

/* ---- statistics of other positions ---- */

/*
 * RoPE makes attention depend on the distance of two tokens only: the same text further on in a sequence has the same outputs,
 * and its queries and keys are those it had, every pair turned by the same angle more. So what would have been gathered from the
 * text at any place follows from what was. Pairs that turn slowly look the same throughout a window, but not far beyond it: their
 * statistics are averaged over places up to the positions that the codec is for, or codes would come to lose what they were
 * fitted to keep.
 */
enum { PLACES = 16 };

static int64_t place(const oscar_graded_options *o, int i) { return o->positions * i / (PLACES - 1); }

/* One pair of rows or columns turned. */
static void turn_pair(double c, double s, size_t count, size_t stride, double *first, double *second) {
  for (size_t k = 0; k < count * stride; k += stride) {
    double a = first[k], b = second[k];
    first[k] = a * c - b * s;
    second[k] = a * s + b * c;
  }
}

/* rows [count][d] as they are `distance` further on; square moments on both sides. */
static void turn(const oscar_rope_spec *rope, int d, double distance, size_t count, bool both_sides, double *rows) {
  size_t n = (size_t)d;
  for (int i = 0; i < rope->rotary_dim / 2; i++) {
    double angle = (double)rope->frequencies[i] * distance, c = cos(angle), s = sin(angle);
    size_t first = (size_t)rope_first(rope, i), second = (size_t)rope_second(rope, i);
    turn_pair(c, s, count, n, rows + first, rows + second);
    if (both_sides) turn_pair(c, s, n, 1, rows + first * n, rows + second * n);
  }
}

/* Averages a moment [d][d] or a mean [d] over the places. Uses product and dual. */
static void average_places(const struct attended_layer *l, const oscar_graded_options *o, bool moment, struct work *w,
                           double *x) {
  if (!l->rope || o->positions == 0) return;
  size_t rows = moment ? (size_t)w->d : 1, size = rows * (size_t)w->d;
  memset(w->dual, 0, size * sizeof *w->dual);
  for (int i = 0; i < PLACES; i++) {
    memcpy(w->product, x, size * sizeof *x);
    turn(&l->rope->spec, w->d, (double)place(o, i), rows, moment, w->product);
    for (size_t k = 0; k < size; k++) w->dual[k] += w->product[k] / PLACES;
  }
  memcpy(x, w->dual, size * sizeof *x);
}

/* ---- which pairs turn ---- */

/*
 * Every pair that turns costs time whenever scores are made. Those that hardly turn within the positions that the codec is for
 * need no rotating mean: where they stay is part of the fixed one. Nor do those whose mean is small, or lies where codes are fine
 * enough to hold it. So a head keeps the pairs that it would miss most.
 */

/* The share of a pair's squared vector that varies over the positions: all but the square of its mean. */
static double varying_share(const struct attended_layer *l, const oscar_graded_options *o, int pair) {
  const double tokens = (double)l->tokens, c = l->wave_sum[pair] / tokens, s = l->wave_sum[l->rotary_dim / 2 + pair] / tokens;
  double place_c = 0, place_s = 0;
  for (int i = 0; i < PLACES; i++) {
    const double angle = (double)l->rope->spec.frequencies[pair] * (double)place(o, i);
    place_c += cos(angle) / PLACES;
    place_s += sin(angle) / PLACES;
  }
  return fmax(0, 1 - (c * c + s * s) * (place_c * place_c + place_s * place_s));
}

/* What leaving out a pair would add to the errors of codes, at most: what varies of its vector, squared, half of it in each of
 * its channels, and the basis says in which channels of the codes, whose crumbs leave a part of it. */
static double pair_cost(const struct attended_layer *l, const oscar_graded_options *o, const struct work *w,
                        const uint8_t *crumbs, int pair) {
  const size_t n = (size_t)w->d;
  const double *first = w->basis + (size_t)rope_first(&l->rope->spec, pair) * n;
  const double *second = w->basis + (size_t)rope_second(&l->rope->spec, pair) * n;
  const double b1 = w->wave_mean[pair], b2 = w->wave_mean[w->rotary_dim / 2 + pair];
  double left = 0;
  for (size_t k = 0; k < n; k++) left += (first[k] * first[k] + second[k] * second[k]) * (double)codec_gaussian_error(crumbs[k]);
  return (b1 * b1 + b2 * b2) / 2 * left * varying_share(l, o, pair);
}

/* Keeps the `count` pairs that would cost most without, in w->pairs in ascending order; of two that cost as much, the first. w
 * has what is fitted with all pairs. */
static void keep_dearest(const struct attended_layer *l, const oscar_graded_options *o, struct work *w, int count) {
  const int pairs = w->kept;
  uint8_t crumbs[OSCAR_MAX_HEAD_DIM] = {0};
  double cost[OSCAR_MAX_HEAD_DIM / 2] = {0};
  crumbs_allocate(w->d, w->values, w->d, 0, crumbs);
  for (int i = 0; i < pairs; i++) cost[i] = pair_cost(l, o, w, crumbs, i);
  w->kept = 0;
  for (int i = 0; i < pairs; i++) {
    int dearer = 0;
    for (int k = 0; k < pairs; k++) dearer += cost[k] > cost[i] || (cost[k] == cost[i] && k < i);
    if (dearer < count)
      w->pairs[w->kept++] = (uint16_t)i;
    else
      w->wave_mean[i] = w->wave_mean[pairs + i] = 0;
  }
}

/* w->covariance of what remains of the keys when the rotating mean is taken off: with k the keys, B the map from waves to it,
 *     E[(k - B f)'(k - B f)] - mean' mean = E[k'k] - E[k'f] B' - B E[f'k] + B E[f'f] B' - mean' mean */
static void find_covariance(const struct attended_layer *l, const struct attended_head *h, const oscar_graded_options *o,
                            struct work *w) {
  int d = w->d;
  size_t n = (size_t)d, r = (size_t)w->rotary_dim;
  double inverse = 1 / (double)l->tokens, *row = w->lapack;
  graded_mirror(d, h->key_moment, inverse, w->covariance);
  for (size_t i = 0; i < n; i++) w->mean[i] = h->key_sum[i] * inverse;
  if (r) {
    /* product [d][d]: rows E[k'f] B', found by taking B of each row of E[k'f] */
    for (size_t i = 0; i < n; i++) {
      memset(row, 0, n * sizeof *row);
      subtract_wave(l, w, h->key_wave + i * r, -inverse, row);
      memcpy(w->product + i * n, row, n * sizeof *row);
    }
    for (size_t i = 0; i < n; i++)
      for (size_t j = 0; j < n; j++) w->covariance[i * n + j] -= w->product[i * n + j] + w->product[j * n + i];
    /* B E[f'f] B': B of the rows, then of the columns */
    graded_mirror((int)r, l->wave_moment, inverse, w->product); /* [r][r], r <= d */
    memset(w->basis, 0, n * n * sizeof *w->basis);              /* [r][d] */
    for (size_t i = 0; i < r; i++) subtract_wave(l, w, w->product + i * r, -1, w->basis + i * n);
    for (size_t j = 0; j < n; j++) {
      for (size_t i = 0; i < r; i++) row[n + i] = w->basis[i * n + j];
      memset(row, 0, n * sizeof *row);
      subtract_wave(l, w, row + n, -1, row);
      for (size_t i = 0; i < n; i++) w->covariance[i * n + j] += row[i];
    }
    subtract_wave(l, w, l->wave_sum, inverse, w->mean);
  }
  average_places(l, o, true, w, w->covariance);
  average_places(l, o, false, w, w->mean);
  for (size_t i = 0; i < n; i++)
    for (size_t j = 0; j < n; j++) w->covariance[i * n + j] -= w->mean[i] * w->mean[j];
  graded_regularize(d, inverse * graded_trace(d, h->key_moment), w->covariance);
}

/* w->metric, mean diagonal 1, with the ridge. Where no query read codes: the query moment; without queries: the identity. */
static oscar_status find_metric(const oscar_calib *calib, int layer, int kv_head, const oscar_graded_options *o, struct work *w) {
  const struct attended_head *h = &calib->attended->layers[layer].heads[kv_head];
  int d = w->d;
  graded_mirror(d, h->metric, 1, w->metric);
  double size = graded_trace(d, w->metric) / d;
  if (!(size > 0)) {
    oscar_status status = oscar_calib_get(calib, OSCAR_CALIB_QUERY_MOMENT, layer, kv_head, w->metric);
    if (status != OSCAR_OK) return status;
    size = graded_trace(d, w->metric) / d;
  }
  for (size_t i = 0, n = (size_t)d; i < n; i++) {
    for (size_t j = 0; j < n; j++) w->metric[i * n + j] = size > 0 ? w->metric[i * n + j] / size : 0;
    w->metric[i * (n + 1)] += size > 0 ? (double)o->ridge : 1;
  }
  average_places(&calib->attended->layers[layer], o, true, w, w->metric);
  return OSCAR_OK;
}

/* w->mean: where the attended keys are, less the rotating mean. Without attention: the plain mean, which is there already. */
static void find_attended_mean(const struct attended_layer *l, const struct attended_head *h, const oscar_graded_options *o,
                               struct work *w) {
  if (!(h->attended > 0)) return;
  for (int i = 0; i < w->d; i++) w->mean[i] = h->attended_key[i] / h->attended;
  if (w->rotary_dim) subtract_wave(l, w, h->attended_wave, 1 / h->attended, w->mean);
  average_places(l, o, false, w, w->mean);
}

/* ---- the basis ---- */

/* root and inverse_root of the positive metric (which is destroyed). */
static oscar_status take_roots(struct work *w) {
  oscar_status status = graded_eigen(w, w->metric);
  if (status != OSCAR_OK) return status;
  size_t n = (size_t)w->d;
  double least = w->values[0] * 1e-12;
  memset(w->root, 0, n * n * sizeof *w->root);
  memset(w->inverse_root, 0, n * n * sizeof *w->inverse_root);
  for (size_t k = 0; k < n; k++) {
    const double *v = w->vectors + k * n;
    double root = sqrt(w->values[k] > least ? w->values[k] : least);
    for (size_t i = 0; i < n; i++)
      for (size_t j = 0; j < n; j++) {
        w->root[i * n + j] += v[i] * root * v[j];
        w->inverse_root[i * n + j] += v[i] / root * v[j];
      }
  }
  return OSCAR_OK;
}

/* basis = B V, dual = V' B^-1, values = the variances. */
static oscar_status find_basis(struct work *w) {
  oscar_status status = take_roots(w);
  if (status != OSCAR_OK) return status;
  int d = w->d;
  size_t n = (size_t)d;
  graded_multiply(d, w->root, w->covariance, w->product);
  graded_multiply(d, w->product, w->root, w->covariance);
  if ((status = graded_eigen(w, w->covariance)) != OSCAR_OK) return status;
  for (size_t i = 0; i < n; i++)
    if (!(w->values[i] > 0)) w->values[i] = 0;
  for (size_t i = 0; i < n; i++) /* product = V */
    for (size_t j = 0; j < n; j++) w->product[i * n + j] = w->vectors[j * n + i];
  graded_multiply(d, w->root, w->product, w->basis);
  graded_multiply(d, w->vectors, w->inverse_root, w->dual);
  return OSCAR_OK;
}

/* Mean, variances and basis of the keys less the rotating mean of the pairs that are kept. */
static oscar_status describe_keys(const oscar_calib *calib, int layer, int kv_head, const oscar_graded_options *o,
                                  struct work *w) {
  const struct attended_layer *l = &calib->attended->layers[layer];
  const struct attended_head *h = &l->heads[kv_head];
  oscar_status status = find_metric(calib, layer, kv_head, o, w);
  if (status != OSCAR_OK) return status;
  find_covariance(l, h, o, w);
  find_attended_mean(l, h, o, w);
  return find_basis(w);
}

oscar_status graded_find_keys(const oscar_calib *calib, int layer, int kv_head, const oscar_graded_options *o, struct work *w) {
  const struct attended_layer *l = &calib->attended->layers[layer];
  w->rotary_dim = o->rotating_mean ? l->rotary_dim : 0;
  w->kept = 0;
  if (w->rotary_dim) find_rotating_mean(l, &l->heads[kv_head], w);
  oscar_status status = describe_keys(calib, layer, kv_head, o, w);
  const int pairs = w->rotary_dim / 2, count = (int)((double)o->rotating_share * pairs);
  if (status != OSCAR_OK || count == w->kept) return status;
  keep_dearest(l, o, w, count);
  return describe_keys(calib, layer, kv_head, o, w);
}
