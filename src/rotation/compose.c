/*
 * compose.c - R = U H P: eigenvectors, a Hadamard mixing and the bit-reversal order of columns, in double.
 *
 * The result is rounded to float once, at the end; a composed matrix read from a file is never composed again.
 */
#include "rotation/hadamard.h"

#include <math.h>

void oscar_bit_reversal(int d, int *perm) {
  bool power = d > 0 && (d & (d - 1)) == 0;
  int bits = power ? __builtin_ctz((unsigned)d) : 0;
  for (int j = 0; j < d; j++) {
    int reversed = 0;
    for (int b = 0; b < bits; b++) reversed |= (j >> b & 1) << (bits - 1 - b);
    perm[j] = d - 1 - (power ? reversed : j);
  }
}

/* r row i = (u row i * signs), columns permuted, divided by sqrt(d). sums [d] is scratch. */
static void compose_row(int d, const double *u, const int8_t *signs, const int *perm, double *sums, float *r) {
  for (int j = 0; j < d; j++) sums[j] = 0;
  for (int k = 0; k < d; k++, signs += d)
    for (int j = 0; j < d; j++) sums[j] += u[k] * signs[j];
  for (int j = 0; j < d; j++) r[j] = (float)(sums[perm[j]] / sqrt((double)d));
}

oscar_status oscar_rotation_compose(oscar_context *context, int d, const double *u, float *r) {
  size_t n = d > 0 ? (size_t)d : 1;
  oscar_status status = OSCAR_NO_MEMORY;
  int8_t *signs = mem_alloc(context, n * n, sizeof *signs);
  int *perm = signs ? mem_alloc(context, n, sizeof *perm) : NULL;
  double *sums = perm ? mem_alloc(context, n, sizeof *sums) : NULL;
  if (!sums) goto out;
  status = hadamard_signs(context, d, signs);
  if (status != OSCAR_OK) goto out;
  oscar_bit_reversal(d, perm);
  for (size_t i = 0; i < n; i++) compose_row(d, u + i * n, signs, perm, sums, r + i * n);
out:
  mem_free(context, sums);
  mem_free(context, perm);
  mem_free(context, signs);
  return status;
}

double oscar_rotation_orthogonality(int d, const float *r) {
  double worst = 0;
  for (int i = 0; i < d; i++)
    for (int j = i; j < d; j++) {
      double sum = 0;
      for (int k = 0; k < d; k++)
        sum += (double)r[(size_t)k * (size_t)d + (size_t)i] * (double)r[(size_t)k * (size_t)d + (size_t)j];
      double off = fabs(sum - (i == j));
      if (isnan(off)) return off;
      if (off > worst) worst = off;
    }
  return worst;
}
