/*
 * attention/cuda/decode/running_softmax.cuh - maxima and sums of the rows of a warp while it reads page after page. Private.
 */
#ifndef OSCAR_ATTENTION_CUDA_DECODE_RUNNING_SOFTMAX_CUH
#define OSCAR_ATTENTION_CUDA_DECODE_RUNNING_SOFTMAX_CUH

#include "attention/cuda/decode/data.cuh"

namespace decode {

constexpr float NONE = -INFINITY;

/* What a row has of a running softmax, in a lane: m the same in all lanes of a row, l of this lane's tokens only. */
template <int NT> struct softmax { float m[NT], l[NT]; };

/* The new maxima of the rows, and what all sums have to be multiplied with; false: nothing changes. The same in the whole warp.
 * Scores may exceed a maximum by up to `slack` before it is raised. */
template <int NT>
__device__ inline bool raise_maxima(const float (&largest)[NT], float slack, softmax<NT> &state, float (&factor)[NT]) {
  bool above = false;
#pragma unroll
  for (int n = 0; n < NT; n++) above = above || largest[n] > state.m[n] + slack;
  if (!__any_sync(~0u, above)) return false;
  float top[NT];
#pragma unroll
  for (int n = 0; n < NT; n++) {
    top[n] = largest[n];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) top[n] = fmaxf(top[n], __shfl_xor_sync(~0u, top[n], step));
  }
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float m = fmaxf(state.m[n], top[n]);
    factor[n] = m > NONE ? exp2_fast(state.m[n] - m) : 1; /* -inf is never subtracted from -inf */
    state.m[n] = m;
    state.l[n] *= factor[n];
  }
  return true;
}

/*
 * Scores of coded pages are kept as they go into exp2: less the maximum of the row, plus PROBABILITY_SHIFT. So they begin at
 * `base`, which has the mean in it as well. `limit`: what scores may be before the maximum is raised; -inf until there is one.
 */
template <int NT> struct coded_maxima { float m[NT], base[NT], limit[NT]; };
template <int NT>
__device__ __forceinline__ bool raise_coded_maxima(const float (&largest)[NT], float slack, coded_maxima<NT> &maxima,
                                                   float (&s)[4][NT][2], float (&factor)[NT]) {
  bool above = false;
#pragma unroll
  for (int n = 0; n < NT; n++) above = above || largest[n] > maxima.limit[n];
  if (!__any_sync(~0u, above)) return false;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const bool first = maxima.limit[n] == NONE;
    float top = largest[n];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    factor[n] = 1;
    if (top == NONE) continue; /* all is masked */
    float more = top - PROBABILITY_SHIFT;
    if (!first) more = fmaxf(more, 0), factor[n] = exp2_fast(-more); /* at first there is nothing to be multiplied */
    maxima.m[n] += more;
    maxima.base[n] -= more;
    maxima.limit[n] = PROBABILITY_SHIFT + slack;
#pragma unroll
    for (int t = 0; t < 4; t++) s[t][n][0] -= more, s[t][n][1] -= more;
  }
  return true;
}

} // namespace decode

#endif
