/* logits.c - see logits.h; exponentials in float, sums in double. */
#include "engine/logits.h"

#include <math.h>

void logits_summary(const float *logits, int vocab, double *log_sum, int32_t *best) {
  float top = logits[0];
  *best = 0;
  for (int i = 1; i < vocab; i++)
    if (logits[i] > top) {
      top = logits[i];
      *best = i;
    }
  double sum = 0;
  for (int i = 0; i < vocab; i++) sum += (double)expf(logits[i] - top);
  *log_sum = (double)top + log(sum);
}

double logits_divergence(const float *p, const float *reference, double reference_log_sum, const float *logits, double log_sum,
                         int vocab) {
  double difference = 0;
  for (int i = 0; i < vocab; i++) difference += (double)p[i] * ((double)reference[i] - (double)logits[i]);
  double kl = difference - reference_log_sum + log_sum;
  return kl > 0 ? kl : 0; /* rounding can leave a tiny negative number for equal rows */
}
