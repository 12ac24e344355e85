/*
 * eval/spectra.h - second moments of queries, keys and values of many heads, and their eigenvalues. Private.
 *
 * A place is one KV head of one layer. Sums are double; memory is 3 d^2 numbers a place.
 */
#ifndef OSCAR_SPECTRA_H
#define OSCAR_SPECTRA_H

#include "base/base.h"

struct spectra;
oscar_status spectra_create(oscar_context *context, int places, int head_dim, struct spectra **spectra);
void spectra_free(struct spectra *spectra);

/* q [queries][d] (all heads of the KV head), k and v [rows][d]. */
void spectra_add(struct spectra *spectra, int place, int queries, const float *q, int rows, const float *k, const float *v);

/* Eigenvalues of a place, descending, [d] each: of the query moment M, the key covariance C, C (M + 0.05 trace(M)/d I), and the
 * value covariance. Rounding can leave tiny negative numbers; they are given as 0. Errors: NUMERIC (LAPACK gives up; non-finite
 * input), NO_MEMORY. */
oscar_status spectra_eigenvalues(struct spectra *spectra, int place, double *queries, double *keys, double *logits,
                                 double *values);

#endif
