/*
 * eval/statistics.h - how sure a measured number is: intervals of shares, tests of paired results. Private.
 *
 * All of them take trials as independent. Where trials share a text they are not quite, and intervals come out a little short.
 */
#ifndef OSCAR_STATISTICS_H
#define OSCAR_STATISTICS_H

#include <stdint.h>

/* 95 % score interval of a share, without continuity correction (Wilson, J. Am. Stat. Assoc. 22, 1927; method 3 of Newcombe,
 * Stat. Med. 17, 1998). 0 trials: 0 to 1. */
void wilson_interval(int64_t successes, int64_t trials, double *low, double *high);

/* Two-sided exact McNemar test (the binomial test of discordant pairs): how likely a split of `only_a` to `only_b` or a more
 * uneven one is when both are equally good. 1 without discordant pairs. */
double mcnemar_p(int64_t only_a, int64_t only_b);

/* Two-sided sign-flip (permutation) test of paired differences [n]: how likely a mean as far from 0 is when each difference could
 * as well have had the other sign. Exact up to 16 differences, else from 20000 draws of a fixed seed. 1 for n = 0. */
double sign_flip_p(const double *differences, int n);

/* Mean of x [n], and with n > 1 the standard deviation (n - 1 in the denominator), else NAN. n >= 1. */
double mean_of(const double *x, int n);
double deviation_of(const double *x, int n);

#endif
