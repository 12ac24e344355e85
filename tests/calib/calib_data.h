/* tests/calib/calib_data.h - what the tests of the room share: invented attention inputs and the calibration fed with them. */
#ifndef OSCAR_CALIB_DATA_H
#define OSCAR_CALIB_DATA_H

#include "support.h"

#include <oscar/calib.h>

/* One layer's q, k, v, o for n tokens. */
struct layer_data {
  int n, query_heads, kv_heads, head_dim;
  float *q, *k, *v, *o;
};

static inline struct layer_data layer_data_make(int n, int query_heads, int kv_heads, int head_dim, uint64_t seed) {
  struct layer_data x = {n, query_heads, kv_heads, head_dim, NULL, NULL, NULL, NULL};
  size_t q = (size_t)n * (size_t)query_heads * (size_t)head_dim, k = (size_t)n * (size_t)kv_heads * (size_t)head_dim;
  x.q = malloc(q * sizeof *x.q);
  x.o = malloc(q * sizeof *x.o);
  x.k = malloc(k * sizeof *x.k);
  x.v = malloc(k * sizeof *x.v);
  for (size_t i = 0; i < q; i++) {
    x.q[i] = test_normal(&seed);
    x.o[i] = test_normal(&seed) + 0.25f;
  }
  for (size_t i = 0; i < k; i++) {
    x.k[i] = test_normal(&seed) - 0.5f;
    x.v[i] = test_normal(&seed) * 2;
  }
  return x;
}

static inline void layer_data_free(struct layer_data *x) {
  free(x->q);
  free(x->k);
  free(x->v);
  free(x->o);
}

static inline const float *row_of(const float *x, int heads, int d, int token, int head) {
  return x + ((size_t)token * (size_t)heads + (size_t)head) * (size_t)d;
}

static inline oscar_status feed_part(oscar_calib *calib, int layer, const struct layer_data *x, int first, int n) {
  return oscar_calib_add(calib, layer, n, row_of(x->q, x->query_heads, x->head_dim, first, 0),
                         row_of(x->k, x->kv_heads, x->head_dim, first, 0), row_of(x->v, x->kv_heads, x->head_dim, first, 0),
                         row_of(x->o, x->query_heads, x->head_dim, first, 0));
}

static inline oscar_status feed(oscar_calib *calib, int layer, const struct layer_data *x, int chunk) {
  for (int t = 0; t < x->n; t += chunk) {
    oscar_status status = feed_part(calib, layer, x, t, x->n - t < chunk ? x->n - t : chunk);
    if (status != OSCAR_OK) return status;
  }
  return OSCAR_OK;
}

static inline void assert_near(size_t n, const double *a, const double *b, double tolerance) {
  double largest = 0;
  for (size_t i = 0; i < n; i++) largest = fmax(largest, fabs(b[i]));
  for (size_t i = 0; i < n; i++)
    if (!(fabs(a[i] - b[i]) <= tolerance * largest)) fail_msg("element %zu: %.17g, expected %.17g", i, a[i], b[i]);
}

#endif
