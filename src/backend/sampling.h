/*
 * backend/sampling.h - how the next token is drawn among a few ranked candidates, on the host and on a GPU. Private; for C and
 * CUDA.
 *
 * Additions and multiplications of IEEE doubles, none of them fused, in an order that is said: the same logits and random number
 * give the same token everywhere. CUDA files that include this are compiled with -fmad=false.
 */
#ifndef OSCAR_SAMPLING_H
#define OSCAR_SAMPLING_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define SAMPLING_FN __host__ __device__ static inline
#else
#define SAMPLING_FN static inline
#endif

/* The most candidates that are ranked: a GPU chooses where the temperature is 0, or top_k is not 0 and not more than this. */
#define MOST_RANKED 128

/* One choice (engine/sampler.h says what the filters mean). */
struct sampling {
  float temperature; /* 0: the best one */
  int32_t top_k;
  float top_p, min_p;
  double random; /* [0, 1) */
};

/* e^x for x <= 0: x = k ln 2 + r, |r| <= ln(2)/2, Taylor series to r^13 (remainder below 1e-17) */
SAMPLING_FN double sampling_exponential(double x) {
  const double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33; /* ln 2; k * ln2_high is exact */
  const double inverse_factorials[] = {
      1,          1,           1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  if (!(x > -700)) return 0; /* below 1e-304: no random number of 53 bits would find it */
  const double k = floor(x * 0x1.71547652b82fep+0 + 0.5), r = x - k * ln2_high - k * ln2_low;
  double sum = inverse_factorials[13], power;
  for (int n = 12; n >= 0; n--) sum = sum * r + inverse_factorials[n];
  const uint64_t bits = (uint64_t)((int64_t)k + 1023) << 52;
  memcpy(&power, &bits, sizeof power);
  return sum * power;
}

/* How many of n ranked candidates, best first, top-p and min-p keep. weights: e^(logit - best logit). */
SAMPLING_FN int sampling_keep(int n, const double *weights, double top_p, double min_p) {
  double total = 0, sum = 0;
  int kept = 0;
  for (int i = 0; i < n; i++) total += weights[i];
  while (kept < n && (kept == 0 || ((top_p >= 1 || sum < top_p * total) && weights[kept] >= min_p))) sum += weights[kept++];
  return kept;
}

/* The rank that is drawn of the kept ones. weights: e^((logit - best logit) / temperature). */
SAMPLING_FN int sampling_draw(int kept, const double *weights, double random) {
  double total = 0;
  for (int i = kept - 1; i >= 0; i--) total += weights[i];
  double target = random * total;
  for (int i = kept - 1; i >= 0; i--) {
    target -= weights[i];
    if (target < 0) return i;
  }
  return 0; /* rounding of the sum left a rest that belongs to nobody */
}

#endif
