/* statistics.c - see statistics.h. */
#include "eval/statistics.h"

#include "base/draw.h"

#include <math.h>

void wilson_interval(int64_t successes, int64_t trials, double *low, double *high) {
  static const double z = 1.959963984540054; /* 97.5 % quantile of the normal distribution */
  *low = 0;
  *high = 1;
  if (trials < 1) return;
  const double n = (double)trials, share = (double)successes / n, scale = 1 / (1 + z * z / n);
  const double centre = scale * (share + z * z / (2 * n));
  const double half = scale * z * sqrt(share * (1 - share) / n + z * z / (4 * n * n));
  if (successes > 0) *low = centre - half; /* the ends are exactly 0 and 1; the formula gives them up to rounding */
  if (successes < trials) *high = centre + half;
}

double mcnemar_p(int64_t only_a, int64_t only_b) {
  const int64_t n = only_a + only_b, fewer = only_a < only_b ? only_a : only_b;
  double tail = 0;
  for (int64_t k = 0; k <= fewer; k++) {
    const double log_ways = lgamma((double)n + 1) - lgamma((double)k + 1) - lgamma((double)(n - k) + 1);
    tail += exp(log_ways - (double)n * log(2));
  }
  return fmin(1, 2 * tail);
}

double sign_flip_p(const double *differences, int n) {
  enum { EXACT = 16, DRAWS = 20000 };
  double observed = 0;
  for (int i = 0; i < n; i++) observed += differences[i];
  /* Sums that are equal but for rounding count as equal. */
  const double limit = fabs(observed) * (1 - 1e-12);
  const int rounds = n <= EXACT ? 1 << n : DRAWS;
  struct draw draw = draw_begin(1, 0, 0, 0);
  int64_t as_far = 0;
  for (int round = 0; round < rounds; round++) {
    double sum = 0;
    uint64_t signs = (uint64_t)round;
    for (int i = 0; i < n; i++) {
      if (n > EXACT && i % 64 == 0) signs = draw_bits(&draw);
      sum += signs >> (i % 64) & 1 ? -differences[i] : differences[i];
    }
    as_far += fabs(sum) >= limit;
  }
  /* The observed signs are one of the exact rounds; of random ones they are an extra one, so that p is never 0. */
  return n <= EXACT ? (double)as_far / rounds : (double)(as_far + 1) / (rounds + 1);
}

double mean_of(const double *x, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += x[i];
  return sum / n;
}

double deviation_of(const double *x, int n) {
  if (n < 2) return (double)NAN;
  const double mean = mean_of(x, n);
  double squares = 0;
  for (int i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
  return sqrt(squares / (n - 1));
}
