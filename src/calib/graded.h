/*
 * calib/graded.h - what the parts of the fit of graded codes share: one head's work space, its algebra, its keys. Private.
 */
#ifndef OSCAR_GRADED_H
#define OSCAR_GRADED_H

#include "calib/attended.h"

#include <lapacke.h>

/* Work space of one head; d x d unless said, row-major. */
struct work {
  oscar_context *context;
  int d, rotary_dim;
  double *metric, *root, *inverse_root, *covariance, *vectors, *product, *basis, *dual;
  double *values, *mean; /* [d] */
  double *wave_mean;     /* [R] the rotating mean: for each pair b1, then for each pair b2; 0 for pairs that are left out */
  int kept;              /* pairs that are not left out; their numbers, ascending, in `pairs` */
  double *lapack;
  lapack_int *integers;
  lapack_int lapack_size, integers_size;
  float *encode, *decode, *steps, *mean_f32, *rotating;
  uint8_t *crumbs;
  uint16_t *pairs;
  void *block, *floats;
};

/* ---- graded_work.c ---- */
oscar_status graded_work_open(oscar_context *context, int head_dim, struct work *w);
void graded_work_close(struct work *w);
/* full [d][d] = factor times the symmetric matrix whose lower triangle is given */
void graded_mirror(int d, const double *lower, double factor, double *full);
double graded_trace(int d, const double *a);
/* c = a b, all [d][d] */
void graded_multiply(int d, const double *a, const double *b, double *c);
/* Eigenvectors of the symmetric `a` (destroyed) into w->vectors, one per row, descending values in w->values. An eigenvector's
 * sign is arbitrary: its component of largest magnitude is made positive, so that the same sums give the same file. */
oscar_status graded_eigen(struct work *w, double *a);
/* Adds the least that any direction is taken to vary by: a ten-thousandth of the mean, and a hundred-millionth of the raw energy,
 * so that constant rows (one token repeated) and dead channels have steps that later rows can be coded with. */
void graded_regularize(int d, double raw_trace, double *covariance);

/* ---- graded_keys.c ---- */
/* Everything about the keys of a head but their crumbs: w->mean, wave_mean, kept (alike in all heads of a layer) and pairs; basis
 * (columns), dual (rows) and the variances in w->values, descending. */
oscar_status graded_find_keys(const oscar_calib *calib, int layer, int kv_head, const oscar_graded_options *o, struct work *w);

#endif
