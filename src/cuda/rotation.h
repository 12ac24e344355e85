/* cuda/rotation.h - RoPE as kernels see it. Private; for C and CUDA. */
#ifndef OSCAR_CUDA_ROTATION_H
#define OSCAR_CUDA_ROTATION_H

struct head_rotation {
  int pairs, step, next;     /* the two of a pair are `step` apart; `next`: from one pair to the next */
  const double *frequencies; /* [pairs], device memory: a position times this is the angle */
};

#endif
