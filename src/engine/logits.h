/* engine/logits.h - rows of logits [vocab] compared: log-partition, KL divergence. Private. */
#ifndef OSCAR_LOGITS_H
#define OSCAR_LOGITS_H

#include <stdint.h>

/* The log of the sum of exponentials, and the most likely token (lowest id on ties). */
void logits_summary(const float *logits, int vocab, double *log_sum, int32_t *best);
/* KL(p || q) with p [vocab] the probabilities of `reference` logits. */
double logits_divergence(const float *p, const float *reference, double reference_log_sum, const float *logits, double log_sum,
                         int vocab);

#endif
