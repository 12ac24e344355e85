/* graded_work.c - the work space of a head and the small dense algebra of the fit; see graded.h. */
#include "calib/graded.h"

#include <math.h>
#include <string.h>

/* ---- work space ---- */

void graded_work_close(struct work *w) {
  mem_free(w->context, w->block);
  mem_free(w->context, w->floats);
  mem_free(w->context, w->integers);
}

oscar_status graded_work_open(oscar_context *context, int d, struct work *w) {
  *w = (struct work){.context = context, .d = d};
  size_t n = (size_t)d, square = n * n;
  w->lapack_size = (lapack_int)(1 + 6 * n + 2 * square); /* dsyevd's documented minimum with eigenvectors */
  w->integers_size = (lapack_int)(3 + 5 * n);
  double *doubles = mem_alloc(context, 8 * square + 3 * n + (size_t)w->lapack_size, sizeof(double));
  w->block = doubles;
  float *floats = doubles ? mem_alloc(context, 2 * square + 3 * n + n, sizeof(float)) : NULL; /* the last n: bytes and words */
  w->floats = floats;
  w->integers = floats ? mem_alloc(context, (size_t)w->integers_size, sizeof *w->integers) : NULL;
  if (!w->integers) {
    graded_work_close(w);
    return OSCAR_NO_MEMORY;
  }
  double **const squares[] = {&w->metric,  &w->root,    &w->inverse_root, &w->covariance,
                              &w->vectors, &w->product, &w->basis,        &w->dual};
  for (size_t i = 0; i < ARRAY_LENGTH(squares); i++, doubles += square) *squares[i] = doubles;
  w->values = doubles;
  w->mean = w->values + n;
  w->wave_mean = w->mean + n;
  w->lapack = w->wave_mean + n;
  w->encode = floats;
  w->decode = w->encode + square;
  w->steps = w->decode + square;
  w->mean_f32 = w->steps + n;
  w->rotating = w->mean_f32 + n;
  w->pairs = (uint16_t *)(void *)(w->rotating + n);
  w->crumbs = (uint8_t *)(w->pairs + n / 2);
  return OSCAR_OK;
}

/* ---- small dense algebra ---- */

void graded_mirror(int d, const double *lower, double factor, double *full) {
  for (size_t i = 0, n = (size_t)d; i < n; i++)
    for (size_t j = 0; j <= i; j++) full[i * n + j] = full[j * n + i] = factor * lower[i * n + j];
}

double graded_trace(int d, const double *a) {
  double sum = 0;
  for (size_t i = 0, n = (size_t)d; i < n; i++) sum += a[i * (n + 1)];
  return sum;
}

void graded_multiply(int d, const double *a, const double *b, double *c) {
  size_t n = (size_t)d;
  memset(c, 0, n * n * sizeof *c);
  for (size_t i = 0; i < n; i++)
    for (size_t k = 0; k < n; k++) {
      double x = a[i * n + k];
      for (size_t j = 0; j < n; j++) c[i * n + j] += x * b[k * n + j];
    }
}

oscar_status graded_eigen(struct work *w, double *a) {
  int d = w->d;
  size_t n = (size_t)d;
  lapack_int info = LAPACKE_dsyevd_work(LAPACK_COL_MAJOR, 'V', 'L', d, a, d, w->values, w->lapack, w->lapack_size, w->integers,
                                        w->integers_size);
  if (info != 0)
    return set_error(w->context, OSCAR_NUMERIC, "fit: eigenvectors did not converge (dsyevd returned %d)", (int)info);
  for (size_t j = 0; j < n; j++) { /* LAPACK's column j is contiguous */
    const double *vector = a + (n - 1 - j) * n;
    size_t largest = 0;
    for (size_t i = 1; i < n; i++)
      if (fabs(vector[i]) > fabs(vector[largest])) largest = i;
    double sign = vector[largest] < 0 ? -1 : 1;
    for (size_t i = 0; i < n; i++) w->vectors[j * n + i] = sign * vector[i];
  }
  for (size_t i = 0; i < n / 2; i++) {
    double x = w->values[i];
    w->values[i] = w->values[n - 1 - i];
    w->values[n - 1 - i] = x;
  }
  return OSCAR_OK;
}

void graded_regularize(int d, double raw_trace, double *covariance) {
  double floor = (1e-4 * graded_trace(d, covariance) + 1e-8 * raw_trace) / d + 1e-30;
  for (size_t i = 0, n = (size_t)d; i < n; i++) covariance[i * (n + 1)] += floor > 0 ? floor : 0;
}
