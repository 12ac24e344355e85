/*
 * cuda/rotation.cuh - norming and rotating a head by one warp. Private, CUDA C++.
 *
 * Which multiplications are fused with additions is said, not left to the compiler: every kernel that does this gives the same
 * bits.
 */
#ifndef OSCAR_CUDA_ROTATION_CUH
#define OSCAR_CUDA_ROTATION_CUH

#include "cuda/rotation.h"

#include <cuda_runtime.h>
#include <oscar/codec.h>
#include <stdint.h>

/* Pairs of a lane, TURNS below: of the usual heads, and of any. */
#define USUAL_TURNS 4
#define MOST_TURNS  (OSCAR_MAX_HEAD_DIM / 2 / 32)

/*
 * Cosine and sine of an angle. It is brought to -pi/4 .. pi/4 in double, because at position 100,000 a float would be wrong by
 * 0.004; there polynomials (Cephes, sinf and cosf) are good to a unit in the last place.
 */
__device__ static __forceinline__ void cosine_and_sine(double angle, float *cosine, float *sine) {
  const double quarters = rint(angle * 0.63661977236758134308); /* 2 / pi */
  const float r = (float)fma(-quarters, 1.57079632679489661923, angle), z = __fmul_rn(r, r);
  const float third = fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f);
  const float s = fmaf(__fmul_rn(third, z), r, r);
  const float fourth = fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f);
  const float c = __fadd_rn(fmaf(__fmul_rn(fourth, z), z, __fmul_rn(-0.5f, z)), 1.0f);
  const int quarter = (int)((int64_t)quarters & 3);
  const float x = quarter & 1 ? s : c, y = quarter & 1 ? c : s;
  *cosine = quarter == 1 || quarter == 2 ? -x : x;
  *sine = quarter >= 2 ? -y : y;
}

/* Of pairs lane, lane + 32, ... */
template <int TURNS> struct lane_turns { float cosine[TURNS], sine[TURNS]; };
template <int TURNS>
__device__ static __forceinline__ lane_turns<TURNS> turns_at(const head_rotation &r, int32_t position, int lane) {
  lane_turns<TURNS> turns;
#pragma unroll
  for (int j = 0; j < TURNS; j++)
    if (lane + 32 * j < r.pairs)
      cosine_and_sine(__dmul_rn((double)position, r.frequencies[lane + 32 * j]), &turns.cosine[j], &turns.sine[j]);
  return turns;
}

/*
 * x [head_dim], normed unless `norm` is NULL, then rotated: store(i, value) for every i, each by the lane that read x[i], when
 * all lanes have read theirs.
 */
template <int TURNS, class Store>
__device__ static __forceinline__ void rotate_head(const float *x, const float *norm, float eps, int head_dim,
                                                   const head_rotation &r, const lane_turns<TURNS> &turns, int lane,
                                                   Store store) {
  float re[TURNS], im[TURNS], squares = 0, factor = 1;
#pragma unroll
  for (int j = 0; j < TURNS; j++) {
    const int i = lane + 32 * j, at = i * r.next;
    if (i >= r.pairs) continue;
    re[j] = x[at], im[j] = x[at + r.step];
    squares = fmaf(im[j], im[j], fmaf(re[j], re[j], squares));
  }
  if (norm) {
    for (int i = 2 * r.pairs + lane; i < head_dim; i += 32) squares = fmaf(x[i], x[i], squares);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
    factor = 1 / sqrtf(__fadd_rn(__fdiv_rn(squares, (float)head_dim), eps));
  }
#pragma unroll
  for (int j = 0; j < TURNS; j++) {
    const int i = lane + 32 * j, at = i * r.next, beside = at + r.step;
    if (i >= r.pairs) continue;
    if (norm) re[j] = __fmul_rn(re[j], __fmul_rn(factor, norm[at])), im[j] = __fmul_rn(im[j], __fmul_rn(factor, norm[beside]));
    store(at, fmaf(re[j], turns.cosine[j], -__fmul_rn(im[j], turns.sine[j])));
    store(beside, fmaf(re[j], turns.sine[j], __fmul_rn(im[j], turns.cosine[j])));
  }
  for (int i = 2 * r.pairs + lane; i < head_dim; i += 32) store(i, norm ? __fmul_rn(x[i], __fmul_rn(factor, norm[i])) : x[i]);
}

#endif
