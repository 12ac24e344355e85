/* spectra.c - sums by BLAS over tiles of rows in double, eigenvalues by LAPACK. Lower triangles are kept. */
#include "eval/spectra.h"

#include <cblas.h>
#include <lapacke.h>
#include <string.h>

enum { TILE_ROWS = 64 };

/* What keeps the metric of the logits regular: a share of the query moment's mean eigenvalue. Graded codes are fitted with the
 * same ridge; results are flat in it. */
static const double ridge = 0.05;

struct moments {
  int64_t queries, rows;
  double *query, *key, *value; /* [d][d] sums of x'x */
  double *key_sum, *value_sum; /* [d] */
};

struct spectra {
  oscar_context *context;
  int places, d;
  struct moments *moments; /* [places] */
  double *storage, *tile, *a, *b;
};

void spectra_free(struct spectra *s) {
  if (!s) return;
  mem_free(s->context, s->moments);
  mem_free(s->context, s->storage);
  mem_free(s->context, s->tile);
  mem_free(s->context, s->a);
  mem_free(s->context, s->b);
  mem_free(s->context, s);
}

oscar_status spectra_create(oscar_context *context, int places, int head_dim, struct spectra **spectra) {
  struct spectra *s = mem_zalloc(context, 1, sizeof *s);
  if (!s) return OSCAR_NO_MEMORY;
  s->context = context;
  s->places = places;
  s->d = head_dim;
  const size_t d = (size_t)head_dim, each = 3 * d * d + 2 * d;
  if (!(s->moments = mem_zalloc(context, (size_t)places, sizeof *s->moments)) ||
      !(s->storage = mem_zalloc(context, (size_t)places * each, sizeof *s->storage)) ||
      !(s->tile = mem_alloc(context, TILE_ROWS * d, sizeof *s->tile)) || !(s->a = mem_alloc(context, d * d, sizeof *s->a)) ||
      !(s->b = mem_alloc(context, d * d, sizeof *s->b))) {
    spectra_free(s);
    return OSCAR_NO_MEMORY;
  }
  for (int i = 0; i < places; i++) {
    double *at = s->storage + (size_t)i * each;
    s->moments[i] = (struct moments){
        .query = at, .key = at + d * d, .value = at + 2 * d * d, .key_sum = at + 3 * d * d, .value_sum = at + 3 * d * d + d};
  }
  *spectra = s;
  return OSCAR_OK;
}

static void add(struct spectra *s, int n, const float *x, double *moment, double *sum) {
  const size_t d = (size_t)s->d;
  for (int first = 0; first < n; first += TILE_ROWS) {
    const int rows = n - first < TILE_ROWS ? n - first : TILE_ROWS;
    const float *from = x + (size_t)first * d;
    for (size_t i = 0; i < (size_t)rows * d; i++) {
      s->tile[i] = (double)from[i];
      if (sum) sum[i % d] += s->tile[i];
    }
    cblas_dsyrk(CblasRowMajor, CblasLower, CblasTrans, s->d, rows, 1, s->tile, s->d, 1, moment, s->d);
  }
}

void spectra_add(struct spectra *s, int place, int queries, const float *q, int rows, const float *k, const float *v) {
  struct moments *m = &s->moments[place];
  add(s, queries, q, m->query, NULL);
  add(s, rows, k, m->key, m->key_sum);
  add(s, rows, v, m->value, m->value_sum);
  m->queries += queries;
  m->rows += rows;
}

/* to = sum / n - mean' mean, lower triangle; `sum_of_rows` NULL: not centred. */
static void moment_of(const struct spectra *s, const double *sum, const double *sum_of_rows, int64_t n, double *to) {
  const size_t d = (size_t)s->d;
  const double count = n > 0 ? (double)n : 1;
  for (size_t i = 0; i < d; i++)
    for (size_t j = 0; j <= i; j++) {
      const double mean = sum_of_rows ? sum_of_rows[i] / count * (sum_of_rows[j] / count) : 0;
      to[i * d + j] = sum[i * d + j] / count - mean;
    }
}

/* Ascending as LAPACK gives them -> descending, not negative. */
static void put_descending(double *values, int d) {
  for (int i = 0; i < d / 2; i++) {
    const double x = values[i];
    values[i] = values[d - 1 - i];
    values[d - 1 - i] = x;
  }
  for (int i = 0; i < d; i++)
    if (values[i] < 0) values[i] = 0;
}

static oscar_status finish(struct spectra *s, int info, int place, double *values) {
  if (info == LAPACK_WORK_MEMORY_ERROR) return set_error(s->context, OSCAR_NO_MEMORY, "out of memory for eigenvalues");
  if (info != 0)
    return set_error(s->context, OSCAR_NUMERIC, "the eigenvalues of head %d cannot be computed (LAPACK says %d)", place, info);
  put_descending(values, s->d);
  return OSCAR_OK;
}

static oscar_status eigenvalues(struct spectra *s, int place, double *values) {
  return finish(s, LAPACKE_dsyevd(LAPACK_ROW_MAJOR, 'N', 'L', s->d, s->a, s->d, values), place, values);
}

/* Of a b, by the symmetric problem a b x = lambda x with b positive definite. A head without queries has no spectrum. */
static oscar_status product_eigenvalues(struct spectra *s, int place, double *values) {
  const int d = s->d;
  double trace = 0;
  for (int i = 0; i < d; i++) trace += s->b[i * d + i];
  if (trace <= 0) {
    memset(values, 0, (size_t)d * sizeof *values);
    return OSCAR_OK;
  }
  for (int i = 0; i < d; i++) s->b[i * d + i] += ridge * trace / d;
  return finish(s, LAPACKE_dsygvd(LAPACK_ROW_MAJOR, 2, 'N', 'L', d, s->a, d, s->b, d, values), place, values);
}

oscar_status spectra_eigenvalues(struct spectra *s, int place, double *queries, double *keys, double *logits, double *values) {
  const struct moments *m = &s->moments[place];
  moment_of(s, m->query, NULL, m->queries, s->a);
  oscar_status status = eigenvalues(s, place, queries);
  moment_of(s, m->key, m->key_sum, m->rows, s->a);
  if (status == OSCAR_OK) status = eigenvalues(s, place, keys);
  moment_of(s, m->value, m->value_sum, m->rows, s->a);
  if (status == OSCAR_OK) status = eigenvalues(s, place, values);
  moment_of(s, m->key, m->key_sum, m->rows, s->a);
  moment_of(s, m->query, NULL, m->queries, s->b);
  return status == OSCAR_OK ? product_eigenvalues(s, place, logits) : status;
}
